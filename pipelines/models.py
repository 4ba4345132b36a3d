"""Weights on this node: an `s3://` prefix is brought to a local cache once per node; everything else is left to `vmt_core`."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pipelines.storage import Storage, absolute, join, scheme
from vmt_core.backbone import nano, weights

_WEIGHTS = (".json", ".safetensors", ".model", ".txt")


def revision(model: str, storage: Storage) -> str:
    """Identity of a model's weights: of an s3 prefix from its listing (names, sizes, ETags), else from the files.

    Raises:
        FileNotFoundError: there is no such model.
    """
    if scheme(model) == "file":
        return weights.revision(weights.locate(model))
    digest = hashlib.sha256()
    for name, info in sorted(_objects(model, storage).items()):
        digest.update(f"{name}\0{info['size']}\0{info.get('ETag', '')}\0".encode())
    return digest.hexdigest()[:16]


def config(model: str, storage: Storage) -> dict[str, Any]:
    """The transformer's configuration, without its weights."""
    folder = model if scheme(model) != "file" else str(weights.locate(model))
    content = json.loads(storage.read(join(folder, "transformer", "config.json")))
    return dict(content)


def local(model: str, storage: Storage) -> str:
    """What `Backbone.load` takes: the model itself, or the node's copy of an s3 prefix, downloaded if it is not there.

    One process of a node downloads, the others wait; the copy appears whole, with every size checked.
    """
    if scheme(model) == "file":
        return model
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vmt" / "models"
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / revision(model, storage)
    with open(cache / f"{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            loading = cache / f".loading-{target.name}"
            shutil.rmtree(loading, ignore_errors=True)  # of a process that was killed; the lock is ours
            try:
                for name, info in _objects(model, storage).items():
                    (loading / name).parent.mkdir(parents=True, exist_ok=True)
                    storage.fetch(join(model, name), loading / name, most_bytes=info["size"])
                if revision(model, storage) != target.name:
                    raise OSError(f"{model}: its weights changed while they were downloaded")
                loading.rename(target)
            finally:
                shutil.rmtree(loading, ignore_errors=True)
    return str(target)


def anywhere(model: str) -> str:
    """A model's name that means the same in every directory."""
    if model == nano.NAME:  # the embedded one, whatever lies here
        return model
    return absolute(model) if scheme(model) == "file" and Path(model).expanduser().is_dir() else model


def _objects(model: str, storage: Storage) -> dict[str, dict[str, object]]:
    objects = {name: info for name, info in storage.details(model).items() if name.endswith(_WEIGHTS)}
    if not {"model_index.json", "config.json"} & set(objects):
        raise FileNotFoundError(f"{model}: no model_index.json (diffusers) or config.json (transformers) below it")
    return objects
