"""What tuning does around its trainings; nothing is trained, and no Ray started."""

import json
import threading
import time

import pytest
import torch

from pipelines import adapters, prepare, training, transfer, tune
from pipelines.cluster import RunFailed
from pipelines.ledger import Ledger
from pipelines.storage import Storage
from pipelines.training import folder_of
from schemas import (
    AdapterRow,
    ErrorCode,
    LimitSettings,
    RaySettings,
    Reference,
    RowError,
    TrainingSettings,
    TransferSettings,
    TuneSettings,
    UsageError,
)
from support.jobs import row, write_manifest
from vmt_core.adapters import files
from vmt_core.adapters.settings import TUNING_VERSION, FollowYourMotion

LOSSES = {"steps": 2, "validation": 0.5}


def adapter(number=0, **tuning):
    return AdapterRow.planned(
        method="follow_your_motion",
        tuning=FollowYourMotion.preset("nano", **tuning).model_dump_json(),
        height=64,
        width=64,
        frames=9,
        fps=12.0,
        start_frame=0,
        end_frame=None,
        model="wan-nano",
        model_revision="r",
        tuning_version=TUNING_VERSION,
        reference_uri=f"/clips/{number}.mp4",
        reference_digest=f"{number:064x}",
        caption="a red circle",
        category=None,
    )


@pytest.fixture
def settings(tmp_path):
    return TuneSettings(references="clips", output=str(tmp_path))


def test_a_whole_adapter_without_its_index_row_is_not_trained_again(settings, monkeypatch):
    """A driver may die between the adapter's last file and the row, or while it deletes the checkpoints."""
    monkeypatch.setattr(training, "_fit", lambda *_, **__: pytest.fail("it trains"))
    storage, one = Storage(), adapter()
    about = {"spatial": LOSSES, "temporal": LOSSES, "seconds": 3.0}
    storage.write(f"{folder_of(settings.output, one)}/{files.DONE}", json.dumps(about).encode())
    checkpoint = f"{settings.output}/run/training/{one.adapter_id}/checkpoint_manager_snapshot.json"
    storage.write(checkpoint, b"{}")
    monkeypatch.setattr(tune, "_room", lambda *_, **__: 1)
    tune._train_all(settings, storage, [one], say=lambda _: None, gpus=False)
    kept = tune.index(storage, settings.output)[one.adapter_id]
    assert (kept.status, kept.spatial_loss, kept.seconds) == ("ok", 0.5, 3.0)
    assert not storage.exists(checkpoint)


def test_what_still_trains_when_another_breaks_is_no_failure_of_its_reference(settings, monkeypatch):
    """Ray is shut down under it."""
    began, over = threading.Event(), threading.Event()

    def train(_settings, _storage, row, *, gpus):
        if row.adapter_id == adapter(0).adapter_id:
            assert began.wait(30)
            raise OSError("the disk is full")
        began.set()
        assert over.wait(30)
        raise RowError(ErrorCode.CRASHED, "its workers died")

    monkeypatch.setattr(training, "train_adapter", train)
    monkeypatch.setattr(tune, "_room", lambda *_, **__: 2)
    with pytest.raises(RunFailed, match="the disk is full; the same command goes on from there"):
        tune._train_all(settings, Storage(), [adapter(0), adapter(1)], say=lambda _: None, gpus=False)
    over.set()
    for thread in [one for one in threading.enumerate() if one.name.startswith("tune")]:
        thread.join(30)
    assert tune.index(Storage(), settings.output) == {}


def test_trainings_begin_as_nodes_come_and_some_wait_for_them(settings, monkeypatch):
    """An autoscaler adds nodes for what waits."""
    room, under_way, over = [1], [], threading.Event()

    def train(_settings, _storage, row, *, gpus):
        under_way.append(row.adapter_id)
        assert over.wait(30)
        return {"folder": "f"}

    def grown(number):
        end = time.monotonic() + 30
        while len(under_way) < number:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(under_way) == number

    monkeypatch.setattr(training, "train_adapter", train)
    monkeypatch.setattr(tune, "_room", lambda *_, **__: room[0])
    monkeypatch.setattr(tune, "_LOOK_S", 0.02)
    chosen = [adapter(number) for number in range(7)]
    cluster = settings.model_copy(update={"ray": RaySettings(address="head:6379")})
    said, made = [], []
    fleet = threading.Thread(
        target=lambda: made.extend(tune._train_all(cluster, Storage(), chosen, said.append, gpus=False))
    )
    fleet.start()
    grown(2)
    room[0] = 3
    grown(6)
    over.set()
    fleet.join(30)
    assert {row.status for row in made} == {"ok"} and len(made) == 7
    assert said[:2] == ["7 to train, 1 at once", "7 to train, 3 at once"]


@pytest.mark.parametrize(
    ("flags", "room", "expected"),
    [
        ({}, 4, 0),
        ({"ray": RaySettings(address="head:6379")}, 4, 4),
        ({"ray": RaySettings(address="head:6379")}, 50, 8),
        ({"ray": RaySettings(address="head:6379"), "training": TrainingSettings(at_once=4)}, 4, 0),
    ],
    ids=["this machine", "a cluster doubles", "up to a limit", "as was said"],
)
def test_how_many_trainings_wait_for_nodes(settings, flags, room, expected):
    assert tune._ahead(settings.model_copy(update=flags), room) == expected


@pytest.mark.parametrize(("well", "ended"), [((), 5), ((3,), 9), ((8,), 5)], ids=["none", "one between", "too late"])
def test_a_fleet_whose_trainings_all_crash_is_stopped(settings, monkeypatch, well, ended):
    def train(_settings, _storage, row, *, gpus):
        if int(row.reference_digest, 16) in well:
            return {"folder": "f"}
        raise RowError(ErrorCode.OUT_OF_MEMORY, "CUDA out of memory")

    monkeypatch.setattr(training, "train_adapter", train)
    monkeypatch.setattr(tune, "_room", lambda *_, **__: 1)
    chosen = [adapter(number) for number in range(9)]
    if ended < 9:
        with pytest.raises(
            RunFailed, match=r"5 trainings one after the other .*: CUDA out of memory; .* --retry-failed"
        ):
            tune._train_all(settings, Storage(), chosen, say=lambda _: None, gpus=False)
    else:  # the last five end with the run
        tune._train_all(settings, Storage(), chosen, say=lambda _: None, gpus=False)
    assert len(tune.index(Storage(), settings.output)) == ended


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory", "clips_a_draw"),
        (OSError(5, "Input/output error"), "crashed", "its workers died, or hung in a step"),
    ],
)
def test_a_training_says_what_its_workers_died_of(settings, monkeypatch, fault, code, words):
    class Trainer:
        def __init__(self, *_, **__):
            pass

        def fit(self):
            raise training.WorkerGroupError(str(fault), {0: ValueError("its neighbour is gone"), 1: fault})

    monkeypatch.setattr(training.ray.train.torch, "TorchTrainer", Trainer)
    with pytest.raises(RowError, match=words) as caught:
        training._fit(settings, Storage(), adapter(), "folder", gpus=False)
    assert caught.value.code == code
    assert "3 times" in caught.value.message and str(fault) in caught.value.message


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (RowError(ErrorCode.ADAPTER_UNFIT, "finds no spatial head"), "adapter_unfit"),
        (FloatingPointError("not finite"), "non_finite"),
        (RowError(ErrorCode.STORAGE_UNAVAILABLE, "still failing"), None),
        (ValueError("/weights: cannot be loaded (OSError: Input/output error)"), None),
    ],
)
def test_what_another_try_may_mend_is_tried_again(monkeypatch, fault, code):
    """Ray does so with what a worker raises; what it returns stands."""

    def train(**_):
        raise fault

    monkeypatch.setattr(training, "_train", train)
    if code is None:
        with pytest.raises(type(fault)):
            training._worker({})
    else:
        assert training._worker({}) == (
            code,
            str(fault.args[-1]) if isinstance(fault, FloatingPointError) else fault.message,
        )


def test_a_transfer_whose_adapters_are_of_another_tuning_says_so_before_it_begins(tmp_path, monkeypatch):
    own = {"method": "follow_your_motion", "method_settings": '{"preset":"nano"}', "caption": "a red circle"}
    rows, needed = [], []
    for number in range(2):
        values = own | {"reference_digest": f"{number:064x}"}
        needed.append(adapters.wanted(row("a star", adapter_id="0" * 32, **values)))
        rows.append(row("a star", adapter_id=needed[-1].adapter_id, **values))
    settings = TransferSettings(
        manifest=write_manifest(tmp_path / "manifest", rows), output=str(tmp_path / "out"), adapters=str(tmp_path / "adapters")
    )  # fmt: skip
    storage, said = Storage(), []
    selection = transfer.manifest.check(storage, settings.manifest, revision=rows[0].model_revision)
    other = AdapterRow.planned(**needed[0].model_dump(exclude={"adapter_id", "fps", "status"}), fps=7.0)
    tune._keep(storage, str(tmp_path), other.model_copy(update={"status": "ok"}))
    wrong = (
        r"--adapters: 2 of 2 adapters are not in .*, that of .* first \(one of that clip has another fps: tune and plan"
    )
    with pytest.raises(UsageError, match=wrong):
        transfer._with_adapters(settings, storage, selection, said.append)
    storage.write(f"{folder_of(str(tmp_path), needed[0])}/{files.DONE}", b"{}")
    failed = {"status": "failed", "error_code": ErrorCode.NON_FINITE, "error_message": "nan"}
    tune._keep(storage, str(tmp_path), needed[1].model_copy(update=failed))
    transfer._with_adapters(settings, storage, selection, said.append)
    (note,) = said
    assert note.startswith("note: 1 of 2 adapters are not in") and "(its tuning failed: non_finite)" in note
    monkeypatch.setattr(Ledger, "done", lambda self: {rows[1].sample_id: "adapter_missing"})
    transfer._with_adapters(settings, storage, selection, said.append)
    assert said == [note]  # nothing to be made lacks one


def test_what_another_driver_finished_before_the_lock_was_had_is_not_tuned_again(settings, monkeypatch):
    storage, one = Storage(), adapter()
    held = tune.lock.held

    def after_the_other(*args):
        tune._keep(storage, settings.output, one.model_copy(update={"status": "ok"}))
        return held(*args)

    monkeypatch.setattr(tune.lock, "held", after_the_other)
    monkeypatch.setattr(tune, "_make", lambda *_: pytest.fail("it tunes"))
    assert tune.tune(settings, storage, [one], say=lambda _: None)["ok"] == 1


@pytest.mark.parametrize("slash", ["", "/"])
def test_checkpoints_that_a_killed_driver_left_of_finished_adapters_go(settings, slash):
    storage, one, other = Storage(), adapter(0), adapter(1)
    settings = settings.model_copy(update={"output": settings.output + slash})
    tune._keep(storage, settings.output, one.model_copy(update={"status": "ok"}))
    places = [f"{settings.output.rstrip('/')}/run/training/{row.adapter_id}/snapshot.json" for row in (one, other)]
    for place in places:
        storage.write(place, b"{}")
    assert tune.tune(settings, storage, [one], say=lambda _: None)["ok"] == 1
    assert [storage.exists(place) for place in places] == [False, True]


class FakeData:
    """Stands for Ray Data: every row fails."""

    def __init__(self, table):
        self.rows = table.to_pylist()

    def repartition(self, **_):
        return self

    def map_batches(self, *_, **__):
        return self

    def iter_rows(self):
        fault = {"status": "failed", "error_code": ErrorCode.TRUNCATED, "error_message": "cut off"}
        yield from (values | fault for values in self.rows)


@pytest.mark.parametrize(
    ("change", "other"),
    [
        *[({name: 1}, True) for name in ("start_frame", "end_frame", "fps", "height", "width", "frames", "tuning_version")],
        *[({name: "other"}, True) for name in ("reference_digest", "caption", "model_revision")],
        *[({name: "other"}, False) for name in ("reference_uri", "model", "category", "adapter_id")],
    ],
    ids=str,
)  # fmt: skip
def test_a_prepared_reference_is_that_of_all_that_it_was_made_of(change, other):
    one = adapter()
    assert (prepare.place("out", one.model_copy(update=change)) != prepare.place("out", one)) == other


def test_a_reference_is_prepared_once_for_all_adapters_on_it_and_fails_for_all(settings, monkeypatch):
    rows = [adapter(0, rank=4), adapter(0, stride=7), adapter(1, rank=4), adapter(0, sparse="pixel", stride=7)]
    seen = []
    monkeypatch.setattr(prepare.ray.data, "from_arrow", lambda table: seen.append(table.num_rows) or FakeData(table))
    monkeypatch.setattr(prepare.tracker, "start", lambda: None)
    monkeypatch.setattr(prepare, "watched", lambda work, *_, **__: work())
    Storage().write(prepare.place(settings.output, rows[2]), b"latents")
    ended = prepare.prepare_all(settings, Storage(), rows, say=lambda _: None)
    assert seen == [2]  # the first two share one, the last needs the thinned clip, too
    assert [one.adapter_id for one in ended] == [one.adapter_id for one in rows]
    assert [one.status for one in ended] == ["failed", "failed", "planned", "failed"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [1, 2, 3]),
        ({"limit": 2}, [1, 2]),
        ({"retry_failed": True}, [0, 1, 2, 3]),
        ({"transfer": {"gpus": 0.5}}, [1, 2, 3]),
    ],
    ids=["missing", "limit", "failed ones, too", "where rows are denoised"],
)
def test_only_adapters_of_rows_that_are_to_be_made_are_tuned(tmp_path, monkeypatch, flags, expected):
    own = {"method": "follow_your_motion", "method_settings": '{"preset":"nano"}', "caption": "a red circle"}
    rows = []
    for number in range(4):
        values = own | {"reference_digest": f"{number:064x}"}
        needed = adapters.wanted(row("a star", adapter_id="0" * 32, **values))
        rows.append(row("a star", adapter_id=needed.adapter_id, **values))
    chosen = TransferSettings(
        manifest=write_manifest(tmp_path / "manifest", rows), output=str(tmp_path / "out"), tune=True, **flags
    )
    selection = transfer.manifest.check(Storage(), chosen.manifest, revision=rows[0].model_revision)
    monkeypatch.setattr(Ledger, "done", lambda self: {rows[0].sample_id: "crashed"})
    asked = []
    monkeypatch.setattr(transfer.tune, "tune", lambda *args: asked.append(args))
    transfer._with_adapters(chosen, Storage(), selection, say=lambda _: None)
    ((tuning, _, wanted, _),) = asked
    assert [int(one.reference_digest, 16) for one in wanted] == expected
    assert (tuning.limit, tuning.device) == (None, "cuda" if "transfer" in flags else "auto")


def test_a_checkpoint_of_another_precision_is_not_gone_on_with(tmp_path):
    begun = training._Progress(torch.float32)
    begun.finish("spatial", {"blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 4)}, [], early=False)
    begun.seconds = 7.0
    begun.save(tmp_path / "saved")
    same = training._Progress.load(tmp_path / "saved", tmp_path / "before", torch.float32)
    assert (list(same.done), same.seconds) == (["spatial"], 7.0)
    other = training._Progress.load(tmp_path / "saved", tmp_path / "before", torch.bfloat16)
    assert (other.done, other.seconds, other.dtype) == ({}, 0.0, "bfloat16")


def test_a_reference_outside_the_allowed_schemes_is_never_read(settings, tmp_path):
    (tmp_path / "secret").write_bytes(b"not for all")
    actor = object.__new__(prepare.Prepare)  # without its model
    actor.settings = settings.model_copy(update={"limits": LimitSettings(schemes=("s3",))})
    actor.storage = Storage()
    with pytest.raises(RowError, match=r"'file' is not in limits.schemes \(s3\)") as caught:
        actor._read(adapter().model_copy(update={"reference_uri": str(tmp_path / "secret")}), tmp_path / "clip")
    assert caught.value.code == ErrorCode.SCHEME_FORBIDDEN
    assert not (tmp_path / "clip").exists()


def test_failed_references_are_tried_again_a_few_at_a_time(settings, monkeypatch):
    storage, rows = Storage(), [adapter(number) for number in range(2)]
    for one in rows:
        tune._keep(
            storage, settings.output, one.model_copy(update=tune._failure(RowError(ErrorCode.CRASHED, "it died")))
        )
    done = {"status": "ok", "folder": "f"}
    monkeypatch.setattr(tune, "_make", lambda _s, _t, chosen, _say: [one.model_copy(update=done) for one in chosen])
    again = settings.model_copy(update={"retry_failed": True, "limit": 1})
    summary = tune.tune(again, storage, rows, say=lambda _: None)
    assert (summary["ok"], summary["failed"], summary["left"]) == (1, 1, 0)


def test_where_a_cluster_trains_is_said_not_guessed(settings, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    real = settings.model_copy(update={"model": "/weights/wan", "ray": RaySettings(address="head:6379")})
    with pytest.raises(UsageError, match="--device auto: no GPU is seen from here; say cuda or cpu"):
        tune.uses_gpus(real)
    assert tune.uses_gpus(real.model_copy(update={"device": "cuda"}))
    assert not tune.uses_gpus(real.model_copy(update={"device": "cpu"}))
    assert not tune.uses_gpus(real.model_copy(update={"ray": RaySettings()}))


def test_a_wrong_setting_of_a_tuning_is_said_in_a_line(settings):
    with pytest.raises(UsageError, match=r"^tuning: rnk: Extra inputs are not permitted \(got 4\)$"):
        tune.method_tuning(settings.model_copy(update={"tuning": {"rnk": 4}}), Storage())


def test_a_clip_whose_name_is_no_unicode_is_a_failed_row(settings, monkeypatch):
    bad = Reference(uri="/clips/\udcff.mp4", caption="a red circle")
    error = RowError(ErrorCode.REFERENCE_MISSING, "its name is no valid Unicode")
    monkeypatch.setattr(tune, "references", lambda *_: [bad])
    monkeypatch.setattr(tune, "open_all", lambda *_: ([], [(bad, error)]))
    (failed,) = tune.rows(settings, Storage(), lambda _: None)
    assert (failed.status, failed.error_code) == ("failed", "reference_missing")
    assert failed.reference_uri == r"/clips/\udcff.mp4"
