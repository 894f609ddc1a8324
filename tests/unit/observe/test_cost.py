"""The estimate against arithmetic, and against what a real training process takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tessera.observe.cost import (
    MemoryEstimate,
    Stack,
    Weights,
    Work,
    estimate_memory,
    forward_flops_per_token,
    human_bytes,
    human_count,
    stacks_of,
    train_flops_per_token,
)

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SEGMENTS = (192, 192, 192, 192)
CHUNK = 128

TRAIN = """
import json, sys
config, lengths, chunk, recompute = json.loads(sys.argv[1])
import torch
from tessera.contract.batch import Batch, Segments
from tessera.models.families import family_of
from tessera.objectives.lm import NextToken

def kib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

def train(config, lengths):
    family = family_of(config)
    model = family.build(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    model.set_recompute(family.plan(config), decoder=recompute, tower=False)
    total = sum(lengths)
    tokens = torch.randint(0, config["vocab_size"], (total,))
    positions = torch.cat([torch.arange(n) for n in lengths])
    batch = Batch(tokens, tokens, torch.ones(total), positions, Segments.of(lengths), torch.arange(total), float(total),
                  tuple(range(len(lengths))))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        (model(batch, NextToken(chunk)).total / total).backward()
        optimizer.step()
        optimizer.zero_grad()
    return sum(p.numel() for p in model.parameters())

small = dict(config, hidden_size=96, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
train(small, [16, 16])  # threads, kernels and imports are not what is estimated
before = kib("VmRSS")
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # forget the peak so far
count = train(config, lengths)
print(json.dumps([count, (kib("VmHWM") - before) * 1024]))
"""


def measured(recompute: bool) -> tuple[int, int]:
    """(parameters, bytes by which a training process grew) of the real engine on CONFIG."""
    # Without a fixed threshold glibc keeps freed tensors on its heap, and the peak tells more of it than of us.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    argument = json.dumps([CONFIG, SEGMENTS, CHUNK, recompute])
    done = subprocess.run([sys.executable, "-c", TRAIN, argument], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    count, size = json.loads(done.stdout.splitlines()[-1])
    return count, size


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's resettable peak memory")
@pytest.mark.parametrize("recompute", [False, True])
def test_estimate_is_near_the_real_peak(recompute: bool) -> None:
    count, size = measured(recompute)
    decoder, tower = stacks_of(CONFIG)
    assert decoder is not None and tower is None
    weights = Weights(count, 4 * count, count, 4 * count)
    work = Work(sum(SEGMENTS), CONFIG["vocab_size"], logits_chunk=CHUNK, recompute=recompute)
    estimate = estimate_memory(weights, work, decoder)
    assert estimate.total == pytest.approx(size, rel=0.25), estimate.line()


def test_config_to_stacks() -> None:
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "hidden_act": "gelu_pytorch_tanh",
    }
    decoder, tower = stacks_of({"text_config": {**CONFIG, "head_dim": 48}, "vision_config": vision})
    assert decoder == Stack(6, 192, 512, queries=288, keys=144, qk_norm=True)
    assert tower == Stack(4, 64, 128, queries=64, keys=64, gated=False)
    assert stacks_of({"model_type": "unknown"}) == (None, None)
    moe = {**CONFIG, "moe_intermediate_size": 32, "num_experts_per_tok": 8}
    assert stacks_of(moe)[0] == Stack(6, 192, 256, queries=192, keys=96)


def test_what_stays_is_exact() -> None:
    weights = Weights(count=100, size=400, trained=10, trained_size=40)
    still = estimate_memory(weights, Work(tokens=0, vocab=0), None)
    assert still.parts == {
        "weights": 400,
        "16-bit copies": 0,
        "optimizer": 80,
        "gradients": 40,
        "decoder activations": 0,
        "tower activations": 0,
        "logits": 0,
    }
    assert still.total == 520 and not still.complete and "unknown" in still.line()
    assert estimate_memory(weights, Work(0, 0), None, states=1, shards=4).total == 100 + 400 + 10 + 10
    assert estimate_memory(weights, Work(0, 0), None, states=1, shards=4, gather=False).total == 100 + 10 + 10
    assert estimate_memory(weights, Work(0, 0, itemsize=2), None).parts["16-bit copies"] == 200


def test_each_saving_saves() -> None:
    stack, weights = Stack(24, 1024, 4096, 1024, 512), Weights(4 * 10**8, 16 * 10**8, 4 * 10**8, 16 * 10**8)

    def total(**changes: Any) -> int:
        return estimate_memory(weights, Work(8192, 150_000, **changes), stack).total

    assert total(recompute=True) < total() / 2
    assert total(logits_chunk=256) < total()
    assert total(accumulation=4) > total()
    frozen = Work(8192, 150_000, patches=10_000, train_tower="nothing")
    trained = Work(8192, 150_000, patches=10_000)
    parts = [estimate_memory(weights, work, stack, stack).parts["tower activations"] for work in (frozen, trained)]
    assert parts[0] * 20 < parts[1]


def test_flops_are_six_n() -> None:
    stack = Stack(2, 8, 16, 8, 4)
    matrices = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16) + 100 * 8
    assert forward_flops_per_token(stack, 0, head=100) == 2 * matrices
    assert train_flops_per_token(stack, 0, head=100) == 6 * matrices
    assert train_flops_per_token(stack, 0, head=100, recompute=True) == 8 * matrices
    assert train_flops_per_token(stack, 0, head=100, adapters=True) == 4 * matrices
    assert forward_flops_per_token(stack, 10) - forward_flops_per_token(stack, 0) == 4 * 2 * 8 * 10 / 2
    assert forward_flops_per_token(stack, 10, causal=False) - forward_flops_per_token(stack, 0) == 4 * 2 * 8 * 10


def test_line_and_units() -> None:
    line = MemoryEstimate(3 * 2**29, {"weights": 2**30, "logits": 2**29, "none": 0}).line()
    assert line == "~1.50 GiB (estimate: weights 1.00 GiB, logits 512 MiB)"
    assert [human_bytes(n) for n in (5, 2048, 999 * 2**20, 150 * 2**30)] == ["5 B", "2 KiB", "999 MiB", "150 GiB"]
    assert [human_count(n) for n in (7, 8190, 19_771_200, 7.62e9)] == ["7", "8.19K", "19.77M", "7.62B"]
