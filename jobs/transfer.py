"""Manifest -> videos: `python jobs/transfer.py --manifest MANIFEST --output OUT`. Run it again to make only what is missing.

Exit code: 0 all rows ok, 3 some rows failed, 1 the run failed, 2 wrong usage.
"""

from __future__ import annotations

import signal
import sys

from pipelines import transfer
from pipelines.cluster import RunFailed
from pipelines.storage import describe
from schemas import TransferSettings, UsageError, cli


def main() -> int:
    """Runs the job; returns its exit code."""
    settings = cli.load(TransferSettings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        summary = transfer.run(settings, say=lambda line: print(line, flush=True))
    except UsageError as error:
        cli.fail(*str(error).splitlines())
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # of the driver's own storage operations, after their retries
        print(f"error: {describe(error)}; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 1
    return 3 if summary["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
