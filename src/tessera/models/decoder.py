"""One packed decoder for every family: the common pre-norm block, with the options that set the families apart.

Activations are ``[T, H]``: the tokens of all segments of a microbatch, end to end, no batch dimension and no padding.
Position enters through the angles, segment boundaries through the attention layout; both are computed once per batch
and shared by all layers. Options: biases, norms on queries and keys, RoPE or m-RoPE, tied head, and *deepstack*, where
intermediate features of the vision tower are added to the image tokens after the first few layers.

Layers live in a ``ModuleDict`` keyed by their global index, so a parameter has the same name however the model is cut.
Linears are called, never looked into: an adapter may have replaced them.

For generation, keys and values go into a cache (``models/cache.py``) on the way, and attention reads them from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessera.contract.batch import Shard
from tessera.contract.memory import ActivationStore
from tessera.contract.seams import ONE_DEVICE, Seams
from tessera.models.attention import Layout, attend
from tessera.models.cache import Pass
from tessera.models.layers import GatedMLP, Linear, Recomputable, RMSNorm, forgetting
from tessera.models.moe import MoE, MoEConfig, Routing
from tessera.models.rope import Angles, Rope, RopeConfig, rotate


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and options of a decoder; ``head_dim`` need not be ``hidden / heads``."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope: RopeConfig
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    moe: MoEConfig | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What all layers share in one pass: angles, attention layout (None: the cache attends), seams, the cache's part.

    ``routing`` collects what the routers of sparse layers do, for those who want to know.
    """

    angles: Angles
    layout: Layout | None
    seams: Seams = ONE_DEVICE
    shard: Shard | None = None
    cache: Pass | None = None
    routing: Routing | None = None


class CoreAttention(Recomputable):
    """Attention without its projections: what the segments of a row make of queries, keys and values."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        return attend(q, k, v, layout)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions on ``[T, H]``."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.index = str(index)
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden, wide, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden, narrow, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden, narrow, bias=config.qkv_bias)
        self.o_proj = Linear(wide, config.hidden, bias=config.out_bias)
        self.core = CoreAttention()
        self.q_norm = RMSNorm(config.head_dim, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, k, context.angles)
        if context.cache is not None:
            context.cache.write(self.index, k, v)
        if context.layout is not None:
            q, k, v = context.seams.before_attention(q, k, v, context.shard)
            mixed = context.seams.after_attention(self.core(q, k, v, context.layout), context.shard)
        else:
            assert context.cache is not None
            mixed = context.cache.attend(self.index, q)
        out: Tensor = self.o_proj(mixed.flatten(1))
        return out


class Layer(Recomputable):
    """Pre-norm attention and gated MLP (or experts), each added to the residual stream ``[T, H]``."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        sparse = config.moe is not None and index in config.moe.layers
        self.mlp = _experts(config, index) if sparse else GatedMLP(config.hidden, config.inner, config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden, config.eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps)

    def run(self, x: Tensor, context: Context) -> Tensor:
        seams = context.seams
        with forgetting(self.input_layernorm, x) as normed:
            x = x + seams.scatter(self.self_attn(seams.gather(normed), context))
        with forgetting(self.post_attention_layernorm, x) as normed:
            if isinstance(self.mlp, MoE):  # every rank routes its own rows
                return x + self.mlp(normed, context.routing)
            out: Tensor = x + seams.scatter(self.mlp(seams.gather(normed)))
        return out


def _experts(config: DecoderConfig, index: int) -> MoE:
    assert config.moe is not None
    return MoE(config.moe, config.hidden, index)


class Decoder(nn.Module):
    """Embedding, layers and final norm; the head is the objective's business."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleDict({str(index): Layer(config, index) for index in range(config.layers)})
        self.norm = RMSNorm(config.hidden, config.eps)
        self.rope = Rope(config.rope, config.head_dim)
        self.seams = ONE_DEVICE
        self.recompute_group = 1  # this many layers share one checkpoint; single layers have their own
        self.store: ActivationStore | None = None

    def embed(self, tokens: Tensor) -> Tensor:
        """``tokens [n]`` to this rank's rows ``[n / tp, H]``, in the autocast type where autocast is on."""
        vocabulary = self.seams.vocabulary
        table = vocabulary.part(self.embed_tokens.weight)
        if table.shape[0] == self.config.vocab:
            x = self.embed_tokens(tokens)
        else:
            # Every rank looks up the tokens it has an entry for; the sum over ranks completes the rows.
            local = tokens - vocabulary.offset
            mine = (local >= 0) & (local < table.shape[0])
            x = self.seams.scatter(F.embedding(local * mine, table) * mine[:, None])
        return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x

    def blocks(
        self,
        x: Tensor,
        positions: Tensor,
        layout: Layout | None,
        deepstack: Sequence[Tensor] = (),
        dest: Tensor | None = None,
        *,
        cache: Pass | None = None,
        shard: Shard | None = None,
        keys: Sequence[str] | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """``x [T, H]`` through layers ``keys`` (None: all); ``deepstack[i]`` is added to rows ``dest`` after layer i.

        The final norm is the caller's: not every part of a pipeline has it.
        """
        context = Context(self.rope.angles(positions, x.dtype), layout, self.seams, shard, cache, routing)
        names = list(self.layers) if keys is None else list(keys)
        layers = [self.layers[name] for name in names]
        learning = self.training and torch.is_grad_enabled()
        size = self.recompute_group if learning else 1
        for first in range(0, len(names), size):
            group = names[first : first + size]
            span = range(first, first + len(group))
            with self.store.visit(span, layers) if self.store is not None and learning else nullcontext():
                if size > 1:
                    x = checkpoint(self._run, x, context, group, deepstack, dest, use_reentrant=False)
                else:
                    x = self._run(x, context, group, deepstack, dest)
        return x

    def _run(
        self, x: Tensor, context: Context, names: Sequence[str], deepstack: Sequence[Tensor], dest: Tensor | None
    ) -> Tensor:
        """The layers ``names``, each followed by its share of ``deepstack``."""
        for name in names:
            x = self.layers[name](x, context)
            if int(name) < len(deepstack):
                assert dest is not None
                x = x.index_add(0, dest, deepstack[int(name)].to(x.dtype))
        return x
