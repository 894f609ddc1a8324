"""Towers of one fixed size: a large image is shown as several square tiles, and once more as a whole, small.

A plain vision transformer knows one image size. To read fine print all the same, an image is resized to the canvas of
``columns x rows`` tiles whose shape is nearest to its own, cut, and followed by a *thumbnail*, the whole image on one
tile. Each tile is a sequence of its own, led by a learned *class token* that is dropped in the end::

    image -> canvases -> tiles [n] -> patches [n * p * p, D] -> per tile (class token + patches) -> blocks
          -> merge * merge patches side by side -> projector -> features [n * p * p / merge^2, H]

An item's grid is (tiles, patches down, patches across). Its patches come in block-major order, in which the patches of
one decoder token are neighbours (``models/geometry.py``); positions are looked up, so the order costs nothing, and
what others call pixel shuffle is here a change of shape. Parameters carry transformers' names.

Some models write a *tag* in front of each tile's features, so that the decoder knows which part of the image follows:
plain text, ``<tile_1>``, ``<tile_2>``, ..., and another for the thumbnail (:class:`TaggedGeometry`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.config.errors import UserError
from tessera.contract.batch import Grid, Media, Normalisation, Segments
from tessera.contract.model import SEAM, MediaItem
from tessera.models.attention import Layout, attend, plan
from tessera.models.decoder import Decoder
from tessera.models.geometry import MAX_ASPECT, block_major
from tessera.models.layers import Activation, Recomputable, RMSNorm
from tessera.models.tower import Features, normalise
from tessera.models.vlm import Trunk


def arrangement(height: int, width: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """(rows, columns) of ``side``-pixel tiles, ``fewest`` to ``most`` of them, nearest in shape to the image.

    Among equally near ones more tiles win as long as the image has more than half the pixels they would show.
    """
    shapes = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if fewest <= rows * columns <= most
    ]
    best, nearest = (1, 1), float("inf")
    for rows, columns in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        distance = abs(width / height - columns / rows)
        enough = height * width > 0.5 * side * side * rows * columns
        if distance < nearest or (distance == nearest and enough):
            best, nearest = (rows, columns), distance
    return best


@dataclass(frozen=True, slots=True)
class Switches:
    """Where a checkpoint keeps how images are cut: a ``file``, and what least, most and whether are called there."""

    file: str = "preprocessor_config.json"
    fewest: str = "min_patches"
    most: str = "max_patches"
    cut: str = "crop_to_patches"


@dataclass(slots=True)
class TiledGeometry:
    """Geometry of a tower of ``side``-pixel tiles; images only. ``behind`` follows a placeholder in the text.

    Images are ``cut`` into ``fewest`` to ``most`` tiles, and a thumbnail is not one of these.
    """

    patch_size: int
    merge_size: int
    side: int
    normalisation: Normalisation
    pad_ids: Mapping[str, int]
    placeholder: Mapping[str, str]
    behind: str = ""
    fewest: int = 1
    most: int = 12
    thumbnail: bool = True
    temporal_patch_size: int = 1
    resample: str = "bicubic"
    resize: str = "torch"
    cut: bool = True
    switches: Switches = Switches()

    def limited(
        self,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_max_pixels: int | None = None,
        fps: float | None = None,
        max_tiles: int | None = None,
        tiling: bool | None = None,
    ) -> TiledGeometry:
        """This geometry under the user's limits, which count in whole tiles here; the narrower of two holds.

        ``max_tiles`` may be more than the checkpoint's own, and means that images are cut.
        """

        def tiles(pixels: int | None, kept: int) -> int:
            return kept if pixels is None else max(pixels // self.side**2, 1)

        fewest, most = tiles(min_pixels, self.fewest), tiles(max_pixels, max_tiles or self.most)
        if max_tiles is not None:
            most = min(most, max_tiles)
        if min_pixels is not None and fewest > most:
            asked = f"MAX_PIXELS {most}" if max_tiles is None else f"at most {most} are allowed"
            raise UserError(f"MIN_PIXELS means {fewest} tiles, {asked}: raise the upper limit or lower MIN_PIXELS")
        cut = self.cut or max_tiles is not None if tiling is None else tiling
        return replace(self, fewest=min(fewest, most), most=most, cut=cut)

    def stored(self, file: str, held: Mapping[str, Any]) -> Mapping[str, Any]:
        """``held`` with how images are cut, if this file is where the checkpoint keeps that."""
        names = self.switches
        if file != names.file:
            return held
        return {**held, names.fewest: self.fewest, names.most: self.most, names.cut: self.cut}

    def resized(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """(height, width) in pixels of the canvas that is cut into tiles."""
        return self.canvases(height, width, frames)[0]

    def canvases(self, height: int, width: int, frames: int = 1) -> tuple[tuple[int, int], ...]:
        """The canvas that is cut, and the thumbnail if that makes several tiles."""
        if frames > 1:
            raise UserError("this model takes images only: choose another model or a dataset without videos")
        if min(height, width) <= 0 or max(height, width) / min(height, width) > MAX_ASPECT:
            raise UserError(f"an image of {width}x{height} pixels cannot be cut into tiles: its sides differ too much")
        fewest, most = (self.fewest, self.most) if self.cut else (1, 1)
        rows, columns = arrangement(height, width, self.side, fewest, most)
        whole = (rows * self.side, columns * self.side)
        return (whole, (self.side, self.side)) if self.thumbnail and rows * columns > 1 else (whole,)

    def grid(self, height: int, width: int, frames: int = 1) -> Grid:
        """(tiles, patches down, patches across) of an image of this original size."""
        pixels = sum(high * wide for high, wide in self.canvases(height, width, frames))
        across = self.side // self.patch_size
        return pixels // self.side**2, across, across

    def text(self, item: MediaItem) -> str:
        """One placeholder, whatever the number of tiles."""
        return self.placeholder[item.kind] + self.behind

    def slots(self, item: MediaItem) -> tuple[int, ...]:
        """Decoder tokens of the one pad token."""
        tiles, down, across = item.grid
        return (tiles * down * across // self.merge_size**2,)

    def positions(self, tokens: Tensor, items: Sequence[MediaItem]) -> Tensor:
        """``[T] int64``: 0 .. T-1."""
        return torch.arange(tokens.shape[0])

    def tower_inputs(self, grids: Sequence[Grid]) -> tuple[dict[str, Tensor], dict[str, Segments]]:
        """``table_index [P] int64``, each patch's learned position; ``cu_seqlens`` counts class tokens too."""
        parts = []
        for tiles, down, across in grids:
            rows, columns = block_major(down, across, self.merge_size)
            parts.append(np.tile(rows * (self.side // self.patch_size) + columns, tiles))
        lengths = [1 + down * across for tiles, down, across in grids for _ in range(tiles)]
        return {"table_index": torch.from_numpy(np.concatenate(parts))}, {"cu_seqlens": Segments.of(lengths)}

    def minimal_grid(self) -> Grid:
        """One tile of one token: nothing reads what it becomes."""
        return 1, self.merge_size, self.merge_size


PLAIN_TAGS = 6
"""Tags are numbered without a leading zero up to here."""


@dataclass(slots=True)
class TaggedGeometry(TiledGeometry):
    """A :class:`TiledGeometry` that writes a tag in front of every tile; ``pad`` is the text of the pad token.

    Each tag is text of its own for the tokenizer: next to other text it would have other tokens.
    """

    pad: str = "<image>"
    last: str = "<tile_global_thumbnail>"

    def tags(self, tiles: int) -> tuple[str, ...]:
        """What stands in front of each of so many tiles; the last one's is the thumbnail's, even if it is the only."""
        if self.cut and self.most > PLAIN_TAGS:
            return (*(f"<tile_{number:02d}>" for number in range(1, tiles)), f"{self.last[:-1]}0>")
        return (*(f"<tile_{number}>" for number in range(1, tiles)), self.last)

    def text(self, item: MediaItem) -> str:
        """The placeholder with a tagged pad for each tile."""
        front, _, back = self.placeholder[item.kind].partition(self.pad)
        return front + SEAM + "".join(tag + self.pad for tag in self.tags(item.grid[0])) + back + self.behind

    def slots(self, item: MediaItem) -> tuple[int, ...]:
        """Decoder tokens of each tile."""
        tiles, down, across = item.grid
        return (down * across // self.merge_size**2,) * tiles


@dataclass(frozen=True, slots=True)
class TiledConfig:
    """Sizes and options of the tower; ``norm(size)`` makes its norms, ``merge`` is the side of a decoder token.

    ``dummies`` are heads beyond ``heads``, which some checkpoints have so that their number divides well. Norms over
    all heads look at the real ones only; a checkpoint's dummies are all zero, and stay so.
    """

    depth: int
    hidden: int
    inner: int
    heads: int
    patch: int
    side: int
    merge: int
    norm: Callable[[int], nn.Module]
    act: Activation
    qkv_bias: bool
    qk_norm: bool
    final_norm: bool
    table: bool = True
    mask_token: bool = False
    channels: int = 3
    qk_eps: float = 1e-6
    dummies: int = 0


class PaddedNorm(nn.Module):
    """RMSNorm of ``[..., width]`` by the first ``size`` entries, which are all that counts of it."""

    def __init__(self, width: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.size = size
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = (wide[..., : self.size].square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (wide * scale).to(x.dtype) * self.weight.to(x.dtype)


class TiledAttention(nn.Module):
    """Bidirectional self-attention on ``[P, E]``; queries and keys may be normed over all heads together."""

    def __init__(self, config: TiledConfig) -> None:
        super().__init__()
        size, self.heads = config.hidden, config.heads + config.dummies
        width = size // config.heads * self.heads
        self.q_proj = nn.Linear(size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, width, bias=config.qkv_bias)
        self.projection_layer = nn.Linear(width, size)

        def norm() -> nn.Module:
            if not config.qk_norm:
                return nn.Identity()
            return PaddedNorm(width, size, config.qk_eps) if config.dummies else RMSNorm(size, config.qk_eps)

        self.q_norm = norm()
        self.k_norm = norm()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        parts = (self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        out: Tensor = self.projection_layer(attend(q, k, v, layout).flatten(1))
        return out


class TiledMLP(nn.Module):
    """``fc2(act(fc1(x)))`` on ``[P, E]``."""

    def __init__(self, config: TiledConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.inner)
        self.fc2 = nn.Linear(config.inner, config.hidden)
        self.act = config.act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class TiledBlock(Recomputable):
    """Pre-norm attention and MLP, each scaled per channel and added to the residual stream ``[P, E]``."""

    def __init__(self, config: TiledConfig) -> None:
        super().__init__()
        self.attention = TiledAttention(config)
        self.mlp = TiledMLP(config)
        self.layernorm_before = config.norm(config.hidden)
        self.layernorm_after = config.norm(config.hidden)
        self.lambda_1 = nn.Parameter(torch.ones(config.hidden))
        self.lambda_2 = nn.Parameter(torch.ones(config.hidden))

    def run(self, x: Tensor, layout: Layout) -> Tensor:
        x = self.lambda_1 * self.attention(self.layernorm_before(x), layout) + x
        out: Tensor = self.lambda_2 * self.mlp(self.layernorm_after(x)) + x
        return out


class TiledEmbeddings(nn.Module):
    """Patches, class tokens and learned positions (row 0 of the table is the class token's)."""

    def __init__(self, config: TiledConfig) -> None:
        super().__init__()
        size, patch = config.hidden, config.patch
        self.cls_token = nn.Parameter(torch.empty(1, 1, size))
        self.mask_token = nn.Parameter(torch.empty(1, 1, size)) if config.mask_token else None
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Conv2d(config.channels, size, patch, stride=patch)
        places = (config.side // patch) ** 2 + 1
        self.position_embeddings = nn.Parameter(torch.empty(1, places, size)) if config.table else None

    def forward(self, patches: Tensor, index: Tensor, tiles: int) -> Tensor:
        """``patches [n * p, p * p * C]`` with pixels as in the image, to ``[n, 1 + p, E]``."""
        convolution = self.patch_embeddings.get_submodule("projection")
        assert isinstance(convolution, nn.Conv2d)
        # A convolution whose stride is its kernel is a product; the kernel is turned to meet the pixels.
        kernel = convolution.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.linear(patches.to(kernel.dtype), kernel, convolution.bias)
        first: Tensor = self.cls_token
        if self.position_embeddings is not None:
            x = x + self.position_embeddings[0].index_select(0, index + 1)
            first = first + self.position_embeddings[:, :1]
        return torch.cat([first.expand(tiles, 1, -1).to(x.dtype), x.unflatten(0, (tiles, -1))], dim=1)


class TiledTower(nn.Module):
    """The vision transformer; see the module docstring."""

    def __init__(self, config: TiledConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TiledEmbeddings(config)
        blocks = nn.ModuleList([TiledBlock(config) for _ in range(config.depth)])
        self.encoder = nn.ModuleDict({"layer": blocks})
        self.layernorm = config.norm(config.hidden) if config.final_norm else nn.Identity()

    def forward(self, media: Media, dtype: torch.dtype) -> Tensor:
        """Merged patches ``[V, merge^2 * E]`` of all tiles, without class tokens."""
        segments = media.tower_segments["cu_seqlens"]
        assert len(set(segments.lengths)) == 1, "tiles have one size"
        tiles = len(segments.lengths)
        layout = plan(segments, causal=False, dtype=dtype)
        patches = normalise(media.patches, media.normalisation)
        x = self.embeddings(patches, media.tower["table_index"], tiles).flatten(0, 1)
        for block in self.encoder["layer"].children():
            x = block(x, layout)
        x = self.layernorm(x).unflatten(0, (tiles, -1))[:, 1:]
        return x.reshape(-1, self.config.merge**2 * self.config.hidden)

    def cost(self, grid: Grid) -> float:
        """Relative arithmetic of encoding one image: every tile costs the same."""
        tiles, down, across = grid
        return tiles * down * across * (1.0 + down * across / (6.0 * self.config.hidden))


class Projector(nn.Module):
    """From merged patches ``[V, merge^2 * E]`` to the decoder's ``[V, H]``, over ``inner`` (H if not given)."""

    def __init__(self, wide: int, out: int, act: Activation, inner: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(wide)
        self.linear_1 = nn.Linear(wide, inner or out, bias=bias)
        self.linear_2 = nn.Linear(inner or out, out, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(self.act(self.linear_1(self.layer_norm(x))))
        return out


class TiledTrunk(Trunk):
    """Tower, projector and decoder under the names these models have."""

    def __init__(self, vision_tower: TiledTower, projector: Projector, language_model: Decoder) -> None:
        nn.Module.__init__(self)
        self.vision_tower = vision_tower
        self.multi_modal_projector = projector
        self.language_model = language_model

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.vision_tower

    @property
    def levels(self) -> int:
        """No deepstack."""
        return 0

    def look(self, media: Media, dtype: torch.dtype) -> Features:
        """Features of all items of ``media``, in order."""
        return Features(self.multi_modal_projector(self.vision_tower(media, dtype)).to(dtype))
