"""Vision towers: transformers' modules, unmodified, fed with integers that were computed on the CPU beforehand.

A tower of transformers 5 takes its window order, interpolation weights and segment boundaries as keyword arguments;
given those, its forward never asks the device a question. Three things around it are ours:

- pixel levels arrive as ``uint8`` and are normalised here, with transformers' own two roundings;
- attention is registered with transformers' ``AttentionInterface`` under a name that contains "flash", which makes
  the tower pass all images (or windows) in one call: one batched call per length instead of a loop over segments;
- the patch embedding, a convolution whose stride is its kernel, is computed as a matrix product, and RMSNorm is ours.

:func:`prepare` does the last two once, :func:`run` is one pass.
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

ATTENTION = "tessera_flash_varlen"
"""Name of our attention in transformers; "flash" in it selects the one-call path."""


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


def prepare(tower: nn.Module, norm: type[nn.Module] | None = None) -> nn.Module:
    """Make a transformers vision module ready for :func:`run`; parameter names stay as they are.

    ``norm`` is the tower's class of RMSNorm, if it has one: ours computes the same with half the operators.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    # After construction, because transformers looks names that contain "flash" up on its hub while constructing.
    config: Any = tower.config
    config._attn_implementation = ATTENTION
    embed = tower.get_submodule("patch_embed")
    tower.patch_embed = PatchEmbed(embed.get_submodule("proj"))
    for owner in list(tower.modules()):
        for leaf, child in list(owner.named_children()):
            if norm is not None and isinstance(child, norm):
                old: Any = child
                owner.register_module(leaf, RMSNorm(old.weight.shape[0], old.variance_epsilon))
    # Built on the meta device, rotary frequencies would be lost: they are buffers that no checkpoint stores.
    with torch.device("cpu"):
        tower.rotary_pos_emb = type(tower.get_submodule("rotary_pos_emb"))(config)
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


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    layouts: tuple[Layout, ...] = (),
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: ``[1, heads, T, D]`` each to ``[1, T, heads, D]``."""
    layout = next(layout for layout in layouts if layout.cu_seqlens is cu_seq_lens_q)
    q, k, v = (permuted(x.squeeze(0).transpose(0, 1), layout.order, layout.inverse) for x in (query, key, value))
    out = attend(q, k, v, layout, scaling)
    return permuted(out, layout.inverse, layout.order).unsqueeze(0), None
