"""Weights from an S3 prefix, once per node."""

import threading
from pathlib import Path

import pytest

from pipelines import models
from pipelines.storage import Storage

FILES = {
    "model_index.json": b"{}",
    "transformer/config.json": b'{"num_layers": 3}',
    "vae/w.safetensors": b"weights" * 1000,
}


@pytest.fixture
def prefix(bucket):
    for name, content in FILES.items():
        Storage().write(f"s3://{bucket}/model/{name}", content)
    return f"s3://{bucket}/model"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vmt" / "models"


@pytest.fixture
def fetched(monkeypatch):
    """Names of all that is downloaded."""
    names = []
    fetch = Storage.fetch

    def spy(self, uri, *args, **kwargs):
        names.append(uri)
        return fetch(self, uri, *args, **kwargs)

    monkeypatch.setattr(Storage, "fetch", spy)
    return names


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def test_a_prefix_is_brought_here_whole_and_once(prefix, fetched):
    folder = models.local(prefix, Storage())
    assert content(folder) == FILES
    assert models.local(prefix, Storage()) == folder
    assert len(fetched) == len(FILES)


def test_names_that_lead_out_of_the_cache_are_refused(prefix, monkeypatch):
    storage = Storage()
    fs, path = storage.filesystem(prefix)
    monkeypatch.setattr(type(fs), "find", lambda *_, **__: {f"{path}/../../evil.json": {"size": 1}})
    with pytest.raises(PermissionError, match=r"'\.\./\.\./evil\.json'; names with '\.\.' are refused"):
        models.local(prefix, storage)


def test_processes_of_a_node_wait_for_the_first(prefix, fetched):
    threads = [threading.Thread(target=models.local, args=(prefix, Storage())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == len(FILES)


def test_an_encoder_in_the_layout_of_transformers_is_a_model_too(bucket, cache):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}
    for name, bytes_ in files.items():
        Storage().write(f"s3://{bucket}/clip/{name}", bytes_)
    assert content(models.local(f"s3://{bucket}/clip", Storage())) == files
    Storage().write(f"s3://{bucket}/nothing/weights.safetensors", b"weights")
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        models.local(f"s3://{bucket}/nothing", Storage())


def test_a_download_that_breaks_is_not_taken_for_whole(prefix, monkeypatch, cache):
    fetch = Storage.fetch

    def breaks(self, uri, *args, **kwargs):
        if uri.endswith("w.safetensors"):
            raise OSError("cut")
        return fetch(self, uri, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "fetch", breaks)
        with pytest.raises(OSError, match="cut"):
            models.local(prefix, Storage())
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert content(models.local(prefix, Storage())) == FILES


def test_what_a_killed_process_left_is_not_taken_for_whole(prefix, cache):
    left = cache / f".loading-{models.revision(prefix, Storage())}"
    left.mkdir(parents=True)
    (left / "model_index.json").write_bytes(b"{}")
    (left / "half.safetensors").write_bytes(b"half")
    assert content(models.local(prefix, Storage())) == FILES
    assert not list(cache.glob(".loading-*"))


def test_weights_that_change_while_they_are_downloaded_are_not_kept_under_the_old_revision(prefix, monkeypatch, cache):
    fetch = Storage.fetch

    def overtaken(self, uri, *args, **kwargs):
        found = fetch(self, uri, *args, **kwargs)
        Storage().write(f"{prefix}/vae/w.safetensors", b"others!" * 1000)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "fetch", overtaken)
        with pytest.raises(OSError, match="changed while they were downloaded"):
            models.local(prefix, Storage())
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert content(models.local(prefix, Storage()))["vae/w.safetensors"] == b"others!" * 1000


@pytest.mark.parametrize("name", ["vae/more.safetensors", "transformer/config.json"])
def test_every_file_of_a_model_counts_for_its_revision(prefix, name):
    before = models.revision(prefix, Storage())
    Storage().write(f"{prefix}/{name}", b"other")
    assert models.revision(prefix, Storage()) != before


def test_the_names_of_the_files_count_for_the_revision(prefix):
    before = models.revision(prefix, Storage())
    Storage().delete(f"{prefix}/vae/w.safetensors")
    Storage().write(f"{prefix}/vae/x.safetensors", FILES["vae/w.safetensors"])
    assert models.revision(prefix, Storage()) != before


def test_the_revision_does_not_depend_on_the_place(prefix, bucket):
    for name, bytes_ in FILES.items():
        Storage().write(f"s3://{bucket}/copy/of/it/{name}", bytes_)
    assert models.revision(f"s3://{bucket}/copy/of/it", Storage()) == models.revision(f"{prefix}/", Storage())


def test_the_revision_follows_the_content(prefix):
    before = models.revision(prefix, Storage())
    assert models.revision(prefix, Storage()) == before
    Storage().write(f"{prefix}/vae/w.safetensors", b"others!" * 1000)
    assert models.revision(prefix, Storage()) != before


def test_pickles_are_left_where_they_are(prefix, bucket):
    before = models.revision(prefix, Storage())
    Storage().write(f"{prefix}/vae/w.bin", b"pickle")
    assert models.revision(prefix, Storage()) == before
    assert content(models.local(prefix, Storage())) == FILES


def test_the_configuration_needs_no_weights(prefix, fetched):
    assert models.config(prefix, Storage()) == {"num_layers": 3}
    assert not fetched


def test_a_prefix_without_a_model_is_refused(bucket):
    Storage().write(f"s3://{bucket}/other/readme.txt", b"x")
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json \(diffusers\) or config\.json"):
        models.local(f"s3://{bucket}/other", Storage())


def test_a_local_folder_is_left_to_the_core(tmp_path):
    assert models.local(str(tmp_path), Storage()) == str(tmp_path)


def test_the_embedded_model_is_no_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("wan-nano", "mine"):
        (tmp_path / name).mkdir()
    assert models.anywhere("wan-nano") == "wan-nano"
    assert models.anywhere("mine") == str(tmp_path / "mine")
