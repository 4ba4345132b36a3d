"""References x prompts x seeds x methods -> a manifest. Every clip is opened now, so that no run stops over it later."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import product
from typing import Any

from pydantic import ValidationError

from pipelines import adapters, manifest, models, progress
from pipelines.references import Clip, open_all, references
from pipelines.storage import Storage, StorageUnavailable, absolute, describe, join
from schemas import ManifestRow, PlanSettings, Reference, UsageError, first_fault
from vmt_core import flops
from vmt_core.backbone import nano
from vmt_core.backbone.geometry import Geometry
from vmt_core.backbone.taps import CheckpointName
from vmt_core.methods import VIDEO_VERSION, Method, build
from vmt_core.presets import Native, native

_BITS_PER_PIXEL = 0.2  # H.264 at crf 18, about
_SHOWN_BAD = 20
_LEFT_OUT = "_left_out.csv"  # readers of Parquet folders pass over names that begin so


def run(settings: PlanSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Writes the manifest; returns its counts and its estimate.

    Raises:
        UsageError: one line per fault; nothing was written.
    """
    storage = Storage(settings.storage)
    defaults = native(settings.model)
    methods = methods_of(settings, defaults)
    prompts = _prompts(storage, settings.prompts) if settings.prompts else []
    if not settings.seeds:
        raise UsageError("--seeds: give at least one")
    if repeated := [seed for seed, count in Counter(settings.seeds).items() if count > 1]:
        raise UsageError(f"--seeds: {repeated[0]} stands twice")
    if storage.exists(settings.output) and not storage.is_folder(settings.output):
        raise UsageError(f"--output {settings.output}: is a file; a manifest is a folder")
    try:
        revision, config = models.revision(settings.model, storage), models.config(settings.model, storage)
    except FileNotFoundError as error:
        raise UsageError(f"--model {error}") from error
    _blocks_exist(methods, config)
    replaced = manifest.parts(storage, settings.output)
    most = settings.limits.max_prompt_chars
    if len(settings.negative_prompt) > most:
        raise UsageError(
            f"--negative-prompt: has {len(settings.negative_prompt):,} characters, limits.max_prompt_chars is {most:,}"
        )
    for method in methods:
        if method.adapter is not None:
            adapters.check_head_file(storage, method.adapter.tuning, settings.limits.schemes)
    found = references(storage, settings.references)
    _captions(settings, methods, found)
    for reference in found:
        _asked(reference, prompts, most)
    clips, bad = open_all(storage, settings, found, say)
    for _, error in bad[:_SHOWN_BAD]:
        say(f"bad clip: {error.code}: {error.message}")
    if len(bad) > _SHOWN_BAD:
        say(f"… and {len(bad) - _SHOWN_BAD} more bad clips")
    if bad and not settings.skip_bad:
        raise UsageError(
            f"{len(bad)} of {len(found)} clips cannot be used; mend them, or leave them out with --skip-bad"
        )
    if not clips:
        raise UsageError(f"--references {settings.references}: no usable clip")
    asked = [_asked(clip.reference, prompts, most) for clip in clips]
    common = {
        "model": settings.model,
        "model_revision": revision,
        "video_version": VIDEO_VERSION,
        "dtype": settings.dtype or defaults.dtype,
        "negative_prompt": settings.negative_prompt,
        "steps": settings.steps or defaults.steps,
        "shift": settings.shift or defaults.shift,
        "guidance_scale": settings.guidance_scale if settings.guidance_scale is not None else defaults.guidance_scale,
    }
    rows = [
        _row(clip, method, prompt, seed, settings, defaults, common)
        for clip, own in zip(clips, asked, strict=True)
        for method in methods
        for prompt in own
        for seed in settings.seeds
    ]
    rows, repeated = _once(rows, settings.skip_bad)
    before = manifest.ids(storage, replaced)
    if before - {row.sample_id for row in rows}:
        say(f"replaces a manifest of {len(before):,} other rows")
    try:
        manifest.write(storage, settings.output, rows)
    except StorageUnavailable:
        raise
    except OSError as error:
        raise UsageError(f"--output {settings.output}: cannot be written ({describe(error)})") from error
    left_out = [(reference.uri, error.code.value, error.message) for reference, error in bad]
    left_out += [(uri, "duplicate", f"the same clip as {other}") for uri, other in repeated.items()]
    if left_out:
        storage.write(join(settings.output, _LEFT_OUT), _csv([("uri", "code", "message"), *left_out]))
    else:
        storage.delete(join(settings.output, _LEFT_OUT))  # of an older plan
    estimate = _estimate(rows, methods, config, native(settings.model).checkpoint)
    counts = {
        "rows": len(rows),
        "references": len({(row.reference_uri, row.start_frame, row.end_frame, row.fps) for row in rows}),
        "bad": len(left_out),
        "prompts": len({row.prompt for row in rows}),
    }
    each = {len(own) for own in asked}
    say(
        f"{len(rows)} rows = {counts['references']} references x {'-'.join(map(str, sorted(each)))} prompts x {len(settings.seeds)} seeds "
        f"x {len(methods)} methods ({', '.join(dict.fromkeys(method.name for method in methods))})"
        + (f"; {len(left_out)} clips left out: {join(settings.output, _LEFT_OUT)}" if left_out else "")
    )
    say(
        f"estimate: {estimate['evaluations']:,} guidance gradients, {estimate['flops']:.3g} FLOPs, "
        f"{progress.gpu_time(estimate['flops'], settings.tflops)} (the denoiser alone), about {progress.size(estimate['bytes'])} of video"
    )
    longest = settings.frames or defaults.frames
    if shorter := Counter(row.frames for row in rows if row.frames < longest):
        told = ", ".join(f"{count:,} of {frames}" for frames, count in sorted(shorter.items()))
        say(f"note: clips too short for {longest} frames give fewer: {told}")
    if settings.model == nano.NAME:
        say(f"note: {nano.NOTICE}")
    if wanted := {row.adapter_id for row in rows if row.adapter_id}:
        say(f"note: {len(wanted)} adapters are needed: jobs/tune.py makes them, or jobs/transfer.py --tune")
    say(f"manifest  {settings.output}")
    return counts | estimate


def _prompts(storage: Storage, uri: str) -> list[str]:
    if uri.lower().endswith((".csv", ".tsv", ".jsonl", ".parquet")):
        raise UsageError(
            f"--prompts {uri}: is a table; prompts are a text file, one a line. Clips of a references table may have "
            "their own, in a column prompts"
        )
    try:
        text = storage.read(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"--prompts {uri}: no such file") from error
    except IsADirectoryError as error:
        raise UsageError(f"--prompts {uri}: is a folder; give a text file, one prompt a line") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {uri}: not UTF-8 text ({error})") from error
    prompts = _vbench(uri, text) if uri.endswith(".json") else _lines(text)
    if not prompts:
        raise UsageError(f"--prompts {uri}: no prompt in it; one a line")
    if repeated := [prompt for prompt, count in Counter(prompts).items() if count > 1]:
        raise UsageError(f"--prompts {uri}: {repeated[0]!r} stands {Counter(prompts)[repeated[0]]} times")
    return prompts


def _lines(text: str) -> list[str]:
    """Those that say something; a prompt may hold what `splitlines` takes for their end."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def _vbench(uri: str, text: str) -> list[str]:
    """Prompts of a list as VBench has them: `[{"prompt_en": "…", …}, …]`."""
    try:
        return [prompt for entry in json.loads(text) for prompt in _lines(str(entry["prompt_en"]))]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'--prompts {uri}: not a list of {{"prompt_en": "…"}}: {type(error).__name__} {error}'
        ) from error


def _captions(settings: PlanSettings, methods: list[Method], found: list[Reference]) -> None:
    """Refuses clips that a method cannot be tuned on, unless bad ones may be left out; then their rows fail, and say so."""
    tuned = [method.name for method in methods if method.adapter is not None]
    bare = [reference.uri for reference in found if not (reference.caption or "").strip()]
    if tuned and bare and not settings.skip_bad:
        raise UsageError(
            f"{bare[0]}{f' and {len(bare) - 1} more' if len(bare) > 1 else ''}: no caption, which {tuned[0]} is tuned with; "
            "give captions in a references table (column caption), or plan other methods"
        )


def _asked(reference: Reference, prompts: list[str], most: int) -> list[str]:
    """The prompts of a clip: those of all, and its own.

    Raises:
        UsageError: there are none, or one is longer than `most` characters.
    """
    own = _lines(reference.prompts or "")
    if not prompts and not own:
        raise UsageError(
            f"{reference.uri}: has no prompts; give --prompts FILE, or a column `prompts` in the references table"
        )
    asked = list(dict.fromkeys([*prompts, *own]))
    if long := [prompt for prompt in asked if len(prompt) > most]:
        raise UsageError(
            f"{reference.uri}: a prompt of {len(long[0]):,} characters, limits.max_prompt_chars is {most:,}: {long[0]:.60}…"
        )
    return asked


def methods_of(settings: PlanSettings, defaults: Native) -> list[Method]:
    """The methods of a plan, one for each combination of swept settings.

    Raises:
        UsageError: an unknown one, or a setting that it does not have.
    """
    if unknown := settings.method_settings.keys() - set(settings.methods):
        raise UsageError(f"method_settings: {sorted(unknown)[0]!r} is not among --methods {','.join(settings.methods)}")
    if not settings.methods or len(set(settings.methods)) < len(settings.methods):
        raise UsageError(f"--methods {','.join(settings.methods)}: one or more, each once")
    preset = settings.preset or defaults.preset
    if unknown := settings.sweep.keys() - set(settings.methods):
        raise UsageError(f"sweep: {sorted(unknown)[0]!r} is not among --methods {','.join(settings.methods)}")
    for name, swept in settings.sweep.items():
        for path, values in swept.items():
            if not values or any(values.count(value) > 1 for value in values):
                raise UsageError(f"sweep: {name}: {path}: {values} must be one value or more, each once")
    try:
        methods = [
            build(name, {"preset": preset} | variant)
            for name in settings.methods
            for variant in _variants(settings.method_settings.get(name, {}), settings.sweep.get(name, {}))
        ]
    except ValueError as error:
        raise UsageError(str(error)) from error
    made = Counter((method.name, _settings(method)) for method in methods)
    if twice := [name for (name, _), count in made.items() if count > 1]:
        raise UsageError(f"sweep: {twice[0]}: some of its values mean the same settings")
    return methods


def _variants(settings: dict[str, Any], sweep: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The settings with every combination of the swept values; `guidance.inner` is `inner` within group `guidance`."""
    for values in product(*sweep.values()):
        varied = deepcopy(settings)
        for path, value in zip(sweep, values, strict=True):
            *groups, name = path.split(".")
            place = varied
            for group in groups:
                place = place.setdefault(group, {})
                if not isinstance(place, dict):
                    raise ValueError(f"sweep: {path}: {group} is {place!r} in method_settings, no group of settings")
            place[name] = value
        yield varied


def _blocks_exist(methods: list[Method], config: dict[str, Any]) -> None:
    for method in methods:
        block = max((tap.block for tap in method.guidance.objective.taps), default=0) if method.guidance else 0
        if block >= config["num_layers"]:
            raise UsageError(
                f"{method.name} reads block {block}, but the model has blocks 0..{config['num_layers'] - 1}; "
                "use --preset nano, or method_settings with another objective.block"
            )


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
    taken = {
        "reference_digest": clip.digest,
        "start_frame": reference.start_frame,
        "end_frame": reference.end_frame,
        "fps": clip.fps,
        "height": settings.height or defaults.height,
        "width": settings.width or defaults.width,
        "frames": clip.frames,
    }
    try:
        return ManifestRow.planned(
            **common,
            **taken,
            reference_uri=absolute(reference.uri),
            prompt=prompt,
            method=method.name,
            method_settings=_settings(method),
            seed=seed,
            adapter_id=adapters.identity(method, caption=reference.caption or "", **common, **taken),
            caption=reference.caption,
            category=reference.category,
            licence=reference.licence,
        )
    except ValidationError as error:
        raise UsageError(first_fault(error)) from error


def _settings(method: Method) -> str:
    """A method's settings as a manifest row holds them."""
    return json.dumps(method.settings(), sort_keys=True, separators=(",", ":"))


def _once(rows: list[ManifestRow], skip: bool) -> tuple[list[ManifestRow], dict[str, str]]:
    """The rows without those that stand there already, and the clips of the latter, each with the one that it repeats.

    Raises:
        UsageError: there are some, and they are not to be left out.
    """
    first: dict[str, ManifestRow] = {}
    repeated: dict[str, str] = {}
    for row in rows:
        other = first.setdefault(row.sample_id, row)
        if other is not row:
            repeated[row.reference_uri] = other.reference_uri
    if skip:  # with prompts of its own it stays
        for row in first.values():
            repeated.pop(row.reference_uri, None)
    if repeated and not skip:
        (one, other_uri), more = next(iter(repeated.items())), len(repeated) - 1
        raise UsageError(
            f"{one} and {other_uri} are the same clip{f', and so are {more} more' if more else ''}; leave one of them out, or let "
            "--skip-bad do it"
        )
    return list(first.values()), repeated


def _csv(lines: Iterable[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    return text.getvalue().encode(errors="backslashreplace")  # names of files may be no Unicode


def _estimate(
    rows: list[ManifestRow], methods: list[Method], config: dict[str, Any], policy: CheckpointName
) -> dict[str, Any]:
    """Guidance gradients, FLOPs of the denoiser, bytes of video."""
    by_settings = {_settings(method): method for method in methods}
    patch = config["patch_size"]
    total, evaluations, size = 0.0, 0, 0.0
    shapes = Counter(
        (row.method_settings, row.frames, row.height, row.width, row.steps, row.guidance_scale) for row in rows
    )
    for (made, frames, height, width, steps, scale), count in shapes.items():
        geometry = Geometry.of_latents(((frames - 1) // 4 + 1, height // 8, width // 8), tuple(patch))
        guidance = by_settings[made].guidance
        total += count * flops.video(config, geometry, by_settings[made], steps, scale, policy)
        evaluations += count * (guidance.evaluations(steps) if guidance else 0)
        size += count * frames * height * width * _BITS_PER_PIXEL / 8
    return {"evaluations": evaluations, "flops": total, "bytes": size}
