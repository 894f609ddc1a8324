"""Whether two directories hold the same model: one packed sample through both, compared layer by layer.

Names that map onto each other and shapes that fit prove little: two matrices may be swapped, or heads lie in another
order. What proves it is arithmetic. A drawn image with a question and a conversation without one are packed into one
row, both models compute on it in the same type, and everything on the way is compared::

    tower blocks -> features (and deepstack levels) -> decoder layers -> logits

The *drift* of a part is its mean absolute difference over its mean absolute value. A conversion that changes no value
has none, so the first part that drifts beyond the limit names the tensors to look at: whatever it reads. The models
are loaded one after the other; only what they computed is kept. Nothing is downloaded.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.contract.batch import Batch
from tessera.contract.plan import matches
from tessera.data.collate import Materialised, collate
from tessera.data.encode import Encoder
from tessera.data.render import Renderer
from tessera.infer.session import attach
from tessera.models.vlm import VLM, Trunk

EXACT = 1e-5
"""Largest drift where no value was rounded."""

ROUNDED = 5e-2
"""Largest drift where weights were written in another type than they were read in."""

PICTURE = (168, 224)
"""Height and width in pixels of the drawn image."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a part of a model is from the same part of another: ``mean`` and ``largest`` absolute difference.

    ``relative`` is ``mean`` over the mean absolute value of the first one; not a number counts as infinitely far.
    """

    part: str
    mean: float
    largest: float
    relative: float


@dataclass(frozen=True, slots=True)
class Trace:
    """What a model computed on the sample, by part, in order, and three figures of its parameters.

    Those of an adapter beside them are not counted.
    """

    parts: Mapping[str, Tensor]
    parameters: int
    total: float
    zeros: int


def picture() -> bytes:
    """A PNG with shades, edges and shapes: every patch of it is another one."""
    from PIL import Image, ImageDraw

    height, width = PICTURE
    rows, columns = np.mgrid[0:height, 0:width]
    shades = np.stack([rows * 255 // height, columns * 255 // width, (rows * columns) % 256], axis=-1)
    image = Image.fromarray(shades.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 110, 120), fill=(250, 220, 40), outline=(0, 0, 0), width=5)
    draw.polygon([(130, 150), (170, 40), (215, 140)], fill=(30, 60, 200))
    for at in range(8, width, 24):
        draw.line((at, height - 20, at + 12, height - 6), fill=(255, 255, 255), width=3)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def sample(source: door.Source) -> Batch:
    """An image with a question, if the model takes images, and a conversation without one, packed into one row."""
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "It is 42."}]}
    ]
    if source.has_tower:
        asked = {"role": "user", "content": "<image>What is drawn here?"}
        answer = {"role": "assistant", "content": "A yellow circle and a blue triangle."}
        rows.insert(0, {"messages": [asked, answer], "images": [{"bytes": picture()}]})
    encoder = Encoder(Renderer(source.path, source.geometry), source.geometry)
    encoded = [encoder.encoded(encoder.sample(row)) for row in rows]
    made = []
    for index, held in enumerate(encoded):
        patches = np.empty((held.patches, encoder.patch_width(encoded)), dtype=np.uint8)
        encoder.pixels(held, patches)
        made.append(Materialised(index, held, patches))
    return collate(made, source.geometry)


@torch.no_grad()
def trace(source: door.Source, batch: Batch, dtype: torch.dtype = torch.float32, adapter: Path | None = None) -> Trace:
    """Load the model of ``source`` in ``dtype`` on the CPU and run it on ``batch``; the model is gone afterwards.

    ``adapter`` is put beside its weights, as for inference.
    """
    model = door.load(source, dtype=dtype, device=torch.device("cpu"))
    held = [parameter.detach() for parameter in model.parameters()]
    count = sum(parameter.numel() for parameter in held)
    total = sum(float(parameter.sum(dtype=torch.float64)) for parameter in held)
    zeros = sum(parameter.numel() - int(parameter.count_nonzero()) for parameter in held)
    if adapter is not None:
        attach(source, model, str(adapter))
    model.eval()
    if not isinstance(model, VLM):
        raise UserError(f"--test_convert_precision true: {source.family.name} is not run layer by layer; leave it out")
    parts: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            parts[name] = output.float()

    patterns = (*source.plan.recompute_tower, *source.plan.recompute_decoder)
    for name, module in model.named_modules():
        if any(matches(pattern, name) for pattern in patterns):
            module.register_forward_hook(partial(keep, name))
    if isinstance(model.model, Trunk) and batch.media is not None:
        features = model.model.look(batch.media, dtype)
        parts["features"] = features.final.float()
        parts |= {f"deepstack features {level}": each.float() for level, each in enumerate(features.deepstack)}
    hidden = model.run(batch)
    parts["logits"] = hidden.float() @ model.head_weight.float().T
    return Trace(parts, count, total, zeros)


def drifts(first: Trace, second: Trace) -> list[Drift]:
    """How far ``second`` is from ``first``, part by part."""
    assert first.parts.keys() == second.parts.keys(), "two models of one family have the same parts"
    found = []
    for part, one in first.parts.items():
        apart = (one - second.parts[part]).abs()
        mean, size = float(apart.mean()), float(one.abs().mean())
        relative = mean / size if size else float("inf") if mean else 0.0
        finite = bool(torch.isfinite(apart).all())
        found.append(Drift(part, mean, float(apart.max()), relative if finite else float("inf")))
    return found


def report(first: Trace, second: Trace) -> Iterable[str]:
    """What :func:`check` prints, line by line."""
    for name in ("parameters", "total", "zeros"):
        one, two = getattr(first, name), getattr(second, name)
        yield f"  {name:<44} {one:>16,.10g} {two:>16,.10g}"
    yield f"  {'part':<44} {'mean diff':>12} {'max diff':>12} {'relative':>12}"
    for drift in drifts(first, second):
        yield f"  {drift.part:<44} {drift.mean:>12.3e} {drift.largest:>12.3e} {drift.relative:>12.3e}"
    best = [trace.parts["logits"].argmax(-1) for trace in (first, second)]
    yield f"  tokens of {len(best[0])} whose most likely successor differs: {int((best[0] != best[1]).sum())}"


def check(
    first: door.Source, second: door.Source, *, dtype: torch.dtype, limit: float, adapter: Path | None = None
) -> None:
    """Print how far two models are apart; UserError naming the first part that drifts by more than ``limit``.

    With an ``adapter`` beside the first one's weights, the second one should be the two of them merged.
    """
    batch = sample(first)
    one, two = trace(first, batch, dtype, adapter), trace(second, batch, dtype)
    told = f"{first.location} with {adapter}" if adapter is not None else str(first.location)
    print(f"precision  {told} against {second.location}, in {str(dtype).removeprefix('torch.')}")
    for line in report(one, two):
        print(line)
    beyond = next((drift for drift in drifts(one, two) if not drift.relative <= limit), None)
    if beyond is not None:
        raise UserError(
            f"--test_convert_precision: {second.location} first differs from {told} in {beyond.part}: relative drift "
            f"{beyond.relative:.2e}, at most {limit:.0e} was expected"
        )
    print(f"precision  equal within {limit:.0e}", flush=True)
