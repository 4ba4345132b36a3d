"""References x prompts x seeds x methods -> a manifest. Every clip is opened now, so that no run stops over it later."""

from __future__ import annotations

import csv
import difflib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
from pydantic import ValidationError

from pipelines import manifest, models
from pipelines.storage import Storage, absolute, join, scheme
from schemas import ErrorCode, ManifestRow, PlanSettings, Reference, RowError, UsageError
from vmt_core import flops, video
from vmt_core.backbone import nano
from vmt_core.backbone.geometry import Geometry
from vmt_core.methods import VIDEO_VERSION, Method, build
from vmt_core.presets import Native, native

_TABLES = (".parquet", ".csv", ".jsonl")
_BITS_PER_PIXEL = 0.2  # H.264 at crf 18, about
_SHOWN_BAD = 20


@dataclass(frozen=True)
class Clip:
    """A reference that was opened."""

    reference: Reference
    digest: str
    info: video.VideoInfo


def run(settings: PlanSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Writes the manifest; returns its counts and its estimate.

    Raises:
        UsageError: one line per fault; nothing was written.
    """
    storage = Storage(settings.storage)
    defaults = native(settings.model)
    methods = _methods(settings, defaults)
    prompts = _prompts(storage, settings.prompts)
    if repeated := [seed for seed, count in Counter(settings.seeds).items() if count > 1]:
        raise UsageError(f"--seeds: {repeated[0]} stands twice")
    try:
        revision, config = models.revision(settings.model, storage), models.config(settings.model, storage)
    except FileNotFoundError as error:
        raise UsageError(f"--model {error}") from error
    _blocks_exist(methods, config)
    found = references(storage, settings.references)
    clips, bad = _open_all(storage, settings, found)
    for line in bad[:_SHOWN_BAD]:
        say(f"bad clip: {line}")
    if bad and not settings.skip_bad:
        raise UsageError(
            f"{len(bad)} of {len(found)} clips cannot be used; mend them, or leave them out with --skip-bad"
        )
    if not clips:
        raise UsageError(f"--references {settings.references}: no usable clip")
    common = {
        "model": settings.model,
        "model_revision": revision,
        "video_version": VIDEO_VERSION,
        "dtype": settings.dtype,
        "negative_prompt": settings.negative_prompt,
        "steps": settings.steps or defaults.steps,
        "shift": settings.shift or defaults.shift,
        "guidance_scale": settings.guidance_scale if settings.guidance_scale is not None else defaults.guidance_scale,
    }
    rows = [
        _row(clip, method, prompt, seed, settings, defaults, common)
        for clip in clips
        for method in methods
        for prompt in prompts
        for seed in settings.seeds
    ]
    _no_duplicates(rows)
    manifest.write(storage, settings.output, rows)
    estimate = _estimate(rows, methods, config, settings.tflops)
    counts = {"rows": len(rows), "references": len(clips), "bad": len(bad), "prompts": len(prompts)}
    say(
        f"{len(rows)} rows = {len(clips)} references x {len(prompts)} prompts x {len(settings.seeds)} seeds "
        f"x {len(methods)} methods ({', '.join(method.name for method in methods)})"
        + (f"; {len(bad)} bad clips left out" if bad else "")
    )
    say(
        f"estimate: {estimate['evaluations']:,} guidance gradients, {estimate['flops']:.3g} FLOPs, "
        f"{estimate['gpu_hours']:.3g} GPU hours at {settings.tflops:g} TFLOP/s (the denoiser alone), "
        f"about {estimate['bytes'] / 1e6:,.1f} MB of video"
    )
    if settings.model == nano.NAME:
        say(f"note: {nano.NOTICE}")
    say(f"manifest  {settings.output}")
    return counts | estimate


def references(storage: Storage, uri: str) -> list[Reference]:
    """The clips of a folder, glob, prefix, table or single file. Paths in a table count from the table's folder.

    Raises:
        UsageError: nothing there, or a table that cannot be read; says which line.
    """
    if uri.endswith(_TABLES):
        return _table(storage, uri)
    pattern = any(character in uri for character in "*?[")
    names = storage.glob(uri) if pattern else storage.find(uri)
    if not pattern and any(name.endswith(".parquet") for name in names):
        inside = join(uri, "references")  # what synthesize writes
        return _table(storage, inside if storage.is_folder(inside) else uri)
    names = [name for name in names if Path(name).suffix.lower() in video.SUFFIXES]
    if not names:
        raise UsageError(f"--references {uri}: no video there ({' '.join(sorted(video.SUFFIXES))})")
    return [Reference(uri=name) for name in names]


def _table(storage: Storage, uri: str) -> list[Reference]:
    try:
        lines = list(_lines(storage, uri))
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--references {uri}: {error}") from error
    folder = uri.rsplit("/", 1)[0] if "/" in uri else "."
    found = []
    for number, line in enumerate(lines, start=1):
        values = {name: value for name, value in line.items() if value not in (None, "")}
        try:
            reference = Reference.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(
                f"--references {uri}, row {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from error
        place = reference.uri
        if scheme(place) == "file" and not place.startswith(("/", "~", "file://")):
            place = join(folder, place)
        found.append(reference.model_copy(update={"uri": place}))
    if not found:
        raise UsageError(f"--references {uri}: has no rows")
    return found


def _lines(storage: Storage, uri: str) -> Iterable[dict[str, Any]]:
    if not uri.endswith((".csv", ".jsonl")):
        yield from _parquet(storage, uri)
        return
    text = storage.read(uri).decode("utf-8-sig")
    if uri.endswith(".csv"):
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: not JSON: {error}") from error


def _parquet(storage: Storage, uri: str) -> Iterable[dict[str, Any]]:
    """Rows of a Parquet file or of a dataset partitioned by folders; columns that say nothing of a reference are left out."""
    filesystem, path = storage.arrow(uri)
    data = ds.dataset(path, filesystem=filesystem, partitioning="hive", format="parquet")
    known = list(Reference.model_fields)
    for name in data.schema.names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if name not in known and near and near[0] not in data.schema.names:
            raise ValueError(f"column {name!r}: did you mean {near[0]!r}?")
    for batch in data.to_batches(columns=[name for name in known if name in data.schema.names]):
        yield from batch.to_pylist()


def _prompts(storage: Storage, uri: str) -> list[str]:
    try:
        text = storage.read(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"--prompts {uri}: no such file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {uri}: not UTF-8 text ({error})") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {uri}: no prompt in it; one a line")
    if repeated := [prompt for prompt, count in Counter(prompts).items() if count > 1]:
        raise UsageError(f"--prompts {uri}: {repeated[0]!r} stands {Counter(prompts)[repeated[0]]} times")
    return prompts


def _methods(settings: PlanSettings, defaults: Native) -> list[Method]:
    if unknown := settings.method_settings.keys() - set(settings.methods):
        raise UsageError(f"method_settings: {sorted(unknown)[0]!r} is not among --methods {','.join(settings.methods)}")
    if not settings.methods or len(set(settings.methods)) < len(settings.methods):
        raise UsageError(f"--methods {','.join(settings.methods)}: one or more, each once")
    preset = settings.preset or defaults.preset
    try:
        return [build(name, {"preset": preset} | settings.method_settings.get(name, {})) for name in settings.methods]
    except ValueError as error:
        raise UsageError(str(error)) from error


def _blocks_exist(methods: list[Method], config: dict[str, Any]) -> None:
    for method in methods:
        block = max((tap.block for tap in method.guidance.objective.taps), default=0) if method.guidance else 0
        if block >= config["num_layers"]:
            raise UsageError(
                f"{method.name} reads block {block}, but the model has blocks 0..{config['num_layers'] - 1}; "
                "use --preset nano, or method_settings with another objective.block"
            )


def _open_all(storage: Storage, settings: PlanSettings, found: list[Reference]) -> tuple[list[Clip], list[str]]:
    """The clips that can be used, in order, and a line for each that cannot."""

    def look(reference: Reference) -> Clip | str:
        try:
            return _open(storage, settings, reference)
        except RowError as error:
            return f"{error.code}: {error.message}"

    with ThreadPoolExecutor(max_workers=8) as pool:
        looked = list(pool.map(look, found))
    return [clip for clip in looked if isinstance(clip, Clip)], [line for line in looked if isinstance(line, str)]


def _open(storage: Storage, settings: PlanSettings, reference: Reference) -> Clip:
    limits, uri = settings.limits, reference.uri
    if scheme(uri) not in limits.schemes:
        allowed = ", ".join(limits.schemes)
        raise RowError(ErrorCode.SCHEME_FORBIDDEN, f"{uri}: its scheme is not in limits.schemes ({allowed})")
    with tempfile.TemporaryDirectory(prefix="vmt-") as folder:
        local = Path(folder) / "reference"
        try:
            digest = storage.fetch(uri, local, most_bytes=limits.max_reference_mib * 2**20)
            clip = Clip(reference, digest, video.probe(local, limits))
        except RowError as error:
            raise RowError(error.code, error.message.replace(str(local), uri)) from error
    if _frames(clip, settings, native(settings.model)) < 5:
        raise RowError(
            ErrorCode.TOO_FEW_FRAMES, f"{uri}: {clip.info.frames} frames at {clip.info.fps:g} fps give fewer than 5"
        )
    return clip


def _fps(clip: Clip, settings: PlanSettings) -> float:
    return clip.reference.fps or settings.fps or clip.info.fps


def _frames(clip: Clip, settings: PlanSettings, defaults: Native) -> int:
    reference = clip.reference
    most = settings.frames or defaults.frames
    return video.clip_frames(clip.info, reference.start_frame, reference.end_frame, _fps(clip, settings), most)


def _row(
    clip: Clip,
    method: Method,
    prompt: str,
    seed: int,
    settings: PlanSettings,
    defaults: Native,
    common: dict[str, Any],
) -> ManifestRow:
    reference = clip.reference
    try:
        return ManifestRow.planned(
            **common,
            reference_uri=absolute(reference.uri),
            reference_digest=clip.digest,
            start_frame=reference.start_frame,
            end_frame=reference.end_frame,
            fps=_fps(clip, settings),
            height=settings.height or defaults.height,
            width=settings.width or defaults.width,
            frames=_frames(clip, settings, defaults),
            prompt=prompt,
            method=method.name,
            method_settings=json.dumps(method.settings(), sort_keys=True, separators=(",", ":")),
            seed=seed,
            caption=reference.caption,
            category=reference.category,
            licence=reference.licence,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r:.60})") from error


def _no_duplicates(rows: list[ManifestRow]) -> None:
    first: dict[str, ManifestRow] = {}
    for row in rows:
        other = first.setdefault(row.sample_id, row)
        if other is not row:
            raise UsageError(f"{row.reference_uri} and {other.reference_uri} are the same clip; leave one of them out")


def _estimate(rows: list[ManifestRow], methods: list[Method], config: dict[str, Any], tflops: float) -> dict[str, Any]:
    """Guidance gradients, FLOPs of the denoiser, GPU hours at a rate, bytes of video."""
    by_name = {method.name: method for method in methods}
    patch = config["patch_size"]
    total, evaluations, size = 0.0, 0, 0.0
    shapes = Counter((row.method, row.frames, row.height, row.width, row.steps, row.guidance_scale) for row in rows)
    for (name, frames, height, width, steps, scale), count in shapes.items():
        geometry = Geometry.of_latents(((frames - 1) // 4 + 1, height // 8, width // 8), tuple(patch))
        guidance = by_name[name].guidance
        total += count * flops.video(config, geometry, by_name[name], steps, scale)
        evaluations += count * (guidance.evaluations(steps) if guidance else 0)
        size += count * frames * height * width * _BITS_PER_PIXEL / 8
    return {"evaluations": evaluations, "flops": total, "gpu_hours": total / (tflops * 1e12) / 3600, "bytes": size}
