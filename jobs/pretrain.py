"""Trains wan-nano: `python jobs/pretrain.py --stage vae --minutes 60`, then `--stage dit`; `--resume` goes on.

Exit code: 0 trained, 1 the run failed, 2 wrong usage.
"""

from pipelines import command, pretrain
from schemas import PretrainSettings, cli

if __name__ == "__main__":
    raise SystemExit(
        command.main(pretrain.run, cli.load(PretrainSettings), again="--resume goes on from the last checkpoint")
    )
