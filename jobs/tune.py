"""Tunes an adapter on every reference: `python jobs/tune.py --references clips.csv --method follow_your_motion --output OUT`.

Run it again to make only what is missing. Exit code: 0 every reference has an adapter, 3 some failed, 1 the run failed, 2 wrong usage.
"""

from pipelines import command, tune
from schemas import TuneSettings, cli

if __name__ == "__main__":
    raise SystemExit(command.main(tune.run, cli.load(TuneSettings)))
