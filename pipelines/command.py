"""What every job does around its run: lines as they come, one line for each way to fail, an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pipelines.cluster import RunFailed
from pipelines.storage import describe
from schemas import JobSettings, RowError, UsageError, cli

S = TypeVar("S", bound=JobSettings)


def main(
    run: Callable[[S, Callable[[str], None]], Mapping[str, Any] | None],
    settings: S,
    again: str = "the same command goes on from here",
) -> int:
    """Runs a job; returns its exit code: 0, 3 if the summary counts failed rows, 1 if the run failed; 2 (wrong usage) exits at once.

    Args:
        again: what a user does after a run that failed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        summary = run(settings, lambda line: print(line, flush=True))
    except UsageError as error:
        cli.fail(*str(error).splitlines())
    except RowError as error:  # of a place that was given in a flag
        cli.fail(error.message)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # of the driver's own storage operations, after their retries
        print(f"error: {describe(error)}; {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; {again}", file=sys.stderr)
        return 1
    return 3 if summary and summary.get("failed") else 0
