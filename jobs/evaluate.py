"""Measures the videos of runs and compares methods: `python jobs/evaluate.py --run OUT --output EVAL`.

Run it again to measure only what is new. Exit code: 0 every video was measured, 3 some could not be, 1 the run failed, 2 wrong usage.
"""

from pipelines import command, evaluate
from schemas import EvaluateSettings, cli

if __name__ == "__main__":
    raise SystemExit(command.main(evaluate.run, cli.load(EvaluateSettings)))
