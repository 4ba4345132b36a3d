"""References x prompts x seeds x methods -> a manifest: `python jobs/plan.py --references CLIPS --prompts FILE --output MANIFEST`.

Exit code: 0 planned, 1 the storage failed, 2 it cannot be planned.
"""

from pipelines import command, plan
from schemas import PlanSettings, cli

if __name__ == "__main__":
    raise SystemExit(command.main(plan.run, cli.load(PlanSettings), again="run it again"))
