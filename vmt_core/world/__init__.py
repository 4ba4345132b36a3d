"""Procedural clips: small textured scenes with a known motion, the references of the demo and of the tests."""

from vmt_core.world.clips import MOTIONS, render

__all__ = ["MOTIONS", "render"]
