"""Composites against transformers' own modules put together by hand: its tower, then its language model.

transformers has no such model, so the seam is written out here: features on the image tokens, positions on three axes,
deepstack between layers. Everything on either side of it is transformers'.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera.contract.batch import Batch
from tessera.models.families.pairing import pair, vision_token_ids
from tests.parity import reference as ref

IMAGES: list[ref.Sample] = [[5, (1, 4, 6), 7], [3, (1, 8, 8), 4, (1, 4, 4), 6], [9]]
PAIRS = [
    ("qwen2_5_vl", "qwen3"),
    ("qwen2_5_vl", "qwen3_moe"),
    ("qwen2_5_vl", "llama"),
    ("qwen2_5_vl", "qwen3_vl"),
    ("qwen3_vl", "qwen2"),
    ("qwen3_vl", "llama"),
]


def composite(vision: str, language: str) -> dict[str, Any]:
    seeing, speaking = ref.config_of(vision), ref.config_of(language)
    found = pair(seeing, speaking, 256, vision_token_ids(seeing))
    assert found.config["model_type"] == "composite" and found.inexpressible
    return found.config


def tower(config: dict[str, Any]) -> nn.Module:
    """transformers' tower of a ``vision_config``."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as windowed
    from transformers.models.qwen3_vl import modeling_qwen3_vl as stacked

    fields = {key: value for key, value in config["vision_config"].items() if key != "model_type"}
    if config["vision_config"]["model_type"] == "qwen2_5_vl":
        made = windowed.Qwen2_5_VLVisionConfig(**fields)
        made._attn_implementation = "sdpa"
        return windowed.Qwen2_5_VisionTransformerPretrainedModel(made)
    other = stacked.Qwen3VLVisionConfig(**fields)
    other._attn_implementation = "sdpa"
    return stacked.Qwen3VLVisionModel(other)


def part(model: nn.Module, prefix: str, name: str = "") -> dict[str, Tensor]:
    """The tensors below ``prefix``, their names with ``name`` in its place."""
    state = model.state_dict()
    return {name + key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def angles(rotary: nn.Module, hidden: Tensor, positions: Tensor, rope: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[1, T, D]`` where each frequency follows its axis of ``positions [3, T]``."""
    each = [rotary(hidden, axis[None]) for axis in positions]
    sections, half = rope["mrope_section"], each[0][0].shape[-1] // 2
    owner = [0] * sections[0] + [1] * sections[1] + [2] * sections[2]
    if rope["mrope_interleaved"]:
        high, wide = range(1, 3 * sections[1], 3), range(2, 3 * sections[2], 3)
        owner = [1 if index in high else 2 if index in wide else 0 for index in range(half)]
    assert len(owner) == half
    mixed = [torch.stack([each[axis][kind][..., i] for i, axis in enumerate(owner)], -1) for kind in (0, 1)]
    cos, sin = (torch.cat((value, value), -1) for value in mixed)
    return cos, sin


def glued(config: dict[str, Any], model: nn.Module, batch: Batch) -> Tensor:
    """Logits ``[T, V]`` of transformers' parts with the weights of ``model``, a segment at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    text = config["text_config"]
    rope = text["rope_parameters"]
    plain = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    language_config = AutoConfig.for_model(**{**text, "rope_parameters": plain})
    language_config._attn_implementation = "sdpa"
    language: Any = AutoModelForCausalLM.from_config(language_config).eval()
    weights = part(model, "model.language_model.", "model.") | part(model, "lm_head.", "lm_head.")
    missing, unexpected = language.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    language.tie_weights()
    vision: Any = tower(config).eval()
    vision.load_state_dict(part(model, "model.visual."))

    out, start = [], 0
    for ids, extra in zip(
        batch.tokens.split(list(batch.segments.lengths)), ref.media_arguments(config, batch), strict=True
    ):
        hidden = language.model.embed_tokens(ids[None])
        levels: list[Tensor] = []
        seen = ids == config["image_token_id"]
        if extra:
            found = vision(extra["pixel_values"], grid_thw=extra["image_grid_thw"])
            hidden[0, seen] = found.pooler_output
            if config["vision_config"]["model_type"] != "qwen2_5_vl":
                levels = found.deepstack_features
        positions = batch.positions[:, start : start + len(ids)]
        start += len(ids)
        turned = angles(language.model.rotary_emb, hidden, positions, rope)
        for index, layer in enumerate(language.model.layers):
            hidden = layer(hidden, attention_mask=None, position_embeddings=turned)
            if index < len(levels):
                hidden[0, seen] += levels[index]
        out.append(language.lm_head(language.model.norm(hidden))[0])
    return torch.cat(out)


@pytest.mark.parametrize(("vision", "language"), PAIRS)
def test_equals_the_parts_put_together(vision: str, language: str) -> None:
    config = composite(vision, language)
    model = ref.ours(config).eval()
    batch = ref.batch_of(config, IMAGES)
    with torch.no_grad():
        logits, expected = ref.logits_of(model, batch), glued(config, model, batch)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_reference_depends_on_positions_and_images() -> None:
    """It could not tell a composite that ignores either."""
    config = composite("qwen2_5_vl", "qwen3")
    model = ref.ours(config).eval()
    batch = ref.batch_of(config, IMAGES)
    with torch.no_grad():
        expected = glued(config, model, batch)
        flat = {**config["text_config"]["rope_parameters"], "mrope_section": [16, 0, 0]}
        one_axis = glued({**config, "text_config": {**config["text_config"], "rope_parameters": flat}}, model, batch)
    assert (one_axis - expected).abs().max() > 1e-3 * expected.abs().max()
