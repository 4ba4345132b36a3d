"""The three actors of the main job. Frames never leave an actor: latents travel as safetensors bytes, videos as objects.

Encode    reference -> latents (VAE), prompts -> embeddings (UMT5)         payload: latents, empty, text, negative
Transfer  latents -> motion (once per reference), noise -> latents (DiT)   payload: latents
Finish    latents -> mp4 -> verified -> one PUT                            a result row
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Hashable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load, save

from pipelines import adapters, models
from pipelines.stage import Cache, LastStage, Outcome, Row, Stage
from pipelines.storage import check_scheme, join, sha256
from schemas import ErrorCode, RowError, StageSettings, TransferSettings
from vmt_core import video
from vmt_core.adapters import files
from vmt_core.adapters.masked_lora import Weights
from vmt_core.backbone.wan import Backbone
from vmt_core.methods import build
from vmt_core.presets import native
from vmt_core.transfer import Artifact, MotionTransfer, Sampling

_MOST_ADAPTER_BYTES = 8 * 2**30
#: Of a reference, carried into the clip as the model saw it: a procedural one says its scene, so its motion is known exactly.
KEPT_TAGS = ("scene",)


def device(settings: TransferSettings, resources: StageSettings) -> torch.device:
    """Where an actor computes; sets its threads, and on a GPU deterministic kernels where there are any.

    Attention's backward pass keeps its usual kernel, which is not deterministic: without `warn_only` some would be refused altogether.
    """
    torch.set_num_threads(resources.threads or max(1, int(resources.cpus)))
    if settings.device == "cuda" or (settings.device == "auto" and resources.gpus > 0):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants to be deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        return torch.device("cuda")
    return torch.device("cpu")


class _OnGpus(Stage):
    """A stage whose memory is torch's."""

    def free(self) -> None:
        super().free()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Encode(_OnGpus):
    """Reads references and prompts. A reference's latents and a prompt's embedding are computed once (bounded caches)."""

    name = "encode"

    def setup(self) -> None:
        path, where = models.local(self.settings.model, self.storage), device(self.settings, self.resources)
        self.backbones: Cache[Backbone] = Cache(2)
        self.load = lambda dtype: Backbone.load(path, parts=("vae", "text"), device=where, dtype=dtype)
        self.references: Cache[tuple[bytes, str] | RowError] = Cache(8)
        self.captions: Cache[torch.Tensor] = Cache(1024)

    def work(self, rows: list[Row], *, smaller: bool) -> list[Outcome]:
        (row,) = rows
        limits = self.settings.limits
        if not row["prompt"].strip():
            raise RowError(ErrorCode.PROMPT_EMPTY, "the prompt is empty")
        for text in (row["prompt"], row["negative_prompt"]):
            if len(text) > limits.max_prompt_chars:
                raise RowError(
                    ErrorCode.PROMPT_TOO_LONG,
                    f"{len(text)} characters are over limits.max_prompt_chars={limits.max_prompt_chars}",
                )
        backbone = self.backbones.get(row["dtype"], lambda: self.load(getattr(torch, row["dtype"])))
        reference = self.references.get(
            (row["reference_uri"], reference_key(row)), lambda: self._reference(backbone, row)
        )
        if isinstance(reference, RowError):
            raise reference
        latents, uri = reference
        caption = {
            name: self.captions.get((row["dtype"], text), lambda text=text: backbone.caption(text))  # type: ignore[misc]
            for name, text in {"empty": "", "text": row["prompt"], "negative": row["negative_prompt"]}.items()
        }
        return [{"payload": _pack({**load(latents), **caption}), "reference_video_uri": uri}]

    def _reference(self, backbone: Backbone, row: Row) -> tuple[bytes, str] | RowError:
        """Latents of a row's reference, and where the clip lies as the model sees it. A permanent error is kept as well."""
        limits, uri = self.settings.limits, row["reference_uri"]
        with tempfile.TemporaryDirectory(prefix="vmt-") as folder:
            local = Path(folder) / "reference"
            try:
                check_scheme(uri, limits.schemes)
                self.storage.fetch(
                    uri, local, most_bytes=limits.max_reference_mib * 2**20, digest=row["reference_digest"]
                )
                frames = video.read(
                    local,
                    height=row["height"],
                    width=row["width"],
                    frames=row["frames"],
                    fps=row["fps"],
                    start=row["start_frame"],
                    end=row["end_frame"],
                    limits=limits,
                )
                shown = join(self.settings.output, "references", f"{reference_key(row)}.mp4")
                if not self.storage.exists(shown):
                    clip = Path(folder) / "shown.mp4"
                    kept = {name: value for name, value in video.tags(local).items() if name in KEPT_TAGS}
                    video.write(
                        clip,
                        frames,
                        row["fps"],
                        tags=kept,
                        crf=self.settings.video.crf,
                        preset=self.settings.video.preset,
                    )
                    self.storage.put(clip, shown)
            except RowError as error:
                if error.code.transient:
                    raise
                return error.renamed(local, uri)
        return _pack({"latents": backbone.encode(frames)}), shown


class Transfer(_OnGpus):
    """Runs the diffusion transformer on rows of one size and method together. A reference's motion is computed once."""

    name = "transfer"

    def setup(self) -> None:
        self.path, self.where = models.local(self.settings.model, self.storage), device(self.settings, self.resources)
        self.backbones: Cache[Backbone] = Cache(1)
        self.artifacts: Cache[Artifact] = Cache(8)
        self.adapters: Cache[dict[str, Weights]] = Cache(8)
        self.transfers: Cache[MotionTransfer] = Cache(1)

    def groups(self, rows: list[Row]) -> list[list[Row]]:
        alike: dict[Hashable, list[Row]] = {}
        for row in rows:
            alike.setdefault(tuple(row[name] for name in _ALIKE), []).append(row)
        most = self.settings.transfer.batch_rows
        return [group[i : i + most] for group in alike.values() for i in range(0, len(group), most)]

    def work(self, rows: list[Row], *, smaller: bool) -> list[Outcome]:
        first, options = rows[0], self.settings.transfer
        backbone = self.backbones.get(first["dtype"], lambda: self._load(first["dtype"]))
        usual = options.checkpoint or native(self.settings.model).checkpoint
        backbone.checkpoint_policy = "full" if smaller else usual
        sampling = Sampling(
            first["steps"], first["shift"], first["guidance_scale"], cfg="two_pass" if smaller else options.cfg
        )
        transfer = self.transfers.get(
            (sampling, *(first[name] for name in _ALIKE)), lambda: self._transfer(first, backbone, sampling)
        )
        payloads = [load(row["payload"]) for row in rows]
        artifacts = [
            self.artifacts.get(
                (reference_key(row), row["dtype"], row["method"], row["method_settings"], row["adapter_id"]),
                lambda payload=payload: transfer.describe(payload["latents"], payload["empty"]),  # type: ignore[misc]
            )
            for row, payload in zip(rows, payloads, strict=True)
        ]
        denoised = transfer.denoise(
            artifacts,
            [payload["text"] for payload in payloads],
            [payload["negative"] for payload in payloads],
            [row["seed"] for row in rows],
        )
        outcomes: list[Outcome] = []
        for latents, log in zip(denoised.latents, denoised.logs, strict=True):
            if not bool(latents.isfinite().all()):
                message = f"NaN or inf in the latents ({log.skipped} of {log.evaluations} gradients were not finite)"
                outcomes.append(RowError(ErrorCode.NON_FINITE, message))
                continue
            outcomes.append(
                {
                    "payload": _pack({"latents": latents}),
                    "evaluations": log.evaluations,
                    "denoiser_calls": denoised.denoiser_calls,
                    "skipped_gradients": log.skipped,
                    "guidance_loss_first": log.losses[0] if log.losses else None,
                    "guidance_loss_last": log.losses[-1] if log.losses else None,
                }
            )
        return outcomes

    def _load(self, dtype: str) -> Backbone:
        self.transfers = Cache(1)  # the last one holds the old backbone, which is to make room
        return Backbone.load(self.path, parts=("transformer",), device=self.where, dtype=getattr(torch, dtype))

    def _transfer(self, row: Row, backbone: Backbone, sampling: Sampling) -> MotionTransfer:
        method = build(row["method"], json.loads(row["method_settings"]))
        weights = None
        if method.adapter is not None:
            weights = self.adapters.get(row["adapter_id"], lambda: self._adapter(row))
        try:
            return MotionTransfer(backbone, method, sampling, weights)
        except ValueError as error:
            raise RowError(ErrorCode.ADAPTER_UNFIT, str(error)) from error

    def _adapter(self, row: Row) -> dict[str, Weights]:
        """The weights of a row's adapter, from the folder that `tune` wrote."""
        folder = join(str(self.settings.adapters), f"method={row['method']}", row["adapter_id"])
        if not self.storage.exists(join(folder, files.DONE)):
            why = adapters.failure(self.storage, str(self.settings.adapters), row["adapter_id"])
            raise RowError(
                ErrorCode.ADAPTER_MISSING,
                f"{folder}: no adapter there; "
                + (f"its tuning failed: {why}" if why else "run jobs/tune.py for this reference, or use --tune"),
            )
        with tempfile.TemporaryDirectory(prefix="vmt-") as scratch:
            for stage in files.STAGES:
                name = files.name(stage)
                self.storage.fetch(join(folder, name), Path(scratch) / name, most_bytes=_MOST_ADAPTER_BYTES)
            try:
                return files.load(Path(scratch), method=row["method"], model_revision=row["model_revision"])
            except ValueError as error:
                raise RowError(ErrorCode.ADAPTER_UNFIT, str(error).replace(scratch, folder)) from error


class Finish(_OnGpus, LastStage):
    """Decodes latents, writes the video, checks it, uploads it; then, and only then, the row is ok."""

    name = "finish"

    def setup(self) -> None:
        path, where = models.local(self.settings.model, self.storage), device(self.settings, self.resources)
        self.backbone = Backbone.load(path, parts=("vae",), device=where)
        packages = ("torch", "diffusers", "transformers", "ray", "av")
        self.versions = json.dumps({"python": platform.python_version()} | {name: version(name) for name in packages})

    def work(self, rows: list[Row], *, smaller: bool) -> list[Outcome]:
        (row,) = rows
        frames = self.backbone.decode(load(row["payload"])["latents"])
        uri = join(self.settings.output, "videos", f"method={row['method']}", f"{row['sample_id']}.mp4")
        tags = {name: row[name] for name in ("sample_id", "method", "model", "model_revision")} | {
            "comment": "AI-generated"
        }
        with tempfile.TemporaryDirectory(prefix="vmt-") as folder:
            local = Path(folder) / "video.mp4"
            video.write(
                local, frames, row["fps"], tags=tags, crf=self.settings.video.crf, preset=self.settings.video.preset
            )
            video.verify(local, frames=row["frames"], height=row["height"], width=row["width"])
            self.storage.put(local, uri)
            return [{"video_uri": uri, "video_bytes": local.stat().st_size, "video_sha256": sha256(local)}]


def reference_key(row: Row) -> str:
    """Names a reference as the model sees it: bytes, range, rate and size."""
    end = row["end_frame"] if row["end_frame"] is not None else "end"
    size = f"{row['width']}x{row['height']}x{row['frames']}"
    return f"{row['reference_digest'][:24]}-{row['start_frame']}-{end}-{row['fps']:.6g}-{size}"


_ALIKE = (
    "dtype",
    "method",
    "method_settings",
    "adapter_id",
    "height",
    "width",
    "frames",
    "steps",
    "shift",
    "guidance_scale",
)


def _pack(tensors: dict[str, torch.Tensor]) -> bytes:
    """Tensors as safetensors bytes; equal prompts may share one embedding, which safetensors would refuse."""
    return save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()})
