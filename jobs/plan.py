"""References x prompts x seeds x methods -> a manifest: `python jobs/plan.py --references CLIPS --prompts FILE --output MANIFEST`."""

from __future__ import annotations

import sys

from pipelines import plan
from pipelines.storage import describe
from schemas import PlanSettings, UsageError, cli


def main() -> int:
    """Runs the job; returns its exit code: 0, 2 if what was asked cannot be planned, 1 if storage fails."""
    settings = cli.load(PlanSettings)
    try:
        plan.run(settings)
    except UsageError as error:
        cli.fail(*str(error).splitlines())
    except OSError as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
