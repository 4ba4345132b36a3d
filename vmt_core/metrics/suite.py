"""All metrics of one video, by name: what is asked of a video stands here once, with a version for each.

A metric that cannot be computed is absent, with the reason; there are no stand-ins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from vmt_core.faults import device_is_broken, out_of_memory
from vmt_core.metrics import encoders, flow, leak, motion, noncommercial
from vmt_core.metrics.motion import Positions, Visible
from vmt_core.shapes import Frames
from vmt_core.world import Scene, tracks

#: Name -> version; bumped whenever the same videos would give another value.
CORE = {
    "motion": 4,  # motion.aligned: agreement with the reference at the same places, -1 to 1
    "motion_followed": 1,  # motion.followed: share of what moves that it is a mean of
    "motion_matched": 3,  # motion.matched: agreement with the best match anywhere
    "moving": 3,  # share of the video's points that move
    "moving_reference": 3,
    "smoothness": 1,  # flow.smoothness
    "flow_consistency": 1,  # flow.consistency
    "background_leak": 1,  # leak.background_leak
}
MODELS = {
    "text_similarity": 1,  # CLIP, prompt and frames
    "temporal_consistency": 1,  # CLIP, neighbouring frames
    "subject_consistency": 1,  # VBench, DINO
    "background_consistency": 1,  # VBench, CLIP
    "aesthetic_quality": 1,  # VBench, CLIP ViT-L/14 and LAION's head
}
NON_COMMERCIAL = {
    "motion_fidelity": 1,  # Yatim et al., CoTracker
    "motion_smoothness": 1,  # VBench, AMT
}
VERSIONS = CORE | MODELS | NON_COMMERCIAL


@dataclass
class Reference:
    """A reference as the model saw it. What is measured of it serves all of its videos."""

    frames: Frames
    scene: Scene | None = None  # of a procedural one: its motion is known exactly
    fidelity_tracks: Tensor | None = None  # CoTracker's, once they were asked for

    @cached_property
    def tracks(self) -> tuple[Positions, Visible]:
        points = motion.start_points(*self.frames.shape[-2:])
        if self.scene is not None:
            return motion.of_world(tracks(self.scene, points))
        return motion.flow_tracks(self.frames, points)


@dataclass
class Video:
    """A generated video as long and as large as its reference, and what was asked for."""

    frames: Frames
    reference: Reference
    prompt: str
    clip_images: encoders.Features | None = None  # once they were asked for

    @cached_property
    def by_flow(self) -> tuple[tuple[Positions, Visible], float]:
        """Tracks and flow consistency, from the same flows."""
        consistency = flow.Consistency(self.frames)
        found = motion.flow_tracks(self.frames, motion.start_points(*self.frames.shape[-2:]), consistency.add)
        return found, consistency.value()

    @property
    def tracks(self) -> tuple[Positions, Visible]:
        return self.by_flow[0]

    @property
    def width(self) -> int:
        return int(self.frames.shape[-1])


@dataclass
class Suite:
    """What can be measured here: the core without weights, the rest with those that were given."""

    clip: encoders.Clip | None = None
    dino: encoders.Dino | None = None
    aesthetic_clip: encoders.Clip | None = None
    aesthetic_head: encoders.AestheticHead | None = None
    cotracker: noncommercial.CoTracker | None = None
    amt: noncommercial.Amt | None = None

    def measure(self, video: Video) -> tuple[dict[str, float], dict[str, str]]:
        """Values by name, and for each that there is none of, why.

        Raises:
            Exception: the memory does not suffice or the device is broken, which says nothing of the video.
        """
        values: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for name, (missing, compute) in self._metrics().items():
            if missing:
                reasons[name] = missing
                continue
            try:
                value = compute(video)
            except Exception as error:
                if out_of_memory(error) or device_is_broken(error):
                    raise
                reasons[name] = f"{type(error).__name__}: {error}"[:500]
                continue
            if math.isfinite(value):
                values[name] = value
            else:
                reasons[name] = "undefined for this video: nothing moves, or nothing stands still"
        return values, reasons

    def _metrics(self) -> dict[str, tuple[str, Callable[[Video], float]]]:
        """Name -> what is missing for it (if anything), and how it is computed."""
        clip = "" if self.clip else "no CLIP was given"
        dino = "" if self.dino else "no DINO was given"
        head = (
            "" if self.aesthetic_clip and self.aesthetic_head else "no CLIP ViT-L/14 with an aesthetic head was given"
        )
        return {
            "motion": ("", lambda v: motion.aligned(v.reference.tracks, v.tracks, v.width)),
            "motion_followed": ("", lambda v: motion.followed(v.reference.tracks, v.tracks, v.width)),
            "motion_matched": ("", lambda v: motion.matched(v.reference.tracks, v.tracks, v.width)),
            "moving": ("", lambda v: motion.moving_share(v.tracks, v.width)),
            "moving_reference": ("", lambda v: motion.moving_share(v.reference.tracks, v.width)),
            "smoothness": ("", lambda v: flow.smoothness(v.frames)),
            "flow_consistency": ("", lambda v: v.by_flow[1]),
            "background_leak": ("", lambda v: leak.background_leak(v.reference.frames, v.frames)),
            "text_similarity": (clip, self._text_similarity),
            "temporal_consistency": (clip, lambda v: encoders.temporal_consistency(self._images(v))),
            "subject_consistency": (dino, self._subject_consistency),
            "background_consistency": (clip, self._background_consistency),
            "aesthetic_quality": (head, self._aesthetic_quality),
            "motion_fidelity": ("" if self.cotracker else "no CoTracker was given", self._motion_fidelity),
            "motion_smoothness": ("" if self.amt else "no AMT was given", self._motion_smoothness),
        }

    def _images(self, video: Video) -> encoders.Features:
        assert self.clip is not None
        if video.clip_images is None:
            video.clip_images = self.clip.images(video.frames)
        return video.clip_images

    def _text_similarity(self, video: Video) -> float:
        assert self.clip is not None
        return encoders.text_similarity(self._images(video), self.clip.text(video.prompt))

    def _subject_consistency(self, video: Video) -> float:
        assert self.dino is not None
        return encoders.vbench_consistency(self.dino.images(video.frames))

    def _background_consistency(self, video: Video) -> float:
        assert self.clip is not None
        return encoders.vbench_consistency(self.clip.images(video.frames, antialias=False))

    def _aesthetic_quality(self, video: Video) -> float:
        assert self.aesthetic_clip is not None and self.aesthetic_head is not None
        return self.aesthetic_head.score(self.aesthetic_clip.images(video.frames, antialias=False))

    def _motion_fidelity(self, video: Video) -> float:
        assert self.cotracker is not None
        if video.reference.fidelity_tracks is None:
            video.reference.fidelity_tracks = self.cotracker.tracks(video.reference.frames)
        return noncommercial.fidelity(self.cotracker.tracks(video.frames), video.reference.fidelity_tracks)

    def _motion_smoothness(self, video: Video) -> float:
        assert self.amt is not None
        return self.amt.smoothness(video.frames)
