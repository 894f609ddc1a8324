"""What a training step will cost, from numbers alone, before anything is allocated.

Memory has two parts. What stays: weights, gradients and optimiser state, a few bytes per parameter, exact. What comes
and goes: activations, which the backward pass needs and which grow with the tokens of a microbatch. For one decoder
layer and one token, autograd keeps (h hidden, q and k widths of queries and keys, i the MLP's inner width)::

    two norms        input and output               4h
    attention        queries, keys, values, output  2q + 2k    (+ q + k with norms on queries and keys)
    gated MLP        gate, silu(gate), up, product  4i         (2i without a gate)

so ``layers x tokens`` times that. A recomputed layer, or group of layers, keeps its input ``h``, and one group is there
in full; recomputed parts of layers leave their share out. The head
holds one chunk of logits. These are estimates: allocator fragmentation, kernels' workspaces and the process itself
(about half a GiB) come on top; what the run really took is ``memory(GiB)`` in its log.

FLOPs: a matrix product costs 2 per parameter and token; backward costs that once for the inputs' gradient and once
for the weights'. Training everything is therefore 6N, with recompute 8N; attention adds ``6 x layers x q x context``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tessera.contract.memory import Recompute

FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Stack:
    """Widths of a stack of transformer layers, of a decoder or a tower.

    ``queries`` and ``keys`` are heads x head size; ``intermediate`` is the width one token goes through (for a mixture
    of experts: experts per token x expert width); ``gated`` MLPs have a gate, ``qk_norm`` normalises queries and keys.
    """

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    gated: bool = True
    qk_norm: bool = False

    def activation_bytes(self, itemsize: int, recomputed: Collection[str] = ()) -> int:
        """Bytes that autograd keeps per token and layer; ``recomputed`` parts keep what the others need of them.

        Core attention is not in the sum: its inputs and its output are saved by what surrounds it.
        """
        attention = (3 if self.qk_norm else 2) * (self.queries + self.keys)
        norms = (2 if "layernorm" in recomputed else 4) * self.hidden
        mlp = 0 if {"mlp", "moe"} & set(recomputed) else (4 if self.gated else 2) * self.intermediate
        return (norms + attention + mlp) * itemsize

    def transient_bytes(self, itemsize: int) -> int:
        """Bytes per token of the gradients alive inside one layer's backward."""
        return (2 * self.hidden + 3 * self.intermediate) * itemsize


def stacks_of(config: Mapping[str, Any]) -> tuple[Stack | None, Stack | None]:
    """(decoder, tower) as a checkpoint's ``config.json`` describes them; None where it describes none."""
    text = config.get("text_config") or config.get("llm_config") or config
    return _stack(text), _stack(config.get("vision_config") or {})


def _stack(config: Mapping[str, Any]) -> Stack | None:
    def first(*names: str) -> int:
        return next((int(config[name]) for name in names if isinstance(config.get(name), int)), 0)

    layers, hidden = first("num_hidden_layers", "depth", "n_layer"), first("hidden_size", "embed_dim")
    heads = first("num_attention_heads", "num_heads")
    if not (layers and hidden and heads):
        return None
    head = first("head_dim") or hidden // heads
    dense = first("intermediate_size") or int(hidden * float(config.get("mlp_ratio") or 4))
    expert = first("moe_intermediate_size") * first("num_experts_per_tok")
    act = str(config.get("hidden_act") or config.get("hidden_activation") or "silu")
    return Stack(
        layers=layers,
        hidden=hidden,
        intermediate=expert or dense,
        queries=heads * head,
        keys=(first("num_key_value_heads") or heads) * head,
        gated="silu" in act or "swish" in act,
        qk_norm="head_dim" in config and "vocab_size" in config and not config.get("attention_bias", False),
    )


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters as they lie in memory: ``count`` of them in ``size`` bytes, of which so many are trained."""

    count: int
    size: int
    trained: int
    trained_size: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one microbatch puts through the model.

    ``tokens`` through the decoder, ``patches`` through the tower, ``itemsize`` bytes of the compute dtype (2 or 4),
    ``vocab`` rows of the head and ``logits_chunk`` supervised tokens at a time. Activations of the first ``offloaded``
    decoder layers go to the host.
    """

    tokens: int
    vocab: int
    patches: int = 0
    itemsize: int = FLOAT32
    logits_chunk: int = 1024
    accumulation: int = 1
    recompute: Recompute | bool = False
    offloaded: int = 0
    recompute_tower: bool = False
    train_decoder: str = "weights"  # "weights", "adapters", or "nothing" (then nothing below it trains either)
    train_tower: str = "weights"


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Estimated peak in bytes and the parts of it; parts that are never alive together sum to more than ``total``."""

    total: int
    parts: Mapping[str, int] = field(default_factory=dict)
    complete: bool = True

    @property
    def gib(self) -> float:
        """The estimated peak in GiB."""
        return self.total / 2**30

    def line(self) -> str:
        """The estimate in one line, its parts from large to small."""
        parts = sorted(((size, name) for name, size in self.parts.items() if size), reverse=True)
        shown = ", ".join(f"{name} {human_bytes(size)}" for size, name in parts)
        more = "" if self.complete else "; activations unknown for this architecture"
        return f"~{human_bytes(self.total)} (estimate: {shown}{more})"


def estimate_memory(
    weights: Weights,
    work: Work,
    decoder: Stack | None,
    tower: Stack | None = None,
    *,
    states: int = 2,
    shards: int = 1,
    gather: int | None = None,
    host_share: float = 0.0,
) -> MemoryEstimate:
    """Peak memory of training on one device.

    ``states`` values per trained parameter in the optimiser (AdamW 2, Muon 1). ``shards`` ranks share weights,
    gradients and optimiser state; ``gather`` bytes of weights also exist in full during a step (all that ranks share by
    default, as under ZeRO-1 and -2).
    ``host_share`` of the optimiser's state lies elsewhere.
    """
    held = weights.size // shards + ((weights.size if gather is None else gather) if shards > 1 else 0)
    copies = weights.count * work.itemsize if weights.size > weights.count * work.itemsize else 0
    gradients = weights.trained_size // shards
    optimizer = int(states * weights.trained_size * (1 - host_share)) // shards
    of_decoder = _activations(
        decoder, work.tokens, work.itemsize, work.recompute, work.train_decoder, offloaded=work.offloaded
    )
    of_tower = _activations(tower, work.patches, work.itemsize, work.recompute_tower, work.train_tower)
    hidden = decoder.hidden if decoder else 0
    rows = min(work.logits_chunk, work.tokens)
    logits = rows * work.vocab * (2 * FLOAT32 + (work.itemsize if work.itemsize < FLOAT32 else 0))
    logits += work.vocab * hidden * FLOAT32 if work.train_decoder == "weights" else 0
    moving = of_decoder + of_tower + logits
    # Gradients appear while activations disappear, unless they are kept from earlier microbatches.
    overlap = gradients + moving if work.accumulation > 1 else max(gradients, moving)
    parts = {
        "weights": held,
        "16-bit copies": copies,
        "optimizer": optimizer,
        "gradients": gradients,
        "decoder activations": of_decoder,
        "tower activations": of_tower,
        "logits": logits,
    }
    return MemoryEstimate(held + copies + optimizer + overlap, parts, complete=decoder is not None)


def _activations(
    stack: Stack | None, rows: int, itemsize: int, recompute: Recompute | bool, trains: str, *, offloaded: int = 0
) -> int:
    if stack is None or not rows:
        return 0
    layer = stack.activation_bytes(itemsize)
    if trains == "nothing":
        return rows * layer  # one layer at a time, forward only
    how = Recompute.of(recompute)
    spans = how.spans(stack.layers)
    covered = sum(len(span) for span in spans)
    kept = stack.activation_bytes(itemsize, how.modules if how.granularity == "selective" else ())
    # What each group, then each layer outside of one, keeps; and what is there again while it is recomputed.
    held = [(span.start, stack.hidden * itemsize) for span in spans]
    held += [(position, kept) for position in range(covered, stack.layers)]
    again = max((len(span) for span in spans), default=0) * layer + (layer - kept)
    moving = 2 * max(size for start, size in held if start < offloaded) if offloaded else 0
    resident = sum(size for start, size in held if start >= offloaded)
    return rows * (resident + moving + again + stack.transient_bytes(itemsize))


def forward_flops_per_token(stack: Stack, context: float, *, head: int = 0, causal: bool = True) -> float:
    """FLOPs of one token's forward pass: ``2N`` for matrix products (``head`` = vocabulary size) plus attention.

    ``context`` is the mean length of the token's own sequence; causal attention sees half of it on average.
    """
    mlp = (3 if stack.gated else 2) * stack.hidden * stack.intermediate
    matrices = stack.layers * (2 * stack.hidden * (stack.queries + stack.keys) + mlp) + head * stack.hidden
    attention = 4 * stack.layers * stack.queries * context * (0.5 if causal else 1.0)
    return 2.0 * matrices + attention


def train_flops_per_token(
    stack: Stack, context: float, *, head: int = 0, causal: bool = True, recompute: bool = False, adapters: bool = False
) -> float:
    """FLOPs of one token's forward and backward pass: 3 x forward, 2 x if only adapters train, + 1 with recompute."""
    forward = forward_flops_per_token(stack, context, head=head, causal=causal)
    return forward * ((2 if adapters else 3) + (1 if recompute else 0))


def human_bytes(size: float) -> str:
    """``size`` in bytes with three digits and a binary unit: ``1.25 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB" if size < 100 else f"{size:.0f} GiB"


def human_count(number: float) -> str:
    """A count as people write it: ``812``, ``8.19K``, ``19.77M``, ``7.62B``."""
    if number < 1000:
        return f"{number:.0f}"
    for scale, unit in ((1e3, "K"), (1e6, "M"), (1e9, "B")):
        if number < scale * 1000 or unit == "B":
            return f"{number / scale:.2f}{unit}"
    raise AssertionError(number)
