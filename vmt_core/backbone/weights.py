"""Where the weights of a model lie, and which they are; found without loading them (or the libraries that would)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vmt_core.backbone import nano

_WEIGHTS = ["*.json", "*.safetensors", "*.model", "*.txt"]  # never a pickle


def locate(model: str) -> Path:
    """The local folder of a model: `wan-nano`, a folder, or a hub id (its newest commit, from the cache where it is whole there).

    Raises:
        FileNotFoundError: neither; says what was tried.
    """
    if model == nano.NAME:
        return nano.folder()
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise FileNotFoundError(f"{path}: no model_index.json, so no model in diffusers layout")
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{model}: no such folder (use wan-nano, a folder in diffusers layout, or a hub id)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_WEIGHTS))
    except Exception as error:
        raise FileNotFoundError(f"{model}: not a local folder, and the hub did not give it: {error}") from error


def revision(path: Path) -> str:
    """Identity of the weights in a folder: 16 hex digits over every file's name, size and content.

    Files over 64 MiB count with 64 evenly spaced samples of 1 MiB, so that 28 GB take seconds.
    """
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if f"*{file.suffix}" not in _WEIGHTS:
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= 64 << 20:
                digest.update(stream.read())
                continue
            for sample in range(64):
                stream.seek((size - (1 << 20)) * sample // 63)
                digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:16]
