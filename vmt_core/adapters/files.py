"""The folder of one adapter: LoRA files that any diffusers pipeline loads, and what was learnt about the heads.

spatial.safetensors, temporal.safetensors    diffusers' format, with method, stage and model revision in the metadata
head_types.json, heads.png                   types and scores of the heads
tuning.json                                  settings, loss curves, seconds; written last, so its presence means that all is there
comfyui/…, merged.safetensors                if asked for
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmt_core.adapters.masked_lora import Weights

STAGES = ("spatial", "temporal")
HEAD_TYPES, HEADS, DONE = "head_types.json", "heads.png", "tuning.json"
FORMATS = ("comfyui", "merged")


def name(stage: str) -> str:
    """File of a stage's weights."""
    return f"{stage}.safetensors"


def load(folder: Path, *, method: str, model_revision: str) -> dict[str, Weights]:
    """Weights of every stage, alpha folded in.

    Raises:
        ValueError: a file is missing, damaged, or of another method or model; says which.
    """
    from vmt_core.adapters import masked_lora  # here, because drivers need no more than the names above

    found = {}
    for stage in STAGES:
        path = folder / name(stage)
        if not path.is_file():
            raise ValueError(f"{path}: missing")
        found[stage], about = masked_lora.read(path)
        for key, wanted in {"method": method, "stage": stage, "model_revision": model_revision}.items():
            if about.get(key) != wanted:
                raise ValueError(f"{path}: its {key} is {about.get(key)!r}, wanted is {wanted!r}")
    return found


def export(folder: Path, kind: str, spatial_scale: float = 1.0) -> list[Path]:
    """Writes the adapter of a folder in another format beside it: for ComfyUI, or both stages merged into one file.

    Args:
        spatial_scale: of the spatial adapter within a merged file; 0 leaves it out, as `transfer` does by default.

    Raises:
        ValueError: no such format.
    """
    from vmt_core.adapters import masked_lora

    if kind not in FORMATS:
        raise ValueError(f"export {kind!r} is not one of {', '.join(FORMATS)}")
    parts = {stage: masked_lora.read(folder / name(stage)) for stage in STAGES}
    written = []
    if kind == "comfyui":
        (folder / kind).mkdir(exist_ok=True)
        for stage, (weights, _) in parts.items():
            written.append(folder / kind / name(stage))
            masked_lora.write_raw(masked_lora.comfy(weights), written[-1])
    else:
        scales = {"spatial": spatial_scale, "temporal": 1.0}
        chosen = [(parts[stage][0], scale) for stage, scale in scales.items() if scale]
        weights, rank = masked_lora.merged(chosen)
        about = {key: value for key, value in parts["temporal"][1].items() if key in ("method", "model_revision")}
        written.append(folder / "merged.safetensors")
        masked_lora.write(weights, written[-1], rank=rank, alpha=rank, about={**about, "stage": "merged"})
    return written
