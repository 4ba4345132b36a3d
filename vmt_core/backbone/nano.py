"""wan-nano: a small trained Wan of the real classes that ships with the package, so that every command works on a fresh machine.

A folder in diffusers layout that a plain `WanPipeline.from_pretrained` loads; its README.md is the model card.
"""

from __future__ import annotations

from pathlib import Path

NAME = "wan-nano"
NOTICE = (
    "wan-nano is a toy of 8 million parameters: it draws the shapes of the procedural world and nothing else. "
    "Use Wan 2.1 weights for real videos."
)


def folder() -> Path:
    """The folder of its weights."""
    return Path(__file__).parent.parent / "wan_nano"
