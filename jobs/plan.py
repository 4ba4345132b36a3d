"""References x prompts x seeds x methods -> a manifest: `python jobs/plan.py --references CLIPS --prompts FILE --output MANIFEST`."""

from __future__ import annotations

from pipelines import plan
from schemas import PlanSettings, UsageError, cli


def main() -> int:
    """Runs the job; returns its exit code: 0, or 2 if what was asked cannot be planned."""
    settings = cli.load(PlanSettings)
    try:
        plan.run(settings)
    except UsageError as error:
        cli.fail(*str(error).splitlines())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
