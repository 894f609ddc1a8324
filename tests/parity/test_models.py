"""Our models against transformers' in float32: logits, loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tessera.contract.model import Head
from tests.parity import reference as ref

IMAGES: list[ref.Sample] = [[5, (1, 4, 6), 7], [3, (1, 8, 8), 4, (1, 4, 4), 6], [9], [2, (1, 10, 12), 11], [4]]
TEXT: list[ref.Sample] = [[13], [5], [13], [21], [8], [1]]
CASES = [(name, {}, IMAGES) for name in ref.VLMS] + [(name, {}, TEXT) for name in ref.TEXTS]
TIES = [(name, {"tie_word_embeddings": True}, TEXT) for name in ("qwen3", "llama")] + [
    ("qwen2", {"tie_word_embeddings": False}, TEXT),
    ("llama", {"attention_bias": True, "mlp_bias": True}, TEXT),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, TEXT),
    ("qwen3", {"num_key_value_heads": 4}, TEXT),
]


def tiles(text: str = "qwen3", **vision: Any) -> dict[str, Any]:
    """Changes of a tiled model: another decoder, other options of the tower."""
    decoder, tower = ref.config_of(text), ref.config_of("internvl")["vision_config"]
    return {
        "text_config": {key: value for key, value in decoder.items() if key != "architectures"},
        "vision_config": tower | vision,
        "tie_word_embeddings": decoder["tie_word_embeddings"],
    }


TILED = [
    ("internvl", tiles("qwen2"), IMAGES),
    ("internvl", tiles("qwen3_moe"), IMAGES),
    ("internvl", tiles("llama", use_qk_norm=True, norm_type="rms_norm", attention_bias=False), IMAGES),
    ("internvl", tiles(use_mean_pooling=False, use_absolute_position_embeddings=False), IMAGES),
]
SPARSE = [
    ("qwen3_moe", {"norm_topk_prob": False}, TEXT),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}, TEXT),
    ("qwen3_moe", {"num_experts": 64, "num_experts_per_tok": 1, "norm_topk_prob": False}, TEXT),  # most are idle
]


@pytest.mark.parametrize(("name", "changes", "samples"), CASES + TIES + SPARSE + TILED)
def test_forward_and_backward(name: str, changes: dict[str, Any], samples: list[ref.Sample]) -> None:
    config = ref.config_of(name, **changes)
    model = ref.ours(config)
    theirs = ref.theirs(config, model)
    batch = ref.batch_of(config, samples)

    logits, expected = ref.logits_of(model, batch), ref.reference_logits(theirs, config, batch)
    assert (logits - expected).abs().max() < 2e-6 * expected.abs().max()

    mine = model(batch, ref.loss)
    mine.total.backward()
    head = torch.eye(expected.shape[-1])
    loss = ref.loss(expected, Head(head), batch)
    loss.total.backward()
    assert abs(float((mine.total - loss.total).detach())) < 2e-6 * float(loss.total.detach())
    worst, where = ref.worst_gradient(ref.gradients(model), ref.gradients(theirs))
    assert worst < 1e-5, where
