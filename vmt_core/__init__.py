"""Motion transfer on Wan 2.1, without Ray: runs in a notebook.

    frames ──Backbone.encode──▶ latents ──Objective.encode──▶ motion ┐
    prompt ──Backbone.caption──▶ text ──────────────────────────────┴─▶ sample + guidance ──▶ latents ──decode──▶ frames

`MotionTransfer` does all of it; `METHODS` lists the ways; `video` reads and writes files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmt_core import video
    from vmt_core.backbone.geometry import Geometry, Tap
    from vmt_core.backbone.wan import Backbone
    from vmt_core.methods import METHODS, Method
    from vmt_core.transfer import Artifact, MotionTransfer, Sampling

__all__ = ["METHODS", "Artifact", "Backbone", "Geometry", "Method", "MotionTransfer", "Sampling", "Tap", "video"]

_HOMES = {
    "Geometry": "backbone.geometry",
    "Tap": "backbone.geometry",
    "Backbone": "backbone.wan",
    "METHODS": "methods",
    "Method": "methods",
    "Artifact": "transfer",
    "MotionTransfer": "transfer",
    "Sampling": "transfer",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: `jobs/plan.py --help` need not wait for diffusers."""
    if name == "video":
        return import_module(f"{__name__}.video")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
