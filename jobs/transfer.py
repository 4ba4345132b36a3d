"""Manifest -> videos: `python jobs/transfer.py --manifest MANIFEST --output OUT`. Run it again to make only what is missing.

Exit code: 0 all rows ok, 3 some rows failed, 1 the run failed, 2 wrong usage.
"""

from pipelines import command, transfer
from schemas import TransferSettings, cli

if __name__ == "__main__":
    raise SystemExit(command.main(transfer.run, cli.load(TransferSettings)))
