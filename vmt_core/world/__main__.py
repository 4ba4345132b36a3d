"""`python -m vmt_core.world FOLDER`: writes one clip of each motion as mp4."""

import sys
from pathlib import Path

from vmt_core import video
from vmt_core.world.clips import MOTIONS, render


def main(folder: str) -> None:
    """Writes FOLDER/<motion>.mp4 for every motion."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for seed, motion in enumerate(MOTIONS):
        video.write(path / f"{motion}.mp4", render(motion, seed=seed), fps=12)


if __name__ == "__main__":
    main(*sys.argv[1:])
