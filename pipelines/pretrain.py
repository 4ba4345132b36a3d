"""Training of wan-nano through Ray Train: workers run `vmt_core.pretraining`, checkpoints and logs go to the output storage.

OUT/vae/                 Ray Train's run: checkpoints (model, moving average, optimizers), and logs/
OUT/vae/weights/         the autoencoder in diffusers layout, fp32, after every run of its stage
OUT/dit/                 as OUT/vae
OUT/wan-nano/            the whole model, bf16, after every run of the dit stage
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from diffusers import AutoencoderKLWan
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from tensorboardX import SummaryWriter
from torch import nn

from pipelines import cluster, distributed, lock
from pipelines.cluster import RunFailed
from pipelines.progress import duration
from pipelines.storage import Storage, absolute, describe, join
from schemas import PretrainSettings, StageSettings, UsageError
from vmt_core.backbone.weights import locate
from vmt_core.pretraining import loop
from vmt_core.pretraining.ahead import Helpers
from vmt_core.pretraining.dit import DitStage
from vmt_core.pretraining.export import save_pipeline, save_vae
from vmt_core.pretraining.vae import DecoderStage, VaeStage

_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's own, of a run that has a checkpoint


def run(settings: PretrainSettings, say: Callable[[str], None] = print) -> None:
    """Trains one stage for `minutes`, or until its phases are over.

    Raises:
        UsageError: nothing to resume, something in the way, or no autoencoder yet.
        RunFailed: training stopped before its time.
    """
    settings = settings.model_copy(update={"output": absolute(settings.output)})  # workers have another directory
    storage, folder = Storage(settings.storage), join(settings.output, settings.stage)
    begun = storage.exists(join(folder, _SNAPSHOT))
    if begun and not settings.resume:
        raise UsageError(
            f"--output {settings.output}: holds a run of this stage; --resume goes on, or take another folder"
        )
    if settings.resume and not begun:
        raise UsageError(f"--output {settings.output}: has no checkpoint of stage {settings.stage} to --resume")
    if settings.stage != "vae" and not settings.start and not _has_autoencoder(settings, storage):
        raise UsageError(f"--output {settings.output}: has no trained autoencoder; run --stage vae first")
    if settings.start:
        try:
            settings = settings.model_copy(update={"start": str(locate(settings.start).absolute())})
        except FileNotFoundError as error:
            raise UsageError(f"--start {error}") from error
    filesystem, path = storage.arrow(settings.output)
    gpu = settings.device == "cuda"
    pool = StageSettings(actors=settings.workers, gpus=float(gpu))
    began = time.monotonic()
    with lock.held(storage, join(folder, "lock.json")), cluster.connected(settings.ray, (pool,)):
        storage.write(join(folder, "settings.json"), json.dumps(settings.model_dump(mode="json"), indent=2).encode())
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"settings": settings, "folder": folder},
            scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=gpu),
            run_config=RunConfig(
                name=settings.stage,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=2),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        try:
            metrics = _fit(trainer).metrics or {}
        except Exception as error:
            raise RunFailed(f"{describe(error)[-2000:]}; --resume goes on from the last checkpoint") from error
    say(f"{settings.stage}: step {metrics.get('step', 0)}, {duration(time.monotonic() - began)} in this run")
    say("  ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in metrics.items() if "/" in name))
    say(f"weights  {_weights(settings)}")


def _fit(trainer: ray.train.torch.TorchTrainer) -> ray.train.Result:
    """Trains in another thread: in the main one Ray Train takes interruptions itself, and exits with 0."""
    ended: Future[ray.train.Result] = Future()

    def work() -> None:
        try:
            ended.set_result(trainer.fit())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=work, daemon=True, name="ray-train").start()
    return ended.result()


def _weights(settings: PretrainSettings) -> str:
    return join(settings.output, *(["wan-nano"] if settings.stage == "dit" else ["vae", "weights"]))


def _has_autoencoder(settings: PretrainSettings, storage: Storage) -> bool:
    return storage.exists(join(settings.output, "vae", "weights", "config.json"))


def _worker(config: dict[str, Any]) -> None:
    """One process of the training; rank 0 keeps the logs and writes the weights."""
    settings: PretrainSettings = config["settings"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 1) // workers))
    storage = Storage(settings.storage)
    with tempfile.TemporaryDirectory(prefix="vmt-pretrain-") as scratch:
        work = Path(scratch)
        stage = _stage(settings, storage, work)
        wrap = _data_parallel if workers > 1 else _same
        run = loop.Run(stage, device=settings.device, wrap=wrap)
        if checkpoint := ray.train.get_checkpoint():
            with checkpoint.as_directory() as saved:
                run.load(Path(saved))
        if settings.compile and isinstance(stage, DitStage):
            stage.compile()
        logs = _Logs(work / "logs", run.step)

        def report(values: loop.Logs, save: bool) -> None:
            if rank == 0:
                logs.add(values)
            if not save:
                return
            with tempfile.TemporaryDirectory(dir=work) as folder:
                if rank == 0:
                    run.save(Path(folder))
                    logs.flush()
                    _upload(storage, work / "logs", join(config["folder"], "logs"))
                ray.train.report(values, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)

        loop.train(
            run,
            minutes=settings.minutes,
            report=report,
            validate_every=settings.validate_every,
            checkpoint_minutes=settings.checkpoint_minutes,
            rank=rank,
            agree=distributed.agree,
        )
        if rank == 0:
            if isinstance(stage, DitStage):
                save_pipeline(run.average.module.cpu(), stage.pool.vae.cpu(), work / "weights")
            else:
                save_vae(run.average.module, work / "weights", clips=6 * stage.validation_clips)
            _upload(storage, work / "weights", _weights(settings))


def _stage(settings: PretrainSettings, storage: Storage, work: Path) -> VaeStage | DitStage:
    stage: VaeStage | DitStage
    cores = (os.cpu_count() or 1) // settings.workers
    helpers = Helpers(cores - 1 if settings.device == "cuda" else 0)  # on the CPU the training itself needs them
    if settings.stage == "vae":
        stage = VaeStage(settings.seed, helpers=helpers)
        if settings.start:
            stage.start_from(_autoencoder(Path(settings.start, "vae"), settings.device))
    else:
        folder = work / "vae"
        if _has_autoencoder(settings, storage):
            weights = join(settings.output, "vae", "weights")
            for name in storage.details(weights):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(storage.read(join(weights, name)))
        else:
            folder = Path(str(settings.start), "vae")
        vae = _autoencoder(folder, settings.device)
        if settings.stage == "decoder":
            stage = DecoderStage(vae, settings.seed, helpers=helpers)
        else:
            users = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
            cache = Path(settings.cache or users / "vmt" / "latents")
            stage = DitStage(vae, cache, settings.seed, helpers=helpers)
            stage.pool.first = max(
                1, round(stage.pool.first * min(1.0, settings.steps_scale))
            )  # a short run sees few clips
            if settings.start:
                stage.start_from(Path(settings.start))
    stage.phases = loop.scaled(stage.phases, settings.steps_scale)
    stage.validation_clips = settings.validation_clips or stage.validation_clips
    return stage


def _autoencoder(folder: Path, device: str) -> AutoencoderKLWan:
    vae: AutoencoderKLWan = AutoencoderKLWan.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    return vae.to(device)


def _data_parallel(module: nn.Module) -> nn.Module:
    """Single frames leave the autoencoder's layers of time without a gradient."""
    wrapped: nn.Module = ray.train.torch.prepare_model(
        module, parallel_strategy_kwargs={"find_unused_parameters": True}
    )
    return wrapped


def _same(module: nn.Module) -> nn.Module:
    return module


def _upload(storage: Storage, folder: Path, uri: str) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            storage.put(file, join(uri, file.relative_to(folder).as_posix()))


class _Logs:
    """One line of JSON a step, and the same as TensorBoard scalars; a file of its own for each start."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = open(folder / f"steps-{step:07d}.jsonl", "w")  # noqa: SIM115 (open as long as the worker)
        self.board = SummaryWriter(logdir=str(folder), max_queue=1000, flush_secs=60)

    def add(self, values: loop.Logs) -> None:
        self.lines.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if name != "step":
                self.board.add_scalar(name, value, int(values["step"]))

    def flush(self) -> None:
        self.lines.flush()
        self.board.flush()
