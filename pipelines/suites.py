"""Benchmarks as references with prompts: the procedural one, and folders of clips with captions."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from random import Random
from typing import get_args

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ValidationError

from pipelines.references import references
from pipelines.storage import Storage, join
from schemas import Reference, UsageError, first_fault
from vmt_core import video
from vmt_core.world import Scene, appearance
from vmt_core.world.spec import Background, BackgroundColour, Colour, ShapeName


class _Beside(BaseModel):
    """What a `<clip>.json` says of its clip."""

    caption: str | None = None
    category: str | None = None
    prompts: list[str]


def other_looks(scene: Scene, number: int, random: Random) -> list[str]:
    """Captions of the same kinds of bodies with other shapes, colours and background."""
    grounds = [name for name in get_args(BackgroundColour) if name != scene.background.colour]
    taken = {body.colour for body in scene.bodies}
    found: list[str] = []
    while len(found) < number:
        colours = random.sample([name for name in get_args(Colour) if name not in taken], len(scene.bodies))
        bodies = tuple(
            body.model_copy(
                update={"colour": colour}
                | ({"shape": random.choice(get_args(ShapeName))} if body.kind == "object" else {})
            )
            for body, colour in zip(scene.bodies, colours, strict=True)
        )
        background = Background(**{**scene.background.model_dump(), "colour": random.choice(grounds)})
        caption = appearance(scene.model_copy(update={"bodies": bodies, "background": background}))
        if caption not in found:
            found.append(caption)
    return found


_DAVIS_SIZE = "480p"  # that of its protocols, where there are several


def davis(storage: Storage, uri: str, output: str, *, fps: float = 24.0) -> list[Reference]:
    """A DAVIS folder (`JPEGImages/<resolution>/<name>/00000.jpg …`): its sequences as videos below `output`, the same every time.

    Captions and prompts are not part of DAVIS: each sequence's name is its caption.

    Raises:
        UsageError: no frames there, several sizes and none of 480p, or a frame that cannot be read.
    """
    sizes: dict[str, dict[str, list[str]]] = {}
    for name in storage.find(join(uri, "JPEGImages")):
        if name.lower().endswith((".jpg", ".jpeg")):
            folder, sequence, _ = name.rsplit("/", 2)
            sizes.setdefault(folder.rsplit("/", 1)[1], {}).setdefault(sequence, []).append(name)
    if not sizes:
        raise UsageError(f"--clips {uri}: no JPEGImages/…/*.jpg below it")
    if len(sizes) > 1 and _DAVIS_SIZE not in sizes:
        raise UsageError(f"--clips {uri}: has JPEGImages of {', '.join(sorted(sizes))}, none of them {_DAVIS_SIZE}")
    frames = sizes[_DAVIS_SIZE] if len(sizes) > 1 else next(iter(sizes.values()))
    found = []
    for name, files in sorted(frames.items()):
        target = join(output, f"{name}.mp4")
        if not storage.exists(target):
            images = [_image(storage, file) for file in sorted(files)]
            if len({image.shape for image in images}) > 1:
                raise UsageError(f"{uri}: the frames of {name} differ in size")
            with tempfile.TemporaryDirectory(prefix="vmt-") as scratch:
                local = Path(scratch) / "clip.mp4"
                clip = torch.stack(images)
                video.write(
                    local, clip[:, :, : clip.shape[2] // 2 * 2, : clip.shape[3] // 2 * 2].contiguous(), fps, crf=12
                )
                storage.put(local, target)
        found.append(Reference(uri=target, caption=name.replace("-", " "), category="davis"))
    return found


def _image(storage: Storage, uri: str) -> torch.Tensor:
    try:
        pixels = np.asarray(Image.open(io.BytesIO(storage.read(uri))).convert("RGB"))
    except OSError as error:
        raise UsageError(f"{uri}: not an image: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def folder(storage: Storage, uri: str, output: str) -> list[Reference]:
    """A table of references, a folder of clips with `<clip>.json` beside each ({"caption", "category", "prompts": […]}), or DAVIS.

    Raises:
        UsageError: no clips there, or a JSON file that says something else.
    """
    if not uri:
        raise UsageError("--clips: suite folder needs a folder or a table of references")
    found = davis(storage, uri, output) if storage.is_folder(join(uri, "JPEGImages")) else references(storage, uri)
    done = []
    for reference in found:
        beside = reference.uri.rsplit(".", 1)[0] + ".json"
        if reference.prompts is None and storage.exists(beside):
            try:
                about = _Beside.model_validate_json(storage.read(beside))
            except ValidationError as error:
                what = '{"caption", "category", "prompts": […]}'
                raise UsageError(f"{beside}: not {what}: {first_fault(error)}") from error
            said = {"caption": about.caption, "category": about.category, "prompts": "\n".join(about.prompts)}
            reference = reference.model_copy(update={name: value for name, value in said.items() if value is not None})
        done.append(reference)
    return done
