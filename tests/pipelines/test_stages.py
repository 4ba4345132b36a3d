"""Parts of the actors that need no Ray."""

import weakref

import pyarrow as pa
import pytest
import torch

from pipelines import tracker
from pipelines.stage import STATE, Cache, Stage, begin
from pipelines.stages import Transfer, reference_key
from pipelines.storage import StorageUnavailable, Unwritable
from schemas import ManifestRow, TransferSettings
from support.jobs import row
from vmt_core.faults import device_is_broken, out_of_memory


def test_a_value_is_made_once_and_the_least_recently_used_goes_first():
    made = []
    cache = Cache(2)

    def get(key):
        return cache.get(key, lambda: made.append(key) or key.upper())

    assert [get(key) for key in "aababca"] == list("AABABCA")
    assert made == ["a", "b", "c", "a"][:4]


def test_what_raises_is_not_kept():
    cache = Cache(2)
    with pytest.raises(OSError, match="once"):
        cache.get("a", lambda: (_ for _ in ()).throw(OSError("once")))
    assert cache.get("a", lambda: 1) == 1


def test_the_old_value_goes_before_the_new_one_is_made():
    """Two models would not fit at once."""
    cache = Cache(1)
    cache.get("a", lambda: "model a")
    cache.get("b", lambda: len(cache._values))
    assert cache.get("b", lambda: None) == 0


@pytest.mark.parametrize(
    "change",
    [{"reference_digest": "1" * 64}, {"start_frame": 1}, {"end_frame": 9}, {"fps": 24.0}, {"width": 80}, {"frames": 9}],
)
def test_a_reference_is_what_the_model_sees_of_a_clip(change):
    plain, other = row("a").model_dump(), row("a", **change).model_dump()
    assert reference_key(plain) != reference_key(other)
    assert reference_key(plain) == reference_key(row("b", seed=3, reference_uri="/elsewhere.mp4").model_dump())


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"}, {"method": "fastvmt"}, {"method_settings": '{"a":1}'}, {"adapter_id": "0" * 32}, {"height": 80},
        {"width": 80}, {"frames": 9}, {"steps": 3}, {"shift": 4.0}, {"guidance_scale": 2.0},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_only_rows_that_are_sampled_alike_are_denoised_together(change):
    stage = Transfer.__new__(Transfer)
    stage.settings = TransferSettings(manifest="m", output="o")
    rows = [one.model_dump() for one in (row("a"), row("b", seed=1, negative_prompt="c"), row("a", **change))]
    assert stage.groups(rows) == [rows[:2], rows[2:]]
    stage.settings = TransferSettings(manifest="m", output="o", transfer={"batch_rows": 1})
    assert stage.groups(rows) == [[one] for one in rows]


def test_manifest_rows_become_the_state_that_travels():
    table = pa.Table.from_pylist([row("a").model_dump()], schema=ManifestRow.arrow_schema())
    state = begin(table)
    assert state.schema == STATE
    assert state["prompt"].to_pylist() == ["a"]
    assert state["payload"].to_pylist() == state["error_code"].to_pylist() == [None]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"), False),
        (RuntimeError("shapes do not match"), False),
        (OSError("out of memory card"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert out_of_memory(error) is expected
    assert not device_is_broken(error)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA driver error: device-side assert triggered",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_a_broken_device_is_told_from_a_broken_row(message):
    assert device_is_broken(RuntimeError(message))
    assert not out_of_memory(RuntimeError(message))


class Raises(Stage):
    """A stage without Ray, whose work ends in an error."""

    name = "transfer"

    def __init__(self, error):
        self.error = error

    def setup(self):
        pass

    def work(self, rows, *, smaller):
        raise self.error


def test_memory_is_given_back_when_nothing_of_the_failed_try_is_held_any_more():
    """Frames of a traceback hold activations."""

    class Hoards(Raises):
        def work(self, rows, *, smaller):
            activations = torch.zeros(3)
            self.seen = weakref.ref(activations)
            raise MemoryError

        def free(self):
            freed.append(self.seen() is None)

    for rows, tries in (([{"sample_id": "a"}], 2), ([{"sample_id": "a"}, {"sample_id": "b"}], 1)):
        freed = []
        outcomes = Hoards(None)._attempt(rows)
        assert freed == [True] * tries
        assert outcomes is None if len(rows) > 1 else outcomes[0].code == "out_of_memory"


def test_an_output_that_takes_no_files_ends_the_run_not_its_rows():
    with pytest.raises(Unwritable, match="the disk is full"):
        Raises(Unwritable("the disk is full"))._attempt([{"sample_id": "a"}, {"sample_id": "b"}])
    (outcome,) = Raises(StorageUnavailable("503"))._attempt([{"sample_id": "a"}])
    assert outcome.code == "storage_unavailable"


def test_a_process_that_cannot_use_its_gpu_any_more_ends_before_it_fails_good_rows(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(tracker.os, "_exit", lambda code: ended.append(code) or (_ for _ in ()).throw(SystemExit))
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(SystemExit):
        Raises(broken)._attempt([{"sample_id": "a"}])
    assert ended == [1] and "illegal memory access" in capsys.readouterr().err
    for other in (RuntimeError("CUDA error: out of memory"), RuntimeError("shapes do not match")):
        (outcome,) = Raises(other)._attempt([{"sample_id": "a"}])
        assert outcome.code in ("out_of_memory", "internal")
    assert ended == [1]
