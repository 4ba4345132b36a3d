"""METHODS: name -> Method, the registry that everything else reads.

A method is what guides the sampling (or nothing) and where the sampling starts. `METHODS["fastvmt"]()` gives the recommended
settings; presets and single settings can be changed: `METHODS["fastvmt"](preset="paper", guidance={"inner": 5})`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vmt_core.adapters.settings import FollowYourMotion
from vmt_core.guidance import Guidance
from vmt_core.motion.amf import FullAMF, WindowedAMF

PRESETS = ("default", "paper", "nano")  # of the guided methods; tuned ones also have `code`
#: Bumped whenever a change of this package alters the videos: part of every row's identity.
VIDEO_VERSION = 5

Group = Mapping[str, Any] | None


class Start(BaseModel):
    """Where sampling starts: pure noise, or (sdedit) the reference noised to the first sigma of a schedule from `strength`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["noise", "sdedit"] = "noise"
    strength: float | None = Field(
        default=None, gt=0, lt=1, description="sdedit: u of the first step; 1 would be pure noise"
    )

    @model_validator(mode="after")
    def _says_what_it_does(self) -> Self:
        if self.kind == "sdedit" and self.strength is None:
            raise ValueError(
                "kind: sdedit needs a strength below 1, such as 0.8; at 1 nothing of the reference is left"
            )
        if self.kind == "noise" and self.strength is not None:
            raise ValueError(f"strength={self.strength:g} needs kind: sdedit")
        return self


class AdapterUse(BaseModel):
    """An adapter that is tuned on each reference: how it is made, and how strong it is when videos are made with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tuning: FollowYourMotion
    spatial_scale: float = Field(
        default=0.0, ge=0, le=2, description="0: the prompt alone says how it looks; 1: as the reference does"
    )
    temporal_scale: float = Field(default=1.0, ge=0, le=2)


class Method(BaseModel):
    """A way to transfer motion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    guidance: Guidance | None = None
    adapter: AdapterUse | None = None
    start: Start = Start()

    def settings(self) -> dict[str, Any]:
        """Every setting, JSON-able, such that `METHODS[name](**settings)` is this method again."""
        groups: dict[str, Any] = {"start": self.start.model_dump(mode="json")}
        if self.guidance is not None:
            groups["guidance"] = self.guidance.model_dump(mode="json", exclude={"objective"})
            groups["objective"] = self.guidance.objective.model_dump(mode="json")
        if self.adapter is not None:
            groups["adapter"] = self.adapter.model_dump(mode="json")
        return groups


def fastvmt(preset: str = "default", *, objective: Group = None, guidance: Group = None, start: Group = None) -> Method:
    """FastVMT (arXiv 2602.05551): windowed AMF, 10 updates a guided step with a gradient at every third."""
    objectives: dict[str, dict[str, Any]] = {
        "default": {},
        "paper": {"temperature": 1.0, "drift": "absolute"},
        "nano": {"block": 5, "window": 9},
    }
    guidances: dict[str, dict[str, Any]] = {
        "paper": {"level": "step"},
        "nano": {"learning_rate": (0.006, 0.004), "span": 0.4},
    }
    return Method(
        name="fastvmt",
        guidance=Guidance(
            objective=WindowedAMF(**_choose(objectives, preset, objective)), **_choose(guidances, preset, guidance)
        ),
        start=Start(**_choose({}, preset, start)),
    )


def ditflow(preset: str = "default", *, objective: Group = None, guidance: Group = None, start: Group = None) -> Method:
    """DiTFlow (arXiv 2412.07776): AMF over all frame pairs, 5 updates a guided step, each with its own gradient."""
    objectives: dict[str, dict[str, Any]] = {"default": {}, "paper": {"reference": "hard"}, "nano": {"block": 5}}
    guidances: dict[str, dict[str, Any]] = {"nano": {"learning_rate": (0.012, 0.008), "span": 0.4}}
    defaults = {"inner": 5, "interval": 1, "learning_rate": (0.002, 0.001), "decay": "outer"}
    return Method(
        name="ditflow",
        guidance=Guidance(
            objective=FullAMF(**_choose(objectives, preset, objective)),
            **(defaults | _choose(guidances, preset, guidance)),
        ),
        start=Start(**_choose({}, preset, start)),
    )


def follow_your_motion(
    preset: str = "default",
    *,
    adapter: Group = None,
    objective: Group = None,
    guidance: Group = None,
    start: Group = None,
) -> Method:
    """Follow-Your-Motion (arXiv 2506.05207): spatial, then temporal LoRA, tuned on each reference.

    With `guidance` or `objective` (an empty one will do) sampling is guided as by `fastvmt`, too.
    """
    values = dict(adapter or {})
    if preset in ("paper", "code"):  # both keep the reference's looks
        values.setdefault("spatial_scale", 1.0)
    if not isinstance(tuning := values.get("tuning", {}), Mapping):
        raise ValueError(f"adapter.tuning is {tuning!r}; it must hold settings by name")
    values["tuning"] = FollowYourMotion.preset(preset, **tuning)
    guided = None
    if objective is not None or guidance is not None:
        guided = fastvmt("default" if preset == "code" else preset, objective=objective, guidance=guidance).guidance
    return Method(
        name="follow_your_motion", adapter=AdapterUse(**values), guidance=guided, start=Start(**dict(start or {}))
    )


def none(preset: str = "default", *, start: Group = None) -> Method:
    """Plain sampling, what the prompt alone gives: the baseline of every comparison."""
    return Method(name="none", start=Start(**_choose({}, preset, start)))


METHODS: dict[str, Callable[..., Method]] = {
    "fastvmt": fastvmt,
    "ditflow": ditflow,
    "follow_your_motion": follow_your_motion,
    "none": none,
}


def build(name: str, settings: Mapping[str, Any]) -> Method:
    """The method of a name with settings by group, as a manifest row holds them.

    Raises:
        ValueError: no such method, group or setting, or a wrong value; one line that names it.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is not one of {', '.join(sorted(METHODS))}")
    known = [group for group in inspect.signature(METHODS[name]).parameters if group != "preset"]
    for group, values in settings.items():
        if group != "preset" and group not in known:
            raise ValueError(f"method {name}: {group!r} is not one of its groups, {', '.join(known)}")
        if group != "preset" and not (values is None or isinstance(values, Mapping)):
            raise ValueError(f"method {name}: {group} is {values!r}; it must hold settings by name")
        if group == "guidance" and "objective" in (values or {}):
            raise ValueError(f"method {name}: objective is a group of its own, beside guidance")
    try:
        return METHODS[name](**settings)
    except ValidationError as error:
        faults = "; ".join(": ".join([*map(str, fault["loc"]), fault["msg"]]) for fault in error.errors())
        raise ValueError(f"method {name}: {faults}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {name}: {error}") from error


def _choose(presets: Mapping[str, dict[str, Any]], preset: str, overrides: Group) -> dict[str, Any]:
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    return presets.get(preset, {}) | dict(overrides or {})
