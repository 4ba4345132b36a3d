"""LoRA on chosen heads of the self-attention: plain peft layers whose other entries are, and stay, exactly zero.

    to_q, to_k, to_v:  y = Wx + b + s diag(R) B A x      rows of B of the other heads are zero
    to_out.0:          y = Wx + b + s B A diag(R) x      columns of A of the other heads are zero

Base weights stay untouched, saved files are ordinary LoRA files. Wan's RMS norms of q and k span all heads, so an adapted head changes the
common denominator of its layer a little (the published code does the same); `isolated_norms` takes it from the base projections.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vmt_core.adapters.settings import TARGETS, Target

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_COMFY = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for rank and alpha

_PLACE = re.compile(r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)")
_ISOLATED: WeakKeyDictionary[nn.Module, list[Callable[[], None]]] = WeakKeyDictionary()  # how to undo it
_SEVERAL = "Already found a `peft_config`"  # peft warns of a second adapter, which is meant

Weights = dict[str, Tensor]  # "blocks.0.attn1.to_q.lora_A.weight" -> (rank, in), "….lora_B.weight" -> (out, rank)


def add(
    transformer: WanTransformer3DModel,
    name: str,
    heads: Bool[Tensor, "layers heads"],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[Target] = TARGETS,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Adds an adapter for the chosen heads and makes it the only active and trainable one; a fresh one changes nothing.

    Layers without a chosen head get no adapter. Gradients of the other heads' entries are zero, so they stay zero under any
    optimizer whose update of a zero weight with zero gradients is zero.

    Returns:
        its parameters, fp32.

    Raises:
        ValueError: no head is chosen at all.
    """
    from peft import LoraConfig

    layers = [index for index, row in enumerate(heads) if bool(row.any())]
    if not layers:
        raise ValueError(f"adapter {name}: no layer has a head of this kind; use rule median, or another clip")
    places = "|".join(map(str, layers))
    kinds = "|".join(target.replace(".", r"\.") for target in targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # any number will do
        target_modules=rf"blocks\.({places})\.attn1\.({kinds})",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_SEVERAL)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU, too
        transformer.add_adapter(config, name)
    for layer in layers:
        attention: Any = transformer.blocks[layer].attn1
        for target in targets:
            lora = attention.get_submodule(target)
            into, out = lora.lora_A[name].weight, lora.lora_B[name].weight
            for weight in (into, out):
                weight.data = weight.data.float()
            mask = heads[layer].repeat_interleave(attention.inner_dim // attention.heads).to(into)
            if target == "to_out.0":
                into.data *= mask
                into.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient))
            else:
                out.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient)[:, None])
    return train_only(transformer, name)


def parameters(transformer: WanTransformer3DModel, name: str) -> list[nn.Parameter]:
    """An adapter's parameters, in the transformer's order."""
    return [weight for path, weight in transformer.named_parameters() if f".{name}." in path and ".lora_" in path]


def use(transformer: WanTransformer3DModel, scales: dict[str, float]) -> None:
    """Makes these adapters the active ones, at these scales, none of them trainable; an empty dict turns all off."""
    active = {name: scale for name, scale in scales.items() if scale != 0}
    if not active:
        transformer.disable_adapters()
        return
    transformer.enable_adapters()
    transformer.set_adapters(list(active), list(active.values()))
    transformer.requires_grad_(False)  # set_adapters turns gradients on


@contextmanager
def switched_off(transformer: WanTransformer3DModel) -> Iterator[None]:
    """Within it no adapter is active or trainable; what was so before, a training under way above all, is so again afterwards."""
    if not getattr(transformer, "peft_config", None):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer))
    active = [layer for layer in layers if not layer.disable_adapters]
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]
    for layer in active:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in active:
            layer.enable_adapters(True)  # turns gradients on
        if active:
            transformer.requires_grad_(False)
            for weight in trained:
                weight.requires_grad_(True)


def train_only(transformer: WanTransformer3DModel, name: str, beside: Sequence[str] = ()) -> list[nn.Parameter]:
    """Makes adapters active and one of them alone trainable."""
    use(transformer, dict.fromkeys([*beside, name], 1.0))
    trained = parameters(transformer, name)
    for weight in trained:
        weight.requires_grad_(True)
    return trained


def state(transformer: WanTransformer3DModel, name: str) -> Weights:
    """An adapter's weights, fp32 on the CPU."""
    from peft import get_peft_model_state_dict

    weights: Weights = get_peft_model_state_dict(transformer, adapter_name=name)
    return {key: value.detach().float().cpu().contiguous() for key, value in weights.items()}


def write(weights: Weights, path: Path, *, rank: int, alpha: float, about: dict[str, str] | None = None) -> None:
    """Writes weights as a LoRA file in diffusers' format."""
    places = sorted({key.rpartition(".lora_")[0] for key in weights})
    config = {"r": rank, "lora_alpha": alpha, "target_modules": places}
    metadata = {f"transformer.{key}": value for key, value in config.items()}
    tensors = {f"transformer.{key}": value for key, value in weights.items()}
    save_file(tensors, path, metadata={"format": "pt", _METADATA_KEY: json.dumps(metadata), **(about or {})})


def write_raw(weights: Weights, path: Path) -> None:
    """Writes weights under the keys they have, alpha folded in."""
    save_file({key: value.contiguous() for key, value in weights.items()}, path, metadata={"format": "pt"})


def read(path: Path) -> tuple[Weights, dict[str, str]]:
    """Weights and metadata of a LoRA file in diffusers' format, alpha folded in: their scale is 1.

    Raises:
        ValueError: not such a file, half of one, or values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            weights = {
                key.removeprefix("transformer."): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 (not a mapping)
            }
    except Exception as error:  # safetensors raises its own
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    try:
        scale = _scale(metadata, _rank(weights))
        weights = {key: value * scale if "lora_B" in key else value for key, value in weights.items()}
        for key, value in weights.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{key} is not finite")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return weights, metadata


def _rank(weights: Weights) -> int:
    """The rank of all pairs of A and B.

    Raises:
        ValueError: they are no such pairs on projections of the self-attention.
    """
    places = {key.rpartition(".lora_")[0] for key in weights}
    if not places or not all(_PLACE.fullmatch(place) for place in places):
        raise ValueError("holds no LoRA of the self-attention in diffusers' format")
    ranks = set()
    for place in places:
        into, out = (weights.get(f"{place}.lora_{side}.weight") for side in "AB")
        if into is None or out is None:
            raise ValueError(f"{place} has no pair of lora_A and lora_B")
        if not (into.ndim == out.ndim == 2 and into.is_floating_point() and out.is_floating_point()):
            raise ValueError(f"{place}: lora_A and lora_B are no matrices of real numbers")
        ranks |= {into.shape[0], out.shape[1]}
    if len(ranks) > 1 or len(weights) > 2 * len(places):
        raise ValueError(f"its weights do not fit together (ranks {', '.join(map(str, sorted(ranks)))})")
    return int(ranks.pop())


def _scale(metadata: dict[str, str], rank: int) -> float:
    """alpha / rank, as the file's metadata say."""
    try:
        about = json.loads(metadata.get(_METADATA_KEY, "{}"))
        scale = float(about.get("transformer.lora_alpha", rank)) / float(about.get("transformer.r", rank))
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"its {_METADATA_KEY} gives no rank and alpha ({error})") from error
    if not math.isfinite(scale):
        raise ValueError(f"its {_METADATA_KEY} gives no finite alpha")
    return scale


def clear(transformer: WanTransformer3DModel) -> None:
    """Removes every adapter, and what `isolate_norms` left."""
    for release in list(_ISOLATED.get(transformer, ())):
        release()
    for name in list(getattr(transformer, "peft_config", {})):
        transformer.delete_adapters(name)


def attach(transformer: WanTransformer3DModel, name: str, weights: Weights) -> None:
    """Adds saved weights, in the transformer's dtype, as an adapter of that name, replacing an older one; all adapters are inactive then.

    Raises:
        ValueError: they are of a transformer of another shape.
    """
    known = dict(transformer.named_modules())
    for key, value in weights.items():
        place, _, kind = key.rpartition(".lora_")
        layer = known.get(place)
        base = getattr(layer, "base_layer", layer)
        if not isinstance(base, nn.Linear):
            raise ValueError(f"adapter {name}: {place} is no layer of this model")
        wanted = base.in_features if kind.startswith("A") else base.out_features
        if value.shape[1 if kind.startswith("A") else 0] != wanted:
            raise ValueError(f"adapter {name}: {key} is {tuple(value.shape)}, this model's layer has {wanted} features")
    if name in getattr(transformer, "peft_config", {}):
        transformer.delete_adapters(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_SEVERAL)
        transformer.load_lora_adapter(dict(weights), prefix=None, adapter_name=name)
    use(transformer, {})  # peft makes a new adapter the active one
    transformer.requires_grad_(False)


def merged(parts: Sequence[tuple[Weights, float]]) -> tuple[Weights, int]:
    """Several adapters at given scales as one whose rank is the sum of theirs; returns its rank too, which is also its alpha.

    A = [A_1; A_2; …], B = [g_1 B_1, g_2 B_2, …]; where one has no layer its part is zero.
    """
    ranks = [next(value.shape[0] for key, value in part.items() if "lora_A" in key) for part, _ in parts]
    places = sorted({key.rpartition(".lora_")[0] for part, _ in parts for key in part})
    found: Weights = {}
    for place in places:
        into, out = f"{place}.lora_A.weight", f"{place}.lora_B.weight"
        some = next(part for part, _ in parts if into in part)
        rows, columns = [], []
        for (part, scale), rank in zip(parts, ranks, strict=True):
            rows.append(part.get(into, some[into].new_zeros(rank, some[into].shape[1])))
            columns.append(scale * part.get(out, some[out].new_zeros(some[out].shape[0], rank)))
        found[into], found[out] = torch.cat(rows), torch.cat(columns, 1)
    return found, sum(ranks)


def comfy(weights: Weights) -> Weights:
    """The same under ComfyUI's keys (those of the original Wan); alpha must be folded in, as `read` does."""
    found: Weights = {}
    for key, value in weights.items():
        place, _, kind = key.rpartition(".lora_")
        block, _, target = place.partition(".attn1.")
        found[f"diffusion_model.{block}.self_attn.{_COMFY[target]}.lora_{kind}"] = value
    return found


@contextmanager
def isolated_norms(transformer: WanTransformer3DModel) -> Iterator[None]:
    """Within it the RMS of q and k is that of the base projections: adapted heads then leave the others exactly as they are."""
    release = isolate_norms(transformer)
    try:
        yield
    finally:
        release()


def isolate_norms(transformer: WanTransformer3DModel) -> Callable[[], None]:
    """The same for good, or until what it returns is called: a backward pass that recomputes blocks needs it as well."""
    handles = []
    for block in transformer.blocks:
        attention: Any = block.attn1
        for target, norm in (("to_q", attention.norm_q), ("to_k", attention.norm_k)):
            layer = attention.get_submodule(target)
            if hasattr(layer, "base_layer"):
                kept: list[Tensor] = []
                handles.append(
                    layer.base_layer.register_forward_hook(
                        lambda _m, _i, out, kept=kept, layer=layer: None if layer.disable_adapters else _keep(kept, out)
                    )
                )
                handles.append(
                    norm.register_forward_hook(lambda m, inputs, _o, kept=kept: _isolated(m, inputs[0], kept))
                )

    def release() -> None:
        for handle in handles:
            handle.remove()
        if release in releases:
            releases.remove(release)

    releases = _ISOLATED.setdefault(transformer, [])
    releases.append(release)
    return release


def _keep(kept: list[Tensor], output: Tensor) -> None:
    kept[:] = [output]


def _isolated(norm: Any, adapted: Tensor, kept: list[Tensor]) -> Tensor | None:
    if not kept:  # the adapter was deleted, or is off
        return None
    variance = kept.pop().float().square().mean(-1, keepdim=True)
    normed = adapted * torch.rsqrt(variance + norm.eps)
    isolated: Tensor = (normed.to(norm.weight.dtype) * norm.weight).type_as(adapted)
    return isolated
