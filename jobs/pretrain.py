"""Trains wan-nano: `python jobs/pretrain.py --stage vae --minutes 60`, then `--stage dit`; `--resume` goes on.

Exit code: 0 trained, 1 the run failed, 2 wrong usage.
"""

from __future__ import annotations

import signal
import sys

from pipelines import pretrain
from pipelines.cluster import RunFailed
from pipelines.storage import describe
from schemas import PretrainSettings, UsageError, cli


def main() -> int:
    """Runs the job; returns its exit code."""
    settings = cli.load(PretrainSettings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        pretrain.run(settings, say=lambda line: print(line, flush=True))
    except UsageError as error:
        cli.fail(*str(error).splitlines())
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # of the driver's own storage operations, after their retries
        print(f"error: {describe(error)}; --resume goes on from the last checkpoint", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
