"""One adapter: a Ray Train run whose workers tune one reference after head types, spatial and temporal stage, on DeepSpeed."""

from __future__ import annotations

import faulthandler
import gc
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from safetensors.torch import load_file
from tensorboardX import SummaryWriter

from pipelines import distributed, models, prepare
from pipelines.engine import DeepSpeedEngine, in_bf16
from pipelines.storage import Storage, absolute, check_scheme, describe, join
from schemas import AdapterRow, ErrorCode, RowError, TuneSettings
from vmt_core import video
from vmt_core.adapters import files, masked_lora
from vmt_core.adapters import follow_your_motion as method
from vmt_core.adapters.head_types import HeadTypes, picture
from vmt_core.adapters.masked_lora import Weights
from vmt_core.adapters.settings import FollowYourMotion
from vmt_core.backbone.sampler import Schedule, noise, sample
from vmt_core.backbone.wan import Backbone
from vmt_core.faults import out_of_memory
from vmt_core.presets import native
from vmt_core.tuning import Point, Tuning


def folder_of(output: str, row: AdapterRow) -> str:
    """Where an adapter's files lie."""
    return join(output, "adapters", f"method={row.method}", row.adapter_id)


def train_adapter(settings: TuneSettings, storage: Storage, row: AdapterRow, *, gpus: bool) -> dict[str, Any]:
    """Trains, or goes on training, the adapter of a row; returns the columns that say how it ended.

    An adapter whose files are all there is taken as it is: a driver that died before it wrote the index row left it.

    Raises:
        RowError: it cannot be trained, or its workers died too often.
    """
    folder = folder_of(settings.output, row)
    if not storage.exists(join(folder, files.DONE)):
        _fit(settings, storage, row, folder, gpus=gpus)
    about = json.loads(storage.read(join(folder, files.DONE)))
    return {
        "folder": folder,
        "workers": settings.training.workers_per_reference,
        "spatial_steps": about["spatial"]["steps"],
        "temporal_steps": about["temporal"]["steps"],
        "spatial_loss": about["spatial"]["validation"],
        "temporal_loss": about["temporal"]["validation"],
        "seconds": about["seconds"],
        "dtype": about.get("dtype"),  # not in those of before
    }


def _fit(settings: TuneSettings, storage: Storage, row: AdapterRow, folder: str, *, gpus: bool) -> None:
    filesystem, path = storage.arrow(absolute(join(settings.output, "run", "training")))
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"settings": settings, "row": row, "folder": folder, "gpus": gpus},
        scaling_config=ScalingConfig(
            num_workers=settings.training.workers_per_reference,
            use_gpu=gpus,
            resources_per_worker={"CPU": settings.training.cpus_per_worker, **({"GPU": 1} if gpus else {})},
        ),
        run_config=RunConfig(
            name=row.adapter_id,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=settings.training.attempts - 1),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        fault = trainer.fit().return_value
    except WorkerGroupError as error:
        times = f"{settings.training.attempts} times: {describe(error)[-1500:]}"
        if any(map(out_of_memory, error.worker_failures.values())):
            what = (
                "its workers ran out of memory (less is needed with --training.checkpoint full, --training.deepspeed.offload, "
                f"a smaller clips_a_draw or frames_a_draw, or fewer frames), {times}"
            )
            raise RowError(ErrorCode.OUT_OF_MEMORY, what) from error
        what = f"its workers died, or hung in a step for limits.row_seconds={settings.limits.row_seconds:g}, {times}"
        raise RowError(ErrorCode.CRASHED, what) from error
    except Exception as error:
        kept = join(settings.output, "run", "training", row.adapter_id)
        what = f"its training stopped: {describe(error)[-1500:]}; if that repeats, delete its checkpoints, {kept}"
        raise RowError(ErrorCode.CRASHED, what) from error
    if fault is not None:
        raise RowError(ErrorCode(fault[0]), fault[1])


def _worker(config: dict[str, Any]) -> tuple[str, str] | None:
    """One process; a fault that a repetition would meet again is returned (code and message), not raised."""
    try:
        _train(**config)
    except FloatingPointError as error:
        return ErrorCode.NON_FINITE.value, str(error)[:2000]
    except RowError as error:
        if error.code.transient:
            raise
        return error.code.value, error.message[:2000]
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


def _train(settings: TuneSettings, row: AdapterRow, folder: str, gpus: bool) -> None:
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(settings.training.threads or max(1, int(settings.training.cpus_per_worker)))
    storage, device = Storage(settings.storage), torch.device("cpu")
    if gpus:
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
    tuning = FollowYourMotion.model_validate_json(row.tuning)
    with tempfile.TemporaryDirectory(prefix="vmt-tune-") as scratch:
        work, before = Path(scratch), Path(scratch) / "before"
        storage.fetch(prepare.place(settings.output, row), work / "prepared.safetensors", most_bytes=2**40)
        prepared = method.Prepared.load(work / "prepared.safetensors")
        dtype = torch.bfloat16 if in_bf16(settings.training.deepspeed, device) else torch.float32
        progress = _Progress(dtype)
        if checkpoint := ray.train.get_checkpoint():
            with checkpoint.as_directory() as saved:
                progress = _Progress.load(Path(saved), before, dtype)
        model = models.local(settings.model, storage)
        named = tuning.head_file
        if tuning.head_file is not None:
            check_scheme(tuning.head_file, settings.limits.schemes)
            storage.fetch(tuning.head_file, work / files.HEAD_TYPES, most_bytes=2**20)
            tuning = tuning.model_copy(update={"head_file": str(work / files.HEAD_TYPES)})
        board = SummaryWriter(logdir=str(work / "board")) if rank == 0 else None
        wandb = _wandb(settings, row, tuning) if rank == 0 and settings.training.wandb else None
        for stage in files.STAGES:
            if stage in progress.done:
                continue
            backbone = Backbone.load(
                model, parts=("transformer",), device=device, dtype=dtype
            )  # engines leave hooks behind
            backbone.checkpoint_policy = settings.training.checkpoint or native(settings.model).checkpoint
            if progress.types is None:
                try:
                    types = method.head_types(backbone, prepared, tuning)
                except ValueError as error:
                    what = str(error).replace(str(tuning.head_file), str(named))  # which has a local copy
                    raise RowError(ErrorCode.ADAPTER_UNFIT, what) from error
                progress.types = distributed.from_first(types)
            task = method.begin(backbone, stage, prepared, progress.types, tuning, progress.done)
            engine = DeepSpeedEngine(
                task.module, task.schedule, settings.training.deepspeed, workers=workers, device=device
            )
            run = Tuning(task, engine, rank=rank, workers=workers, mean=distributed.mean)
            if (before / stage).is_dir():
                run.load(before / stage)
            saved_at = began = time.monotonic()
            over = run.done
            while not over:
                # a step that hangs ends its worker, in whatever it hangs, and says where in the worker's log
                faulthandler.dump_traceback_later(settings.limits.row_seconds, exit=True, file=2)
                logs = run.advance()
                over = run.done
                if board:
                    for name, value in logs.items():
                        board.add_scalar(f"{stage}/{name}", value, run.step)
                if wandb:
                    wandb.log({f"{stage}/{name}": value for name, value in logs.items()})
                if over or distributed.agree(time.monotonic() - saved_at > settings.training.checkpoint_seconds):
                    progress.seconds += time.monotonic() - began
                    began = saved_at = time.monotonic()
                    state = engine.state()  # gathered from all workers
                    if over:
                        progress.finish(stage, method.weights(state, stage, tuning), run.curve, run.stopped_early)
                    if board:
                        board.flush()
                        for path in (work / "board").iterdir():
                            storage.put(path, join(settings.output, "run", "tensorboard", row.adapter_id, path.name))
                    _report(progress, work, rank, None if over else run, state)
                if settings.training.sample_every and run.step % settings.training.sample_every == 0:
                    _sample(settings, storage, row, backbone, prepared, stage, run.step, rank)
            del backbone, task, engine, run  # so that the next stage's model never shares the memory
            gc.collect()
            if gpus:
                torch.cuda.empty_cache()
        if rank == 0:
            assert progress.types is not None
            _publish(storage, folder, work, row, progress, settings.training.export)
        if wandb:
            wandb.finish()
        distributed.barrier()


def _wandb(settings: TuneSettings, row: AdapterRow, tuning: FollowYourMotion) -> Any:
    import wandb  # an extra

    return wandb.init(
        project=settings.training.wandb,
        id=row.adapter_id,
        resume="allow",
        name=Path(row.reference_uri).stem,
        config=tuning.model_dump(),
    )


def _sample(
    settings: TuneSettings,
    storage: Storage,
    row: AdapterRow,
    backbone: Backbone,
    prepared: method.Prepared,
    stage: str,
    step: int,
    rank: int,
) -> None:
    """Renders the reference's own caption with the adapter as it is, to OUT/run/samples/<adapter_id>/<stage>-<step>.mp4."""
    if rank and settings.training.deepspeed.zero < 3:  # parted weights need every worker
        return
    defaults = native(settings.model)
    task_mode = backbone.transformer.training
    backbone.transformer.eval()
    latents = sample(
        backbone.velocity,
        noise(0, prepared.latents.shape, draws=1)[0].unsqueeze(0).to(backbone.device),
        Schedule.shifted(defaults.steps, defaults.shift),
        backbone.pad([prepared.text]),
        backbone.pad([prepared.empty]),
        guidance_scale=defaults.guidance_scale,
        cfg="two_pass",
    )
    backbone.transformer.train(task_mode)
    if rank == 0:
        if "vae" not in backbone.parts:
            path = models.local(settings.model, storage)
            backbone.parts |= Backbone.load(path, parts=("vae",), device=backbone.device).parts
        with tempfile.TemporaryDirectory(prefix="vmt-tune-") as folder:
            local = Path(folder) / "sample.mp4"
            video.write(local, backbone.decode(latents[0].cpu()), row.fps)
            storage.put(local, join(settings.output, "run", "samples", row.adapter_id, f"{stage}-{step:06d}.mp4"))


class _Progress:
    """What is done of an adapter, beside the stage that is under way."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = str(dtype).removeprefix("torch.")
        self.types: HeadTypes | None = None
        self.done: dict[str, Weights] = {}
        self.curves: dict[str, list[Point]] = {}
        self.early: dict[str, bool] = {}
        self.seconds = 0.0

    def finish(self, stage: str, weights: Weights, curve: list[Point], early: bool) -> None:
        self.done[stage], self.curves[stage], self.early[stage] = weights, curve, early

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "dtype": self.dtype,
            "types": None if self.types is None else self.types.model_dump(),
            "curves": self.curves,
            "early": self.early,
            "seconds": self.seconds,
        }
        (folder / "progress.json").write_text(json.dumps(about))
        for stage, weights in self.done.items():
            masked_lora.write_raw(weights, folder / files.name(stage))

    @classmethod
    def load(cls, saved: Path, before: Path, dtype: torch.dtype) -> _Progress:
        """Reads what `save` wrote, and copies the state of the stage that was under way; nothing of a training in another precision."""
        self = cls(dtype)
        about = json.loads((saved / "progress.json").read_text())
        if about.get("dtype", self.dtype) != self.dtype:  # not in those of before
            return self
        self.types = HeadTypes.model_validate(about["types"]) if about["types"] else None
        self.curves = {stage: [Point(*point) for point in curve] for stage, curve in about["curves"].items()}
        self.early, self.seconds = about["early"], about["seconds"]
        self.done = {
            stage: load_file(saved / files.name(stage))
            for stage in files.STAGES
            if (saved / files.name(stage)).exists()
        }
        for stage in files.STAGES:
            if (saved / stage).is_dir():
                shutil.copytree(saved / stage, before / stage)
        return self


def _report(progress: _Progress, work: Path, rank: int, run: Tuning | None, state: Weights) -> None:
    """A checkpoint, of rank 0 for all."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        if rank == 0:
            progress.save(Path(folder))
            if run is not None:
                run.save(Path(folder) / run.task.name, state)
        ray.train.report(
            {"seconds": progress.seconds}, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None
        )


def _publish(
    storage: Storage,
    folder: str,
    work: Path,
    row: AdapterRow,
    progress: _Progress,
    exports: tuple[str, ...],
) -> None:
    """Writes the adapter's folder; the file that says it is whole comes last."""
    tuning = FollowYourMotion.model_validate_json(row.tuning)
    made = work / "adapter"
    made.mkdir()
    about = {name: str(getattr(row, name)) for name in ("adapter_id", "method", "model_revision", "tuning_version")}
    for stage, weights in progress.done.items():
        masked_lora.write(
            weights, made / files.name(stage), rank=tuning.rank, alpha=tuning.rank, about={**about, "stage": stage}
        )
    assert progress.types is not None
    progress.types.save(made / files.HEAD_TYPES)
    picture(progress.types).save(made / files.HEADS)
    summary: dict[str, Any] = {
        **about,
        "tuning": tuning.model_dump(mode="json"),
        "dtype": progress.dtype,
        "seconds": round(progress.seconds, 3),
    }
    for stage, curve in progress.curves.items():
        checked = [point.validation for point in curve if point.validation is not None]
        summary[stage] = {
            "steps": len(curve),
            "stopped_early": progress.early[stage],
            "validation": checked[-1] if checked else None,
            "curve": curve,
        }
    (made / files.DONE).write_text(json.dumps(summary))
    for kind in exports:
        files.export(made, kind)
    found = [path for path in made.rglob("*") if path.is_file()]
    for path in sorted(found, key=lambda path: path.name == files.DONE):
        storage.put(path, join(folder, path.relative_to(made).as_posix()))
