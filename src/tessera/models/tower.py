"""One vision tower for every own family: packed like the decoder, and told everything it needs beforehand.

A tower is a transformer over the patches of all images of a batch, end to end ``[P, E]``, no padding::

    pixels [P, T * p * p * C] uint8 -> normalise -> patch embedding -> blocks -> merger -> features [P / merge^2, H]

Attention stays inside one image (or video frame), or inside one *window* of it: for windowed towers the patches are
brought into window order once, before the first block, and the features back into image order after the merger. All
integers that this takes (window order, positions, segment boundaries, taps into a learned position table) come with the
batch, so a forward pass never asks the device a question. Positions enter as rotary angles, half of a head's
frequencies following the row and half the column.

What sets families apart are the modules a :class:`TowerConfig` makes (norm, MLP, merger), which blocks look at whole
images, and *deepstack*: features of earlier blocks, merged by mergers of their own, for the decoder's first layers.
Parameters carry transformers' names. Importing transformers' own towers would cost more than half of a start-up, and
running them a segment at a time; the tests hold this one to their outputs and gradients instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tessera.contract.batch import Grid, Media, Normalisation, Route
from tessera.contract.seams import Seams
from tessera.models.attention import Layout, attend, permuted, plan
from tessera.models.layers import PatchEmbed, Recomputable
from tessera.models.rope import Angles, axial_angles, rotate


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """Sizes of a tower and the makers of its parts.

    ``norm(size)``, ``mlp()`` and ``merger(first_norm_after_merging)`` make modules; ``whole`` lists the blocks that
    attend to whole images (None: all, no windows); ``table`` is the number of learned positions (0: none);
    ``deepstack`` lists the blocks whose output goes to the decoder's first layers.
    """

    depth: int
    hidden: int
    heads: int
    patch: int
    temporal: int
    merge: int
    norm: Callable[[int], nn.Module]
    mlp: Callable[[], nn.Module]
    merger: Callable[[bool], nn.Module]
    patch_bias: bool
    qkv_bias: bool = True
    out_bias: bool = True
    channels: int = 3
    theta: float = 10000.0
    whole: frozenset[int] | None = None
    table: int = 0
    deepstack: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Features:
    """A tower's output: ``final [V, H]``, and ``deepstack`` ``[V, H]`` each for the decoder's first layers."""

    final: Tensor
    deepstack: tuple[Tensor, ...] = ()

    def landing(self, rows: int) -> Features:
        """The first ``rows`` rows: all of them, or none of a minimal frame."""
        if rows == self.final.shape[0]:
            return self
        assert rows == 0, f"{rows} image tokens for {self.final.shape[0]} features"
        return Features(self.final[:0], tuple(feature[:0] for feature in self.deepstack))

    def moved(self, seams: Seams, route: Route) -> Features:
        """The rows that land on this rank, from whichever rank encoded them; all levels travel together."""
        levels = (self.final, *self.deepstack)
        final, *deepstack = seams.exchange(torch.cat(levels, 1), route).split(self.final.shape[1], 1)
        return Features(final, tuple(deepstack))


class TowerAttention(nn.Module):
    """Bidirectional self-attention of a block on ``[P, E]``, in the segments of a layout."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden, config.hidden, bias=config.out_bias)
        self.heads = config.heads

    def forward(self, x: Tensor, angles: Angles, layout: Layout) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        # The rotation is done in float32, as transformers does it; attention returns the type of the values.
        q, k = rotate(q.float(), k.float(), angles)
        q, k, v = (permuted(part, layout.order, layout.inverse) for part in (q, k, v))
        mixed = permuted(attend(q, k, v, layout), layout.inverse, layout.order)
        out: Tensor = self.proj(mixed.flatten(1))
        return out


class Block(Recomputable):
    """Pre-norm attention and MLP, each added to the residual stream ``[P, E]``."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.norm1 = config.norm(config.hidden)
        self.norm2 = config.norm(config.hidden)
        self.attn = TowerAttention(config)
        self.mlp = config.mlp()

    def run(self, x: Tensor, angles: Angles, layout: Layout) -> Tensor:
        x = x + self.attn(self.norm1(x), angles, layout)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Tower(nn.Module):
    """The vision tower; see the module docstring."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.channels, config.temporal, config.patch, config.hidden, config.patch_bias)
        if config.table:
            self.pos_embed = nn.Embedding(config.table, config.hidden)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.merger = config.merger(False)
        if config.deepstack:
            self.deepstack_merger_list = nn.ModuleList([config.merger(True) for _ in config.deepstack])

    def forward(self, media: Media, dtype: torch.dtype) -> Features:
        """Features of all items of ``media``, in order, as ``dtype`` (float32, or the autocast type)."""
        config, inputs, windows = self.config, media.tower, media.tower_segments.get("cu_window_seqlens")
        images = plan(media.tower_segments["cu_seqlens"], causal=False, dtype=dtype)
        inside = images if windows is None else plan(windows, causal=False, dtype=dtype)
        x = self.embedded(media)
        order, positions = inputs.get("window_index"), inputs["position_ids"]
        inverse = None if order is None else _inverse(order)
        x, positions = self._cells(x, order, inverse), self._cells(positions, order, inverse)
        angles = axial_angles(positions, config.hidden // config.heads, config.theta)
        deepstack = []
        for index, block in enumerate(self.blocks):
            x = block(x, angles, images if config.whole is None or index in config.whole else inside)
            if index in config.deepstack:
                merger = self.deepstack_merger_list[config.deepstack.index(index)]
                deepstack.append(merger(x).to(dtype))
        final = permuted(self.merged(x).to(dtype), inverse, order)
        return Features(final, tuple(deepstack))

    def cost(self, grid: Grid) -> float:
        """Relative arithmetic of encoding one item: a patch's products, and its attention to the others."""
        config, (t, h, w) = self.config, grid
        whole = 1.0 if config.whole is None else len(config.whole) / config.depth
        return t * h * w * (1.0 + whole * h * w / (6.0 * config.hidden))

    def embedded(self, media: Media) -> Tensor:
        """Patches ``[P, E]`` as they enter the first block."""
        x: Tensor = self.patch_embed(normalise(media.patches, media.normalisation))
        if self.config.table:
            x = x + self._table_positions(media.tower["interp_indices"], media.tower["interp_weights"]).to(x.dtype)
        return x

    def merged(self, x: Tensor) -> Tensor:
        """Patches ``[P, E]`` as they leave the last block to features ``[P / merge^2, H]``."""
        out: Tensor = self.merger(x)
        return out

    def _table_positions(self, taps: Tensor, shares: Tensor) -> Tensor:
        """Learned positions ``[P, E]`` interpolated from ``taps [P, 4]`` entries with ``shares [P, 4]``."""
        return (self.pos_embed(taps) * shares[:, :, None]).sum(1)

    def _cells(self, x: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
        """Rows of ``x [P, ...]`` with the merge cells in ``order [P / merge^2]``."""
        if order is None:
            return x
        return permuted(x.unflatten(0, (-1, self.config.merge**2)), order, inverse).flatten(0, 1)


def _inverse(order: Tensor) -> Tensor:
    out = torch.empty_like(order)
    out[order] = torch.arange(len(order), device=order.device)
    return out


def normalise(patches: Tensor, how: Normalisation) -> Tensor:
    """``patches [P, D] uint8`` to float32, each level exactly as transformers' image processors compute it."""
    channels = len(how.mean)
    repeats = patches.shape[1] // channels
    if how.fused:
        mean = torch.tensor(how.mean, device=patches.device) * (1.0 / how.rescale)
        std = torch.tensor(how.std, device=patches.device) * (1.0 / how.rescale)
        return patches.float().sub_(mean.repeat(repeats)).div_(std.repeat(repeats))
    # The other processor works in NumPy, level by level; 256 levels per channel make a table of its results.
    levels = (np.arange(256, dtype=np.float64) * how.rescale).astype(np.float32)
    table = (levels[None] - np.array(how.mean, np.float32)[:, None]) / np.array(how.std, np.float32)[:, None]
    offsets = torch.arange(channels, device=patches.device).repeat(repeats) * 256
    return torch.from_numpy(table).to(patches.device).flatten()[patches.int() + offsets]


def channel_major(patches: Tensor, channels: int) -> Tensor:
    """``patches [P, D]`` of any type with their channels brought to the front, as transformers lays them out."""
    return patches.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1)
