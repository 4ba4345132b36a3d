"""The procedural world: small scenes whose motion is known exactly.

References of demo, tests and benchmark, and what wan-nano is trained on.

    scene = sample(seed, category="single")            # or Scene(...) by hand
    frames, paths, words = render(scene), tracks(scene), appearance(scene)

spec.py      a scene as data                motion.py    where everything is at each frame
sample.py    random scenes, splits          shapes.py    signed distances
render.py    pixels, masks, exact tracks    captions.py  what is seen, how it moves, in words
judge.py     a classifier that reads a clip back
"""

from vmt_core.world.captions import appearance, motion_caption
from vmt_core.world.render import Tracks, centres, grid_points, masks, render, tracks
from vmt_core.world.sample import MOTIONS, sample, split
from vmt_core.world.spec import WORLD_VERSION, Scene

__all__ = [
    "MOTIONS",
    "WORLD_VERSION",
    "Scene",
    "Tracks",
    "appearance",
    "centres",
    "grid_points",
    "masks",
    "motion_caption",
    "render",
    "sample",
    "split",
    "tracks",
]
