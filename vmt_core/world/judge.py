"""A small classifier that says what a clip of the procedural world shows: which bodies, which background.

Every body of a scene has a colour of its own, so the answer is, for each colour, a shape or none. Trained in minutes on real clips of the
train split; `accuracy` on real clips of the test split says how far it can be trusted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from vmt_core.shapes import Frames
from vmt_core.world.render import render
from vmt_core.world.sample import sample
from vmt_core.world.spec import BACKGROUNDS, COLOURS, LIGHTER, WORLD_VERSION, Body, Pattern, Scene, ShapeName

KINDS = ("none", *get_args(ShapeName), "figure", "pendulum")
PATTERNS = get_args(Pattern)
GROUNDS = tuple(BACKGROUNDS)
_SIDE = 96


@dataclass(frozen=True)
class Verdict:
    """Shares in [0, 1] over some clips. A body counts as found if its colour is seen, and its shape if that is right too."""

    colour: float
    shape: float
    background_colour: float
    background_pattern: float

    @property
    def background(self) -> float:
        return min(self.background_colour, self.background_pattern)


class Judge(nn.Module):
    """Logits from frames of any size, each frame on its own: (B, 3, H, W) in [0, 1] -> bodies (B, colours, kinds), pattern, ground."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        for (into, out), stride in zip(pairwise(channels), (2, 2, 2, 1), strict=True):
            layers += [nn.Conv2d(into, out, 3, stride=stride, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
        layers += [nn.Conv2d(channels[-1], channels[-1], 3, padding=1), nn.GroupNorm(8, channels[-1]), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.where = nn.Conv2d(channels[-1], len(COLOURS), 1)
        self.kinds = nn.Parameter(torch.randn(len(COLOURS), channels[-1], len(KINDS)) / channels[-1] ** 0.5)
        self.grounds = nn.Linear(2 * channels[-1], len(PATTERNS) + len(GROUNDS))

    def forward(self, frames: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor, Tensor]:
        if frames.shape[-2:] != (_SIDE, _SIDE):
            frames = interpolate(frames, (_SIDE, _SIDE), mode="area")
        features = self.body(frames)
        there = self.where(features).flatten(2).softmax(-1)  # each colour is looked for, and its kind read where it is
        seen = there @ features.flatten(2).mT  # (B, colours, channels)
        bodies = torch.einsum("bcf,cfk->bck", seen, self.kinds)
        pooled = torch.cat([features.mean((-2, -1)), features.amax((-2, -1))], -1)
        return bodies, *self.grounds(pooled).split((len(PATTERNS), len(GROUNDS)), -1)

    @torch.no_grad()
    def look(self, clip: Frames) -> tuple[Float[Tensor, "colours kinds"], Float[Tensor, " p"], Float[Tensor, " g"]]:
        """Probabilities for a clip: the mean over five of its frames."""
        picked = clip[torch.linspace(0, len(clip) - 1, 5).round().long()].float() / 255
        bodies, pattern, ground = self.eval()(picked)
        return bodies.softmax(-1).mean(0), pattern.softmax(-1).mean(0), ground.softmax(-1).mean(0)


def foreground(clip: Frames) -> Bool[Tensor, "frames height width"]:
    """Pixels whose nearest colour of the palette is an object's, not a background's."""
    grounds = [torch.tensor(colour, dtype=torch.float32) for colour in BACKGROUNDS.values()]
    tones = [first + share * (255 - first) for first in grounds for share in (0.0, LIGHTER / 2, LIGHTER)]
    objects = [torch.tensor(colour, dtype=torch.float32) for colour in COLOURS.values()]
    palette = torch.stack(tones + objects)
    pixels = clip.permute(0, 2, 3, 1).float().reshape(-1, 3)
    nearest = torch.cdist(pixels, palette).argmin(-1)
    return (nearest >= len(tones)).view(clip.shape[0], *clip.shape[2:])


def centre_path(clip: Frames) -> Float[Tensor, "frames 2"]:
    """Where the objects' pixels are on average, (x, y) in pixels; nan in frames with hardly any."""
    mask = foreground(clip).float()
    total = mask.sum((1, 2))
    y = (mask.sum(2) @ (torch.arange(mask.shape[1]) + 0.5)) / total
    x = (mask.sum(1) @ (torch.arange(mask.shape[2]) + 0.5)) / total
    path = torch.stack([x, y], -1)
    path[total < 0.002 * mask[0].numel()] = float("nan")
    return path


def kind_of(body: Body) -> int:
    """Place in KINDS."""
    return KINDS.index(body.shape if body.kind == "object" else body.kind)


def answer(scene: Scene) -> Int[Tensor, " colours_plus_2"]:
    """What is right: the kind of each colour, then the pattern and the background's colour, as indices."""
    kinds = [0] * len(COLOURS)
    for body in scene.bodies:
        kinds[list(COLOURS).index(body.colour)] = kind_of(body)
    return torch.tensor([*kinds, PATTERNS.index(scene.background.pattern), GROUNDS.index(scene.background.colour)])


def verdicts(judge: Judge, clips: Sequence[Frames], scenes: Sequence[Scene]) -> list[Verdict]:
    """For each clip, how much of what its scene says is seen."""
    found = []
    for clip, scene in zip(clips, scenes, strict=True):
        bodies, pattern, ground = judge.look(clip)
        right = answer(scene)
        named = right[: len(COLOURS)] > 0
        seen = bodies.argmax(-1)
        found.append(
            Verdict(
                float((seen > 0)[named].float().mean()),
                float((seen == right[: len(COLOURS)])[named].float().mean()),
                float(ground.argmax() == right[-1]),
                float(pattern.argmax() == right[-2]),
            )
        )
    return found


def mean(found: Sequence[Verdict]) -> Verdict:
    """The average verdict."""
    columns = zip(*((v.colour, v.shape, v.background_colour, v.background_pattern) for v in found), strict=True)
    return Verdict(*(sum(column) / len(found) for column in columns))


def train(*, scenes: int = 12_000, steps: int = 2000, batch: int = 96, seed: int = 0) -> Judge:
    """A judge, from scenes of the train split: two frames of each, blurred and noisy at random as generated clips may be."""
    torch.manual_seed(seed)
    chosen = [sample(20 * (index // 18) + index % 18, frames=2, height=_SIDE, width=_SIDE) for index in range(scenes)]
    images = torch.stack([render(scene) for scene in chosen])  # (scenes, 2, 3, H, W)
    answers = torch.stack([answer(scene) for scene in chosen])
    judge, random = Judge(), Random(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        picked = torch.randint(scenes, (batch,))
        frames = images[picked, torch.randint(2, (batch,))].float() / 255
        if random.random() < 0.5:
            frames = interpolate(avg_pool2d(frames, 2), (_SIDE, _SIDE), mode="bilinear")
        frames = frames + random.uniform(0, 0.08) * torch.randn_like(frames)
        right = answers[picked]
        bodies, pattern, ground = judge(frames)
        loss = (
            4 * cross_entropy(bodies.flatten(0, 1), right[:, : len(COLOURS)].flatten())
            + cross_entropy(pattern, right[:, -2])
            + cross_entropy(ground, right[:, -1])
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return judge.eval()


def accuracy(judge: Judge, clips: int = 300) -> Verdict:
    """On real clips of the test split."""
    scenes = [sample(20 * index + 19) for index in range(clips)]
    return mean(verdicts(judge, [render(scene) for scene in scenes], scenes))


def cached(path: Path) -> Judge:
    """The judge of a file, trained and written there if there is none.

    Raises:
        ValueError: the file holds another architecture, or a judge of another world.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        save_file(train().state_dict(), part, metadata={"world_version": str(WORLD_VERSION)})
        part.replace(path)
    judge = Judge()
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("world_version") != str(WORLD_VERSION):
                raise ValueError("of another world")
        judge.load_state_dict(load_file(path))
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: no weights of this judge; remove the file, and this one is trained there") from error
    return judge.eval()
