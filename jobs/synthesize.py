"""Procedural clips with exact tracks: `python jobs/synthesize.py --count N --seed S --output OUT`.

Run it again to make only what is missing.

Exit code: 0 all clips are there, 1 the run failed, 2 wrong usage.
"""

from pipelines import command, synthesize
from schemas import SynthesizeSettings, cli

if __name__ == "__main__":
    raise SystemExit(command.main(synthesize.run, cli.load(SynthesizeSettings)))
