"""Procedural clips as a dataset: seeds -> scenes -> mp4 and Parquet, by Ray Data tasks that each commit a block of clips.

    OUT/videos/split=train/<clip_id>.mp4
    OUT/references/split=train/category=…/<first seed>-<clips>.parquet     written after its videos: what it lists is done
    OUT/run/{settings,summary}.json

A clip follows from its seed and the settings, so a block that is made twice overwrites itself.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import TaskPoolStrategy

from pipelines import cluster, lock, parquet, progress
from pipelines.cluster import RunFailed
from pipelines.storage import Storage, absolute, join, sha256
from schemas import SynthesizeSettings, UsageError, WorldClip
from vmt_core import video
from vmt_core.world import captions
from vmt_core.world.motion import cameras
from vmt_core.world.render import grid_points, render, tracks
from vmt_core.world.sample import MOTIONS, sample, split
from vmt_core.world.spec import WORLD_VERSION, Category, Scene

PARTITIONS = ("split", "category")
#: Columns beside the scalars of WorldClip, each flattened row by row from the shape in brackets.
ARRAYS: dict[str, pa.DataType] = {
    "tracks": pa.list_(pa.float32()),  # (frames, points, 2): x, y in pixels
    "visible": pa.list_(pa.bool_()),  # (frames, points)
    "track_body": pa.list_(pa.int8()),  # (points): index of the body, -1 the background
    "camera": pa.list_(pa.float32()),  # (frames, 3, 3): background plane to image, in units of the shorter side
}
#: Settings that decide a clip: one output holds clips of one kind.
_DECIDES = ("categories", "height", "width", "frames", "fps", "track_spacing")


def run(settings: SynthesizeSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Makes the missing clips; returns the summary that it also writes to OUT/run/summary.json.

    Raises:
        UsageError: what was asked cannot be made, or OUT holds clips of another kind.
        RunFailed: it stopped before its end; the same command goes on from there.
    """
    if not settings.categories or (unknown := [name for name in settings.categories if name not in MOTIONS]):
        wrong = repr(unknown[0]) if settings.categories else "none"
        raise UsageError(f"--categories: {wrong} is not one of {', '.join(MOTIONS)}")
    storage, began = Storage(settings.storage), time.monotonic()
    settings = settings.model_copy(update={"output": absolute(settings.output)})
    with lock.held(storage, join(settings.output, "run", "lock.json")):
        _claim(settings, storage)
        wanted = seeds(settings)
        done = _done(settings, storage)
        missing = [seed for seed in wanted if seed not in done]
        say(f"{len(wanted)} clips wanted, {len(wanted) - len(missing)} done before, {len(missing)} to make now")
        if missing:
            _make(settings, missing, say)
        left = len(set(wanted) - _done(settings, storage).keys()) if missing else 0
        seconds = time.monotonic() - began
        summary = {
            "wanted": len(wanted),
            "made": len(missing) - left,
            "left": left,
            "seconds": round(seconds, 3),
            "clips_per_minute": round(60 * len(missing) / seconds, 1),
            "by_split": dict(Counter(split(seed) for seed in wanted)),
            "by_category": dict(Counter(category_of(seed, settings) for seed in wanted)),
            "world_version": WORLD_VERSION,
        }
        storage.write(join(settings.output, "run", "summary.json"), json.dumps(summary, indent=2).encode())
    if left:
        raise RunFailed(f"{left} clips are missing; the same command makes them")
    say(f"{len(wanted)} clips, {len(missing)} of them made in {progress.duration(seconds)}")
    say(f"references  {join(settings.output, 'references')}")
    return summary


def seeds(settings: SynthesizeSettings) -> list[int]:
    """The seeds of the clips: from `seed` on, of the split."""
    chosen = (seed for seed in count(settings.seed) if settings.split in ("all", split(seed)))
    return list(islice(chosen, settings.count))


def category_of(seed: int, settings: SynthesizeSettings) -> Category:
    """The categories in turn, within each split too."""
    name = settings.categories[(seed + seed // 20) % len(settings.categories)]
    return name  # type: ignore[return-value]


def scene_of(seed: int, settings: SynthesizeSettings) -> Scene:
    """The scene of a seed under these settings."""
    return sample(
        seed,
        category=category_of(seed, settings),
        frames=settings.frames,
        height=settings.height,
        width=settings.width,
        fps=settings.fps,
    )


def clip_id(scene: Scene) -> str:
    """Digest of a scene."""
    return hashlib.sha256(f"{WORLD_VERSION}:{scene.model_dump_json()}".encode()).hexdigest()[:32]


def uri_of(scene: Scene, settings: SynthesizeSettings) -> str:
    """Where the video of a scene lies."""
    return join(absolute(settings.output), "videos", f"split={split(scene.seed)}", f"{clip_id(scene)}.mp4")


def _claim(settings: SynthesizeSettings, storage: Storage) -> None:
    """Refuses an output that holds clips of another kind."""
    uri = join(settings.output, "run", "settings.json")
    mine = settings.model_dump(mode="json") | {"world_version": WORLD_VERSION}
    if storage.exists(uri):
        before = {"world_version": WORLD_VERSION} | json.loads(storage.read(uri))
        for name in (*_DECIDES, "world_version"):
            if before.get(name) != mine[name]:
                raise UsageError(
                    f"--output {settings.output}: holds clips of {name}={before.get(name)}, not {mine[name]}; take another folder"
                )
    storage.write(uri, json.dumps(mine, indent=2).encode())


def _done(settings: SynthesizeSettings, storage: Storage) -> dict[int, str]:
    """Seeds that are in the dataset, with their files."""
    found = {}
    for name in parquet.files(storage, join(settings.output, "references")):
        filesystem, path = storage.arrow(name)  # tracks are megabytes: of a column alone
        for seed in pq.ParquetFile(path, filesystem=filesystem).read(columns=["seed"])["seed"].to_pylist():
            found[seed] = name
    return found


def _make(settings: SynthesizeSettings, missing: list[int], say: Callable[[str], None]) -> None:
    groups: dict[tuple[str, str], list[int]] = {}
    for seed in missing:
        groups.setdefault((split(seed), category_of(seed, settings)), []).append(seed)
    size = settings.rows_per_block
    blocks = [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]
    with cluster.connected(settings.ray, (settings.render,)):
        cluster.quiet_data()
        data = ray.data.from_items([{"seeds": block} for block in blocks], override_num_blocks=len(blocks)).map_batches(
            _block,
            fn_kwargs={"settings": settings},
            batch_size=1,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=settings.render.max_actors or settings.render.actors),
            num_cpus=settings.render.cpus,
            num_gpus=settings.render.gpus,
            memory=settings.render.memory_gib * 2**30 if settings.render.memory_gib else None,
        )
        made, began, told = 0, time.monotonic(), time.monotonic()
        try:
            for row in data.iter_rows():
                made += row["clips"]
                now = time.monotonic()
                if now - told >= settings.progress_s:
                    rate = made / (now - began)
                    say(
                        f"{made}/{len(missing)} clips · {60 * rate:,.0f} clips/min · "
                        f"{progress.duration((len(missing) - made) / rate)} left"
                    )
                    told = now
        except (ray.exceptions.RayError, OSError) as error:
            raise RunFailed(f"{cluster.reason(error)[:500]}; the same command goes on from here") from error


def _block(batch: pa.Table, settings: SynthesizeSettings) -> pa.Table:
    """Makes the clips of some seeds of one split and category: the videos first, then their rows."""
    torch.set_num_threads(settings.render.threads or max(1, int(settings.render.cpus)))
    storage = Storage(settings.storage)
    (block,) = batch["seeds"].to_pylist()
    with tempfile.TemporaryDirectory(prefix="vmt-") as folder, ThreadPoolExecutor(max_workers=4) as uploads:
        pending = []
        rows = []
        for seed in block:
            scene = scene_of(seed, settings)
            local = Path(folder) / f"{seed}.mp4"
            tags = {"scene": scene.model_dump_json()}
            video.write(
                local, render(scene), scene.fps, tags=tags, crf=settings.video.crf, preset=settings.video.preset
            )
            video.verify(local, frames=scene.frames, height=scene.height, width=scene.width)
            row = _row(scene, seed, local, settings)
            pending.append(uploads.submit(storage.put, local, row["uri"]))
            rows.append(row)
        for upload in pending:
            upload.result()
    place = [f"{name}={rows[0][name]}" for name in PARTITIONS]
    table = pa.Table.from_pylist(rows, schema=schema()).drop_columns(list(PARTITIONS))
    parquet.write(storage, join(settings.output, "references", *place, f"{block[0]:012d}-{len(block)}.parquet"), table)
    return pa.table({"clips": [len(rows)]})


def schema() -> pa.Schema:
    """Of the dataset: the scalars of WorldClip, then ARRAYS."""
    scalars = WorldClip.arrow_schema()
    return pa.schema([*scalars, *(pa.field(name, kind) for name, kind in ARRAYS.items())])


def _row(scene: Scene, seed: int, local: Path, settings: SynthesizeSettings) -> dict[str, Any]:
    clip = WorldClip(
        uri=uri_of(scene, settings),
        clip_id=clip_id(scene),
        seed=seed,
        split=split(seed),
        category=scene.category,
        motion=scene.motion,
        caption=captions.appearance(scene),
        motion_caption=captions.motion_caption(scene),
        scene=scene.model_dump_json(),
        height=scene.height,
        width=scene.width,
        frames=scene.frames,
        video_bytes=local.stat().st_size,
        video_sha256=sha256(local),
    )
    paths = tracks(scene, grid_points(scene.height, scene.width, settings.track_spacing))
    return clip.model_dump() | {
        "tracks": paths.points.flatten().numpy(),
        "visible": paths.visible.flatten().numpy(),
        "track_body": paths.body.numpy(),
        "camera": cameras(scene).float().flatten().numpy(),
    }
