"""How smooth and how consistent a clip is by its own optical flow; no weights. Read beside how much moves: a still clip scores 1."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from vmt_core.metrics.motion import estimator, flow_tracks
from vmt_core.shapes import Frames

_LOST = 0.75  # pixels of forward-backward error at which a flow is not trusted


def smoothness(frames: Frames) -> float:
    """VBench's motion smoothness with DIS flow in the place of AMT: how well each odd frame is the middle of its neighbours, in [0, 1].

    Its order is that of the original, its values are not (arXiv 2311.17982, section 3). Raises ValueError under 3 frames.
    """
    if len(frames) < 3:
        raise ValueError(f"{len(frames)} frames; smoothness needs at least 3")
    errors = []
    for index in range(1, len(frames) - 1, 2):
        before, after = frames[index - 1], frames[index + 1]
        there, back = _flow(before, after), _flow(after, before)
        middle = (_warp(before, -there / 2) + _warp(after, -back / 2)) / 2
        errors.append((middle - frames[index].float()).abs().mean() / 255)
    return 1 - float(torch.stack(errors).mean())


class Consistency:
    """1 less the mean difference of each frame and the one before it, carried along by the flow, where that can be trusted; in [0, 1].

    `add` is for `motion.flow_tracks`, which has the flows.
    """

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self.errors: list[Tensor] = []

    def add(self, number: int, forward: np.ndarray, backward: np.ndarray) -> None:
        """Flows (H, W, 2) from a frame to the next, and back."""
        there, back = (torch.from_numpy(flow).permute(2, 0, 1) for flow in (forward, backward))
        trusted = (back + _sample(there, back)).norm(dim=0) <= _LOST
        if bool(trusted.any()):
            carried = _warp(self.frames[number], back)
            self.errors.append((carried - self.frames[number + 1].float()).abs().mean(0)[trusted].mean() / 255)

    def value(self) -> float:
        """nan where no flow can be trusted."""
        return 1 - float(torch.stack(self.errors).mean()) if self.errors else float("nan")


def consistency(frames: Frames) -> float:
    """`Consistency` of a clip by itself."""
    found = Consistency(frames)
    flow_tracks(frames, torch.zeros(1, 2), found.add)
    return found.value()


def _flow(first: Tensor, second: Tensor) -> Tensor:
    """DIS flow (2, H, W): where pixels of the first frame are in the second."""
    one, two = (
        cv2.cvtColor(image.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY) for image in (first, second)
    )
    flow = estimator().calc(one, two, np.zeros((0,), np.float32))
    return torch.from_numpy(flow).permute(2, 0, 1)


def _warp(frame: Tensor, flow: Tensor) -> Tensor:
    """A frame (3, H, W) looked up at each pixel plus the flow there."""
    return _sample(frame.float(), flow)


def _sample(image: Tensor, flow: Tensor) -> Tensor:
    height, width = flow.shape[1:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    grid = torch.stack([2 * (x + flow[0]) / width - 1, 2 * (y + flow[1]) / height - 1], -1)
    return grid_sample(image[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]
