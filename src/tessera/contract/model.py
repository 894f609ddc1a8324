"""What a model is to the rest of the house.

A **family** is five values: how to read its ``config.json`` (``config``), the CPU-only facts about its images and
positions (``geometry``), how it is cut (``plan``), what its tensors are called on disk (``weightmap``), and a random
few-million-parameter instance for tests (``tiny``). Everything else in tessera is written once, against these.

A model maps a :class:`~tessera.contract.batch.Batch` to hidden states. An **objective** turns hidden states into a
:class:`LossSum`; it runs *inside* the model's forward (``model(batch, objective)``) because that is where sharded
parameters, the head's among them, are gathered. It returns sums and never divides and never communicates: the
training step divides once, by the weight of the whole global batch, which is known before the first forward. That is
why gradient accumulation, packing and data parallelism all give the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tessera.contract.batch import Batch, Grid, Normalisation, Segments
from tessera.contract.plan import Plan
from tessera.contract.seams import Vocabulary
from tessera.contract.weightmap import WeightMap

HFConfig = Mapping[str, Any]
"""A checkpoint's ``config.json``, parsed."""

SEAM = "\U000f0013"
"""Stands in a media item's text where two tokens must not become one; it is no text itself."""


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss before division: ``total`` (0-dim float32, differentiable) over ``weight``.

    ``metrics`` are further 0-dim sums (detached), e.g. ``correct`` and ``count``; the step reduces them like ``total``.
    """

    total: Tensor
    weight: float
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits: ``weight [V, H]``, or this rank's rows of it and which those are."""

    weight: Tensor
    vocabulary: Vocabulary = field(default_factory=Vocabulary)


class Objective(Protocol):
    """What is optimised: a pure function of hidden states ``[T, H]``, the head and the batch.

    ``metrics`` are the names of the metrics it returns.
    """

    @property
    def metrics(self) -> tuple[str, ...]: ...

    def __call__(self, hidden: Tensor, head: Head, batch: Batch) -> LossSum: ...


class Model(Protocol):
    """A trainable module: ``model(batch, objective)`` is a LossSum, ``model(batch)`` the hidden states ``[T, H]``."""

    def __call__(self, batch: Batch, objective: Objective | None = None) -> Any: ...


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image or video of a sample, in the order in which its placeholder appears in the text.

    ``kind`` is ``image`` or ``video``; ``grid`` its patches; ``timestamps`` the seconds of each sampled frame (video).
    """

    kind: str
    grid: Grid
    timestamps: tuple[float, ...] = ()


class Geometry(Protocol):
    """CPU-only facts of a family about pixels, placeholders and positions; pure functions, safe in any thread.

    ``placeholder[kind]`` is what the chat template prints for one media item and ``pad_ids[kind]`` the id of the token
    in it that is repeated. A text-only family has ``patch_size`` 0. ``resize`` is whose arithmetic the family's images
    are resized with, ``torch`` or ``pil``.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    normalisation: Normalisation
    resample: str
    resize: str
    placeholder: Mapping[str, str]
    pad_ids: Mapping[str, int]

    def resized(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """(height, width) in pixels after the family's resize rule; UserError for an impossible aspect ratio."""
        ...

    def canvases(self, height: int, width: int, frames: int = 1) -> tuple[tuple[int, int], ...]:
        """(height, width) of every size a frame is shown in; larger ones than the grid are cut, row by row."""
        ...

    def grid(self, height: int, width: int, frames: int = 1) -> Grid:
        """Patch grid of a media item of this original size; from the header alone."""
        ...

    def text(self, item: MediaItem) -> str:
        """What replaces ``placeholder[item.kind]`` in the rendered text; holds one pad token per slot.

        Text is tokenised apart before and behind a :data:`SEAM`. A newline at its end is dropped if one follows.
        """
        ...

    def slots(self, item: MediaItem) -> tuple[int, ...]:
        """How often each pad token of ``text(item)`` is repeated; sums to the item's vision tokens."""
        ...

    def positions(self, tokens: Tensor, items: Sequence[MediaItem]) -> Tensor:
        """``[T]`` or ``[3, T]`` int64 positions of one segment, from its expanded ``tokens [T]``."""
        ...

    def tower_inputs(self, grids: Sequence[Grid]) -> tuple[dict[str, Tensor], dict[str, Segments]]:
        """Precomputed integer inputs of the tower and its attention segments, both by argument name."""
        ...

    def limited(
        self,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_max_pixels: int | None = None,
        fps: float | None = None,
        max_tiles: int | None = None,
        tiling: bool | None = None,
    ) -> Geometry:
        """This geometry under the user's limits (None keeps one).

        ``max_tiles`` and ``tiling`` are about models that cut images into tiles; UserError for others with images.
        """
        ...

    def stored(self, file: str, held: Mapping[str, Any]) -> Mapping[str, Any]:
        """``held``, the parsed ``config.json`` or ``preprocessor_config.json`` (``file``), with this one's limits."""
        ...

    def minimal_grid(self) -> Grid:
        """Grid of the smallest frame the tower can run on (one merge cell)."""
        ...


@dataclass(frozen=True)
class Family:
    """One model family; see the module docstring. All callables take the parsed ``config.json`` of a checkpoint.

    ``build`` returns the module with uninitialised parameters on the current default device (use
    ``torch.device("meta")``); its module names are those of the transformers model in memory, so adapters and state
    dicts are interchangeable. ``geometry`` also takes the parsed ``preprocessor_config.json`` (``{}`` if there is
    none). ``weightmap`` also takes the tensor names found on disk, for families whose naming changed between releases.
    ``tokens`` are entries that a ``config.json`` may leave to the tokenizer: the first of these texts that is one token
    of the checkpoint's becomes the entry, and its id the entry of that name with ``_id`` behind.
    """

    name: str
    model_types: tuple[str, ...]
    build: Callable[[HFConfig], nn.Module]
    geometry: Callable[[HFConfig, Mapping[str, Any]], Geometry]
    plan: Callable[[HFConfig], Plan]
    weightmap: Callable[[HFConfig, Sequence[str]], WeightMap]
    tiny: Callable[[], dict[str, Any]]
    tokens: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called ``float32``, ``bfloat16`` or ``float16``."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
