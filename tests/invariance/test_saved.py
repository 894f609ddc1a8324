"""What recomputation is for: the bytes that a forward pass leaves behind for backward, counted.

Every storage that an operator allocates is watched; those still alive after the forward pass are what it costs.
"""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from tessera.contract.batch import Batch, Segments
from tessera.contract.memory import Recompute
from tessera.models.families import family_of
from tessera.observe.cost import Weights, Work, estimate_memory, stacks_of
from tests.parity.reference import ours

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LENGTHS = (96, 80, 80)


class Live(TorchDispatchMode):
    """The bytes of all storages that were allocated under it and are still alive; a storage counts once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.storages = WeakIdKeyDictionary()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.weights:
                self.storages[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        return out

    def bytes(self) -> int:
        gc.collect()
        return sum(self.storages.values())


def left_behind(how: Recompute, *, bf16: bool = False) -> int:
    """Bytes alive between forward and backward, in a decoder that recomputes as told."""
    family = family_of(CONFIG)
    model = ours(CONFIG).train()
    model.set_recompute(family.plan(CONFIG), decoder=how, tower=False)
    total = sum(LENGTHS)
    tokens = torch.arange(total) % 64
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    batch = Batch(tokens, tokens, torch.ones(total), positions, Segments.of(LENGTHS), tokens, float(total), (0, 1, 2))
    with Live(model) as live, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        hidden = model(batch)
    size = live.bytes()
    hidden.sum().backward()  # what was dropped can be made again
    return size


WAYS = {
    "none": Recompute(),
    "core_attn": Recompute("selective", modules=("core_attn",)),
    "layernorm": Recompute("selective", modules=("layernorm",)),
    "mlp": Recompute("selective", modules=("mlp",)),
    "selective": Recompute("selective", modules=("core_attn", "mlp", "layernorm")),
    "block4": Recompute("full", "block", 4),
    "full": Recompute("full"),
    "uniform2": Recompute("full", "uniform", 2),
    "uniform4": Recompute("full", "uniform", 4),
}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_none_keeps_more_than_selective_more_than_full_more_than_groups(bf16: bool) -> None:
    sizes = {name: left_behind(how, bf16=bf16) for name, how in WAYS.items()}
    print({name: f"{size / 2**20:.2f} MiB" for name, size in sizes.items()})
    chains = ("none core_attn selective full uniform2 uniform4", "none layernorm selective", "none mlp selective")
    for chain in (*chains, "none block4 full"):
        for more, less in pairwise(chain.split()):
            assert sizes[more] > sizes[less], (more, less, sizes)
    assert sizes["selective"] < 0.7 * sizes["none"]
    assert sizes["full"] < 0.2 * sizes["none"]


def test_the_estimate_follows() -> None:
    """Activations as ``observe/cost.py`` estimates them, less what is only there during backward."""
    decoder, _ = stacks_of(CONFIG)
    assert decoder is not None
    nothing = Weights(0, 0, 0, 0)

    def estimated(how: Recompute) -> int:
        work = Work(sum(LENGTHS), 0, recompute=how)
        return estimate_memory(nothing, work, decoder).parts["decoder activations"]

    transient = sum(LENGTHS) * decoder.transient_bytes(4)
    layer = sum(LENGTHS) * decoder.activation_bytes(4)
    parts = decoder.activation_bytes(4, WAYS["selective"].modules)
    again_of_parts = 1 - parts / decoder.activation_bytes(4)
    for name, again in (
        ("none", 0.0),
        ("selective", again_of_parts),
        ("block4", 1.0),
        ("full", 1.0),
        ("uniform2", 2.0),
    ):
        ends = 2 * sum(LENGTHS) * decoder.hidden * 4  # what goes into the last norm, and what comes out
        measured, want = left_behind(WAYS[name]), estimated(WAYS[name]) - transient - again * layer + ends
        assert measured == pytest.approx(want, rel=0.3), (name, measured, want)
