"""Motion transfer on Wan 2.1, without Ray: runs in a notebook.

    frames ──Backbone.encode──▶ latents ──Objective.encode──▶ motion ┐
    prompt ──Backbone.caption──▶ text ──────────────────────────────┴─▶ sample + guidance ──▶ latents ──decode──▶ frames

`MotionTransfer` does all of it; `METHODS` lists the ways; `video` reads and writes files.
"""

from vmt_core.backbone.geometry import Geometry, Tap
from vmt_core.backbone.wan import Backbone
from vmt_core.methods import METHODS, Method
from vmt_core.transfer import Artifact, MotionTransfer, Sampling

__all__ = ["METHODS", "Artifact", "Backbone", "Geometry", "Method", "MotionTransfer", "Sampling", "Tap"]
