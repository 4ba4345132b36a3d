"""Which self-attention heads look within a frame (spatial), and which at the same place of other frames (temporal).

Follow-Your-Motion, section 3.2: a head's attention map is held against two bands, one around the diagonal in frame-major order and the
same one in place-major order; `score` = log(mass under the temporal band / mass under the spatial one), each over what uniform
attention would have there. Estimated from some query rows at several noise levels, block by block: never a whole map.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from vmt_core.adapters.settings import Rule
from vmt_core.backbone.geometry import Geometry
from vmt_core.backbone.taps import rotate
from vmt_core.shapes import LatentBatch, TextBatch

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from PIL.Image import Image

#: Noise levels that scores are averaged over; the published code reads a single one where the maps are almost free of content.
SIGMAS: dict[Rule, tuple[float, ...]] = {
    "median": (0.9, 0.7, 0.5, 0.3),
    "paper": (0.9, 0.7, 0.5, 0.3),
    "code": (0.9998,),
}


class HeadTypes(BaseModel):
    """Every head's score, and whether it is spatial; `scores` and `spatial` are [layer][head]."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rule: str
    scores: list[list[float]]
    spatial: list[list[bool]]
    model: str = ""  # revision of the weights they are of, where it is known

    @model_validator(mode="after")
    def _tables_are_alike(self) -> Self:
        shapes = {tuple(len(row) for row in table) for table in (self.scores, self.spatial)}
        if len(shapes) != 1 or len(set(shapes.pop())) != 1:
            raise ValueError("scores and spatial must be tables of the same layers and heads")
        return self

    @property
    def layers(self) -> int:
        return len(self.spatial)

    @property
    def heads(self) -> int:
        return len(self.spatial[0])

    def group(self, name: str) -> Bool[Tensor, "layers heads"]:
        """The heads of a group: spatial, temporal or all."""
        spatial = torch.tensor(self.spatial)
        return {"spatial": spatial, "temporal": ~spatial, "all": torch.ones_like(spatial)}[name]

    def save(self, path: Path) -> None:
        """Writes a JSON file."""
        path.write_text(self.model_dump_json(indent=1))

    @classmethod
    def load(cls, path: Path, *, layers: int, heads: int) -> HeadTypes:
        """Reads what `save` wrote, for a transformer of so many layers and heads.

        Raises:
            ValueError: not such a file, or of another transformer.
        """
        try:
            types = cls.model_validate(json.loads(path.read_text()))
        except ValidationError as error:  # without its values: it may be another file, with secrets in it
            fault = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, fault["loc"]))
            raise ValueError(f"{path}: not a file of head types: {place}: {fault['msg']}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a file of head types: {error}") from None
        if (types.layers, types.heads) != (layers, heads):
            raise ValueError(
                f"{path}: of {types.layers} layers x {types.heads} heads, the model has {layers} x {heads}"
            )
        return types


@torch.no_grad()
def classify(
    transformer: WanTransformer3DModel,
    latents: LatentBatch,
    text: TextBatch,
    *,
    rule: Rule = "median",
    queries: int = 256,
    seed: int = 0,
) -> HeadTypes:
    """Types of all heads, from one clip: a forward a noise level.

    Args:
        latents: (1, C, F, H, W), clean.
        text: (1, L, dim), the clip's caption.
        rule: median: the upper half of the scores is temporal. paper: temporal above -ln 1.25. code: one noise level, from ln 1.3 on.
        queries: rows of each attention map that are looked at.
    """
    geometry = Geometry.of_latents(latents.shape, transformer.config.patch_size)
    generator = torch.Generator().manual_seed(seed)
    picked = query_rows(geometry, queries, generator)
    bands = band_masks(geometry, picked).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    totals = []
    for sigma in SIGMAS[rule]:
        with _watching(transformer, latents, picked.to(latents.device), bands) as found:
            timestep = torch.full((1,), 1000 * sigma, device=latents.device)
            noisy = (1 - sigma) * latents + sigma * noise
            transformer(noisy.to(transformer.dtype), timestep, text.to(transformer.dtype), return_dict=False)
        totals.append(torch.stack(found.scores))
    scores = torch.stack(totals).mean(0).cpu()
    return HeadTypes(rule=rule, scores=scores.tolist(), spatial=spatial_heads(scores, rule).tolist())


def spatial_heads(scores: Float[Tensor, "layers heads"], rule: Rule) -> Bool[Tensor, "layers heads"]:
    """The rule alone; the two published thresholds contradict each other, the median gives the even split that both were tuned for."""
    if rule == "median":
        return scores <= scores.flatten().median()  # torch's is the lower one
    return scores <= -math.log(1.25) if rule == "paper" else scores < math.log(1.3)


def query_rows(geometry: Geometry, number: int, generator: torch.Generator) -> Int[Tensor, " queries"]:
    """Tokens to look from, equally many of every frame (all of them where there are fewer)."""
    each = min(geometry.per_frame, max(1, number // geometry.frames))
    rows = [
        frame * geometry.per_frame + torch.randperm(geometry.per_frame, generator=generator)[:each]
        for frame in range(geometry.frames)
    ]
    return torch.cat(rows)


def band_masks(geometry: Geometry, rows: Int[Tensor, " queries"]) -> Bool[Tensor, "2 queries tokens"]:
    """Keys near a query in frame-major order (spatial) and in place-major order (temporal): fewer than a frame's tokens away."""
    tokens = torch.arange(geometry.frames * geometry.per_frame)
    frame, place = tokens // geometry.per_frame, tokens % geometry.per_frame
    orders = torch.stack([tokens, place * geometry.frames + frame])
    return (orders[:, rows, None] - orders[:, None, :]).abs() < geometry.per_frame


def score(
    query: Float[Tensor, "queries heads d"],
    key: Float[Tensor, "tokens heads d"],
    bands: Bool[Tensor, "2 queries tokens"],
) -> Float[Tensor, " heads"]:
    """log(temporal mass / spatial mass) of each head; uniform attention has 0. One head at a time, fp32."""
    share = bands.float().mean((1, 2))
    scores = []
    for head in range(query.shape[1]):
        logits = query[:, head].float() @ key[:, head].float().T / math.sqrt(query.shape[-1])
        mass = (logits.softmax(-1) * bands).sum(-1).mean(-1) / share
        scores.append((mass[1] / mass[0]).log())
    return torch.stack(scores)


class _watching:
    """Scores every block's self-attention while the transformer runs, keeping one block's q and k at a time."""

    def __init__(self, transformer: WanTransformer3DModel, latents: Tensor, rows: Tensor, bands: Tensor) -> None:
        self.transformer, self.rows, self.bands = transformer, rows, bands
        self.rotary = transformer.rope(latents)
        self.scores: list[Tensor] = []

    def __enter__(self) -> _watching:
        self.handles = []
        for block in self.transformer.blocks:
            attention: Any = block.attn1
            self.handles += [
                attention.norm_q.register_forward_hook(self._keep_query),
                attention.norm_k.register_forward_hook(self._look),
            ]
            self.heads = attention.heads
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep_query(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        cos, sin = (table[:, self.rows] for table in self.rotary)
        self.query = rotate(output[:, self.rows].unflatten(2, (self.heads, -1)), cos, sin)[0]

    def _look(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        key = rotate(output.unflatten(2, (self.heads, -1)), *self.rotary)[0]
        self.scores.append(score(self.query, key, self.bands))


def picture(types: HeadTypes, cell: int = 18) -> Image:
    """A heat map, layers downwards and heads to the right, paler near the border between the two types."""
    from PIL import Image, ImageDraw

    scores, spatial = torch.tensor(types.scores), torch.tensor(types.spatial)
    split = (scores[spatial].max() if spatial.any() else scores.min()) / 2
    split = split + (scores[~spatial].min() if (~spatial).any() else scores.max()) / 2
    strength = ((scores - split).abs() / (scores - split).abs().max().clamp(min=1e-9)).sqrt()
    blue, orange = (38, 99, 190), (224, 117, 20)
    words = {f"heads 0 to {types.heads - 1}": (0, 0, 0), "spatial": blue, "temporal": orange}
    left, top = 2 * cell, (len(words) + 1) * cell
    image = Image.new("RGB", (left + max(types.heads, 4) * cell + cell, top + types.layers * cell + cell), "white")
    draw = ImageDraw.Draw(image)
    for line, (word, ink) in enumerate(words.items()):
        draw.text((left, line * cell + cell // 2), word, fill=ink)
    for layer in range(types.layers):
        draw.text((cell // 2, top + layer * cell + 3), str(layer), fill="black")
        for head in range(types.heads):
            full = torch.tensor(blue if spatial[layer, head] else orange)
            colour = 255 - (255 - full) * (0.15 + 0.85 * strength[layer, head])
            x, y = left + head * cell, top + layer * cell
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=tuple(int(value) for value in colour))
    return image
