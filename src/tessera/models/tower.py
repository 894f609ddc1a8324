"""Vision towers: transformers' modules, unmodified, fed with integers that were computed on the CPU beforehand.

A tower of transformers 5 takes its window order, interpolation weights and segment boundaries as keyword arguments;
given those, its forward never asks the device a question. Three things around it are ours:

- pixel levels arrive as ``uint8`` and are normalised here, with transformers' own two roundings;
- the blocks' attention: all images (or windows) of one length in one call instead of a loop over segments, and a
  rotation of queries and keys with a third of the operators;
- the patch embedding, a convolution whose stride is its kernel, as the matrix product it is, and RMSNorm.

:func:`prepare` exchanges these children of the module once, parameters and names kept; :func:`run` is one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tessera.contract.batch import Media, Normalisation
from tessera.models.attention import Layout, attend, permuted, plan
from tessera.models.layers import PatchEmbed, RMSNorm
from tessera.models.rope import Angles, rotate


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


class TowerAttention(nn.Module):
    """Attention of a tower block with the ``qkv`` and ``proj`` of the module it takes over; called as that one was."""

    def __init__(self, taken: Any) -> None:
        super().__init__()
        self.qkv: nn.Module = taken.qkv
        self.proj: nn.Module = taken.proj
        self.heads: int = taken.num_heads
        self.scale: float = taken.scaling

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        layouts: tuple[Layout, ...],
        **unused: Any,
    ) -> Tensor:
        """``[P, E]`` to ``[P, E]``; the tables ``[P, D]`` hold each angle twice, ``cu_seqlens`` names the layout."""
        layout = next(layout for layout in layouts if layout.cu_seqlens is cu_seqlens)
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.heads, -1)).unbind(1)
        cos, sin = (table[:, None, : table.shape[-1] // 2] for table in position_embeddings)
        # The rotation is done in float32, as transformers does it; attention returns the type of the values.
        q, k = rotate(q.float(), Angles(cos, sin)), rotate(k.float(), Angles(cos, sin))
        q, k, v = (permuted(x, layout.order, layout.inverse) for x in (q, k, v))
        mixed = permuted(attend(q, k, v, layout, self.scale), layout.inverse, layout.order)
        out: Tensor = self.proj(mixed.flatten(1))
        return out


def prepare(tower: nn.Module, norm: type[nn.Module] | None = None) -> nn.Module:
    """Make a transformers vision module ready for :func:`run`; ``norm`` is its class of RMSNorm, if it has one."""
    for owner in list(tower.modules()):
        for leaf, child in list(owner.named_children()):
            old: Any = child
            if leaf == "patch_embed":
                owner.register_module(leaf, PatchEmbed(old.proj))
            elif leaf == "attn":
                owner.register_module(leaf, TowerAttention(old))
            elif norm is not None and isinstance(child, norm):
                owner.register_module(leaf, RMSNorm(old.weight.shape[0], old.variance_epsilon))
            elif leaf == "rotary_pos_emb":
                # Built on the meta device, its frequencies would be lost: buffers that no checkpoint stores.
                with torch.device("cpu"):
                    owner.register_module(leaf, type(child)(tower.config))
    return tower


def normalise(patches: Tensor, how: Normalisation) -> Tensor:
    """``patches [P, D] uint8``, channel-major, to float32 exactly as transformers' image processors compute it."""
    channels = len(how.mean)
    planes = patches.unflatten(1, (channels, -1))
    if how.fused:
        mean = torch.tensor(how.mean, device=patches.device) * (1.0 / how.rescale)
        std = torch.tensor(how.std, device=patches.device) * (1.0 / how.rescale)
        return planes.float().sub_(mean[:, None]).div_(std[:, None]).flatten(1)
    # The other processor works in NumPy, level by level; 256 levels per channel make a table of its results.
    levels = (np.arange(256, dtype=np.float64) * how.rescale).astype(np.float32)
    table = (levels[None] - np.array(how.mean, np.float32)[:, None]) / np.array(how.std, np.float32)[:, None]
    offsets = torch.arange(channels, device=patches.device)[:, None] * 256
    return torch.from_numpy(table).to(patches.device).flatten()[(planes.int() + offsets).flatten(1)]


def run(tower: nn.Module, media: Media, dtype: torch.dtype) -> Features:
    """Features of all items of ``media``, in order; activations of ``dtype`` (float32, or the autocast type)."""
    layouts = tuple(plan(segments, causal=False, dtype=dtype) for segments in media.tower_segments.values())
    inputs: dict[str, Any] = dict(media.tower)
    for (name, segments), layout in zip(media.tower_segments.items(), layouts, strict=True):
        inputs[name] = layout.cu_seqlens
        # cu_seqlens -> max_seqlen, cu_window_seqlens -> max_window_seqlen: given, the tower need not compute it.
        inputs[name.replace("cu_", "max_").removesuffix("s")] = segments.max_seqlen
    out = tower(normalise(media.patches, media.normalisation), grid_thw=media.grids, layouts=layouts, **inputs)
    deepstack = out.get("deepstack_features", ())
    return Features(out.pooler_output.to(dtype), tuple(feature.to(dtype) for feature in deepstack))
