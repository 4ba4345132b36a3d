"""References as users list them: a folder, a glob, a prefix or a table; each clip is opened before anything is made of it."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.dataset as ds
from pydantic import ValidationError

from pipelines.storage import Storage, StorageUnavailable, check_scheme, join, scheme
from schemas import ErrorCode, PlanSettings, Reference, RowError, TuneSettings, UsageError, first_fault
from vmt_core import video
from vmt_core.presets import native

_TABLES = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True)
class Clip:
    """A reference that was opened, and what is taken of it."""

    reference: Reference
    digest: str
    fps: float
    frames: int  # 4k+1


class _File(NamedTuple):
    digest: str
    info: video.VideoInfo


def references(storage: Storage, uri: str) -> list[Reference]:
    """The clips of a folder, glob, prefix, table or single file. Paths in a table count from the table's folder.

    Raises:
        UsageError: nothing there, or a table that cannot be read; says which line.
    """
    if uri.lower().endswith(_TABLES):
        return _table(storage, uri)
    pattern = any(character in uri for character in "*?[") and not storage.exists(uri)
    names = storage.glob(uri) if pattern else storage.find(uri)
    tables = [name for name in names if name.endswith(".parquet")]
    names = [name for name in names if Path(name).suffix.lower() in video.SUFFIXES and not _hidden(name)]
    inside = join(uri, "references")  # what synthesize writes
    if tables and not pattern and storage.is_folder(inside):
        return _table(storage, inside)
    if tables and not pattern and not names:
        return _table(storage, uri)
    if not names:
        raise UsageError(f"--references {uri}: no video there ({' '.join(sorted(video.SUFFIXES))})")
    return [Reference(uri=name) for name in names]


def _hidden(uri: str) -> bool:
    """As macOS leaves some beside every file."""
    return uri.rsplit("/", 1)[-1].startswith(".")


def _table(storage: Storage, uri: str) -> list[Reference]:
    try:
        lines = list(_lines(storage, uri))
    except FileNotFoundError as error:
        raise UsageError(f"--references {uri}: no such file") from error
    except (IsADirectoryError, ValueError, pa.ArrowException) as error:
        raise UsageError(f"--references {uri}: {error}") from error
    folder = uri.rsplit("/", 1)[0] if "/" in uri else "."
    found = []
    for number, line in enumerate(lines, start=1):
        values = {name: line[name] for name in Reference.model_fields if line.get(name) not in (None, "")}
        try:
            reference = Reference.model_validate(values)
        except ValidationError as error:
            raise UsageError(f"--references {uri}, row {number}: {first_fault(error)}") from error
        place = reference.uri
        if scheme(place) == "file" and not place.startswith(("/", "~", "file://")):
            place = join(folder, place)
        found.append(reference.model_copy(update={"uri": place}))
    if not found:
        raise UsageError(f"--references {uri}: has no rows")
    return found


def _lines(storage: Storage, uri: str) -> Iterable[dict[str, Any]]:
    kind = Path(uri).suffix.lower()
    if kind not in (".csv", ".jsonl"):
        yield from _parquet(storage, uri)
        return
    text = storage.read(uri).decode("utf-8-sig")
    if kind == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        _check_columns(reader.fieldnames or ())
        for number, line in enumerate(reader, start=1):
            if None in line:
                raise ValueError(f"row {number}: more cells than the header has; put quotes around a cell with a comma")
            yield line
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: not JSON: {error}") from error
            if not isinstance(values, dict):
                raise ValueError(f"line {number}: not an object: {line:.60}")
            _check_columns(list(values))
            yield values


def _parquet(storage: Storage, uri: str) -> Iterable[dict[str, Any]]:
    """Rows of a Parquet file or of a dataset partitioned by folders; columns that say nothing of a reference are left out."""
    filesystem, path = storage.arrow(uri)
    folders = "hive" if storage.is_folder(uri) else None  # folders above a file say nothing of its rows
    data = ds.dataset(path, filesystem=filesystem, partitioning=folders, format="parquet")
    _check_columns(data.schema.names)
    for batch in data.to_batches(columns=[name for name in Reference.model_fields if name in data.schema.names]):
        yield from batch.to_pylist()


def _check_columns(columns: Sequence[str]) -> None:
    """Other columns may be there, but none that is nearly one of ours, and `uri` must.

    Raises:
        ValueError: says which.
    """
    for name in columns:
        near = difflib.get_close_matches(name, list(Reference.model_fields), n=1, cutoff=0.8)
        if name not in Reference.model_fields and near and near[0] not in columns:
            raise ValueError(f"column {name!r}: did you mean {near[0]!r}?")
    if "uri" not in columns:
        hint = "; commas must separate them" if len(columns) == 1 and re.search(r"[;\t]", columns[0]) else ""
        raise ValueError(f"has no column uri, only {', '.join(columns) or 'none'}{hint}")


def open_all(
    storage: Storage, settings: PlanSettings | TuneSettings, found: list[Reference], say: Callable[[str], None]
) -> tuple[list[Clip], list[tuple[Reference, RowError]]]:
    """The clips that can be used, in order, and those that cannot, with the reason.

    Raises:
        StorageUnavailable: the storage does not answer.
    """

    def look(uri: str) -> _File | RowError:
        try:
            return _open(storage, settings, uri)
        except RowError as error:
            if error.code.transient:  # that says nothing of the clip
                raise StorageUnavailable(error.message) from error
            return error

    files, told = {}, time.monotonic()
    names = list(dict.fromkeys(reference.uri for reference in found))  # of a long film many ranges may be taken
    with ThreadPoolExecutor(max_workers=8) as pool:
        for uri, file in zip(names, pool.map(look, names), strict=True):
            files[uri] = file
            if time.monotonic() - told > settings.progress_s:
                told = time.monotonic()
                say(f"{len(files)}/{len(names)} clips opened")
    looked = [_taken(settings, reference, files[reference.uri]) for reference in found]
    return [clip for clip in looked if isinstance(clip, Clip)], [bad for bad in looked if not isinstance(bad, Clip)]


def _open(storage: Storage, settings: PlanSettings | TuneSettings, uri: str) -> _File:
    limits = settings.limits
    check_scheme(uri, limits.schemes)
    if not _is_text(uri):
        raise RowError(ErrorCode.REFERENCE_MISSING, f"{uri!r}: its name is no valid Unicode; rename it")
    with tempfile.TemporaryDirectory(prefix="vmt-") as folder:
        local = Path(folder) / "reference"
        try:
            digest = storage.fetch(uri, local, most_bytes=limits.max_reference_mib * 2**20)
            return _File(digest, video.probe(local, limits))
        except RowError as error:
            raise error.renamed(local, uri) from error


def _is_text(uri: str) -> bool:
    try:
        uri.encode()
    except UnicodeEncodeError:
        return False
    return True


def _taken(
    settings: PlanSettings | TuneSettings, reference: Reference, file: _File | RowError
) -> Clip | tuple[Reference, RowError]:
    """What is taken of a file, or why nothing can be."""
    if isinstance(file, RowError):
        return reference, file
    info, start, end = file.info, reference.start_frame, reference.end_frame
    fps = reference.fps or settings.fps or info.fps
    frames = video.clip_frames(info, start, end, fps, settings.frames or native(settings.model).frames)
    if frames < 5:
        last = min(info.frames, end if end is not None else info.frames)
        return reference, RowError(
            ErrorCode.TOO_FEW_FRAMES,
            f"{reference.uri}: its frames {start} to {last}, of {info.frames} at {info.fps:g} fps, are too few for 5 at {fps:g} fps",
        )
    return Clip(reference, file.digest, fps, frames)
