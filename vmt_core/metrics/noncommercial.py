"""Two published metrics whose code and weights are CC-BY-NC 4.0: opt-in, never bundled, installed and converted by the user.

CoTracker 3 (github.com/facebookresearch/co-tracker, `scaled_offline.pth`) and AMT-S (github.com/MCG-NKU/AMT, `amt-s.pth`). Their code
must be importable; their weights are safetensors files, since checkpoints that are pickles are not read here.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from vmt_core.metrics.motion import Positions
from vmt_core.shapes import Frames

NOTICE = "made with code and weights under CC-BY-NC 4.0: not for commercial use"
GRID = 55  # tracks along either side, as in Yatim et al.
_AT_ONCE = 8  # pairs of frames
_MULTIPLE = 16  # of AMT's inputs


class CoTracker:
    """CoTracker 3, offline."""

    def __init__(self, weights: str | Path, device: str = "cpu") -> None:
        made: Any = _code("cotracker.predictor", "github.com/facebookresearch/co-tracker")
        self.device = torch.device(device)
        self.predictor = made.CoTrackerPredictor(checkpoint=None, window_len=60).eval().to(self.device)
        self.predictor.model.load_state_dict(load_file(weights))

    @torch.no_grad()
    def tracks(self, frames: Frames) -> Positions:
        """Of a grid of GRID x GRID points of the first frame, (frames, GRID², 2) in pixels."""
        tracks: Tensor = self.predictor(frames.float().unsqueeze(0).to(self.device), grid_size=GRID)[0]
        return tracks[0].float().cpu()


def fidelity(first: Positions, second: Positions) -> float:
    """Motion fidelity (Yatim et al., arXiv 2311.17009): each track with its best match in the other clip, both ways, in [-1, 1].

    Every track counts, standing ones too, as published; no equal-index pairs are left out, as the released code does. Chance is high:
    about 0.5 for unrelated random walks at 3,025 tracks of 24 frames.
    """
    steps = min(len(first), len(second)) - 1
    one, two = (_directions(tracks[: steps + 1]) for tracks in (first, second))
    corr = one @ two.T / steps
    return float((corr.amax(1).mean() + corr.amax(0).mean()) / 2)


class Amt:
    """AMT-S, which makes the frame between two others."""

    def __init__(self, weights: str | Path, device: str = "cpu") -> None:
        made: Any = _code("networks.AMT-S", "github.com/MCG-NKU/AMT")
        self.device = torch.device(device)
        self.model = made.Model(corr_radius=3, corr_lvls=4, num_flows=3).eval().to(self.device)
        self.model.load_state_dict(load_file(weights))

    @torch.no_grad()
    def smoothness(self, frames: Frames) -> float:
        """VBench's motion smoothness, in [0, 1]: how near odd frames are to what is made from their neighbours.

        Raises:
            ValueError: fewer than three frames.
        """
        if len(frames) < 3:
            raise ValueError(f"smoothness needs at least 3 frames, not {len(frames)}")
        height, width = frames.shape[-2:]
        down, right = -height % _MULTIPLE, -width % _MULTIPLE
        top, left = down // 2, right // 2
        images = frames.float() / 255
        even = pad(images[::2], (left, right - left, top, down - top), mode="replicate").to(self.device)
        odd = images[1::2][: len(even) - 1]
        errors = []
        for before, after, truth in zip(
            even[:-1].split(_AT_ONCE), even[1:].split(_AT_ONCE), odd.split(_AT_ONCE), strict=True
        ):
            half = before.new_full((len(before), 1, 1, 1), 0.5)
            made = self.model(before, after, half, scale_factor=1.0, eval=True)["imgt_pred"]
            made = made[..., top : top + height, left : left + width].float().clamp(0, 1).cpu()
            errors.append((made - truth).abs().flatten(1).mean(1))
        return 1 - float(torch.cat(errors).mean())


def _directions(tracks: Positions) -> Float[Tensor, "n d"]:
    """Unit steps of each track, one after the other; a step of no length stays nothing."""
    steps = tracks.diff(dim=0)
    unit = steps / torch.linalg.vector_norm(steps, dim=-1, keepdim=True).clamp(min=1e-6)
    joined: Tensor = unit.transpose(0, 1).flatten(1)
    return joined


def _code(module: str, where: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} cannot be imported ({error}): install {where}, or put a checkout on PYTHONPATH"
        ) from error
