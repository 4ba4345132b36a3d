"""A benchmark in one command: `python jobs/bench.py --suite procedural --quick --methods none,ditflow,fastvmt --output OUT`.

Leaves OUT/report.html and OUT/comparison.csv. Run it again to go on.

Exit code: 0 all was measured, 3 some could not be, 1 the run failed, 2 wrong usage.
"""

from pipelines import bench, command
from schemas import BenchSettings, cli

if __name__ == "__main__":
    raise SystemExit(command.main(bench.run, cli.load(BenchSettings)))
