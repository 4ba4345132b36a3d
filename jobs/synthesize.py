"""Procedural clips with exact tracks: `python jobs/synthesize.py --count N --seed S --output OUT`.

Run it again to make only what is missing.

Exit code: 0 all clips are there, 1 the run failed, 2 wrong usage.
"""

from __future__ import annotations

import signal
import sys

from pipelines import synthesize
from pipelines.cluster import RunFailed
from pipelines.storage import describe
from schemas import SynthesizeSettings, UsageError, cli


def main() -> int:
    """Runs the job; returns its exit code."""
    settings = cli.load(SynthesizeSettings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        synthesize.run(settings, say=lambda line: print(line, flush=True))
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
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
