"""A small classifier that says what a clip of the procedural world shows: which bodies, which background.

Every body of a scene has a colour of its own, so the answer is, for each colour, a shape or none. Trained in minutes on real clips of the
train split; `accuracy` on real clips of the test split says how far it can be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from vmt_core.shapes import Frames
from vmt_core.world.render import render
from vmt_core.world.sample import sample
from vmt_core.world.spec import BACKGROUNDS, COLOURS, LIGHTER, Body, Pattern, Scene, ShapeName

KINDS = ("none", *get_args(ShapeName), "figure", "pendulum")
PATTERNS = get_args(Pattern)
GROUNDS = tuple(BACKGROUNDS)
_SIDE = 96
_HIDDEN = 0.001  # share of the frame below which a body is not to be seen
_SPREAD = 0.02  # of a colour, squared, about its place in the palette
_GROUND_TONES = [torch.tensor(colour) / 255 for colour in BACKGROUNDS.values()]
_TONES = 3 * len(_GROUND_TONES)
#: Three tones of each background, then the objects' colours, (26, 3) in [0, 1].
_PALETTE = torch.stack(
    [tone + share * (1 - tone) for tone in _GROUND_TONES for share in (0.0, LIGHTER / 2, LIGHTER)]
    + [torch.tensor(colour) / 255 for colour in COLOURS.values()]
)


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
    """Logits from frames of any size, each frame on its own: (B, 3, H, W) in [0, 1] -> bodies (B, colours, kinds), pattern, ground.

    A body is read from the map of where its colour is, by one network for all colours: an outline learnt in one is known in all.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.outline, self.kind = _Pooled(1, width), nn.Linear(8 * width, len(KINDS))
        self.ground, self.tone = _Pooled(3, width), nn.Linear(8 * width, len(PATTERNS) + len(GROUNDS))

    def forward(self, frames: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor, Tensor]:
        small = _resized(frames)
        maps = colour_maps(small)
        bodies = self.kinds(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])
        pattern, ground = self.grounds(small)
        return bodies, pattern, ground

    def kinds(self, maps: Float[Tensor, "n h w"]) -> Float[Tensor, "n kinds"]:
        """Logits of what a map shows."""
        logits: Tensor = self.kind(self.outline(maps.unsqueeze(1)))
        return logits

    def grounds(self, small: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor]:
        """Logits of pattern and colour of the background."""
        pattern, ground = self.tone(self.ground(small)).split((len(PATTERNS), len(GROUNDS)), -1)
        return pattern, ground

    @torch.no_grad()
    def look(self, clip: Frames) -> tuple[Float[Tensor, "colours kinds"], Float[Tensor, " p"], Float[Tensor, " g"]]:
        """Probabilities for a clip: the mean over five of its frames."""
        picked = clip[torch.linspace(0, len(clip) - 1, 5).round().long()].float() / 255
        bodies, pattern, ground = self.eval()(picked)
        return bodies.softmax(-1).mean(0), pattern.softmax(-1).mean(0), ground.softmax(-1).mean(0)


class _Pooled(nn.Sequential):
    """Images of _SIDE -> features (n, 8 * width): mean and maximum over the places of a small convolutional network."""

    def __init__(self, channels: int, width: int) -> None:
        layers: list[nn.Module] = []
        for into, out in pairwise((channels, width, 2 * width, 3 * width, 4 * width)):
            layers += [nn.Conv2d(into, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
        layers += [nn.Conv2d(4 * width, 4 * width, 3, padding=1), nn.GroupNorm(8, 4 * width), nn.SiLU()]
        super().__init__(*layers)

    def forward(self, images: Tensor) -> Tensor:
        features = super().forward(images)
        return torch.cat([features.mean((-2, -1)), features.amax((-2, -1))], -1)


def colour_maps(frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b colours h w"]:
    """How much each pixel (in [0, 1]) has an object's colour rather than another's or a background's, in [0, 1]."""
    pixels = frames.permute(0, 2, 3, 1)
    near = torch.cdist(pixels.flatten(0, 2), _PALETTE).square().neg() / _SPREAD
    return near.softmax(-1)[:, _TONES:].unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2).contiguous()


def foreground(clip: Frames) -> Bool[Tensor, "frames height width"]:
    """Pixels whose nearest colour of the palette is an object's, not a background's."""
    pixels = clip.permute(0, 2, 3, 1).float() / 255
    nearest = torch.cdist(pixels.flatten(0, 2), _PALETTE).argmin(-1)
    return (nearest >= _TONES).view(pixels.shape[:3])


def centre_path(clip: Frames) -> Float[Tensor, "frames 2"]:
    """Where the objects' pixels are on average, (x, y) in pixels; nan in frames with hardly any."""
    mask = foreground(clip).float()
    total = mask.sum((1, 2))
    y = (mask.sum(2) @ (torch.arange(mask.shape[1]) + 0.5)) / total
    x = (mask.sum(1) @ (torch.arange(mask.shape[2]) + 0.5)) / total
    path = torch.stack([x, y], -1)
    path[total < 0.002 * mask[0].numel()] = float("nan")
    return path


def _resized(frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    return frames if frames.shape[-2:] == (_SIDE, _SIDE) else interpolate(frames, (_SIDE, _SIDE), mode="area")


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


def train(*, scenes: int = 8000, steps: int = 1500, batch: int = 64, seed: int = 0) -> Judge:
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
        kinds, maps = right[:, : len(COLOURS)], colour_maps(frames)
        there = kinds > 0
        absent = torch.rand(there.shape).masked_fill(there, 0).argmax(1)  # one colour of each image that nothing has
        asked = (there & (maps.mean((-2, -1)) > _HIDDEN)).scatter(1, absent[:, None], True)
        pattern, ground = judge.grounds(frames)
        loss = (
            cross_entropy(judge.kinds(maps[asked]), kinds[asked])
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
    """The judge of a file, trained and written there if there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(train().state_dict(), path)
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()
