"""Tiny transformers models as oracles: real module trees and names, random weights, built in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera.config.run import AdaptArgs, TrainArgs
from tessera.contract.plan import Groups, Plan

TEXT = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MEDIA = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
DEFAULTS: dict[str, Any] = {
    "train_type": "lora",
    "freeze_llm": False,
    "freeze_vit": True,
    "freeze_aligner": True,
    "freeze_parameters": (),
    "trainable_parameters": (),
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_bias": "none",
    "target_modules": ("all-linear",),
    "target_regex": None,
    "modules_to_save": (),
    "use_dora": False,
    "use_rslora": False,
    "lorap_lr_ratio": None,
}


@dataclass(frozen=True)
class Oracle:
    """A transformers model's maker (same weights every time), its plan and a batch that reaches all of its parts."""

    make: Callable[[], nn.Module]
    plan: Plan
    inputs: dict[str, Tensor]

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(**self.inputs).logits.float()


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(7)
        return make().eval()

    return build


def _image(pixels_per_patch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[5, 6, 152, 150, 150, 150, 150, 153, 9, 8, 7]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 150).int(),
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16, pixels_per_patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def qwen3_vl(tied: bool = False) -> Oracle:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope, "tie_word_embeddings": tied}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **MEDIA)
    aligner = ("model.visual.merger", "model.visual.deepstack_merger_list")
    groups = Groups(("model.language_model", "lm_head"), aligner, ("model.visual",))
    return Oracle(_seeded(lambda: Qwen3VLForConditionalGeneration(config)), Plan(groups, (), ()), _image(96))


def qwen2_5_vl() -> Oracle:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    vision |= {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **MEDIA)
    groups = Groups(("model.language_model", "lm_head"), ("model.visual.merger",), ("model.visual",))
    return Oracle(_seeded(lambda: Qwen2_5_VLForConditionalGeneration(config)), Plan(groups, (), ()), _image(96))


def qwen3() -> Oracle:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**TEXT, head_dim=8, tie_word_embeddings=False)
    inputs = {"input_ids": torch.tensor([[5, 6, 9, 8, 7, 3]])}
    return Oracle(_seeded(lambda: Qwen3ForCausalLM(config)), Plan(Groups(("model", "lm_head")), (), ()), inputs)


ORACLES: dict[str, Callable[[], Oracle]] = {"qwen3_vl": qwen3_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3": qwen3}


@pytest.fixture(params=list(ORACLES))
def oracle(request: pytest.FixtureRequest) -> Oracle:
    """Each family in turn."""
    return ORACLES[request.param]()


@pytest.fixture
def vl() -> Oracle:
    return qwen3_vl()


@pytest.fixture
def vl_tied() -> Oracle:
    return qwen3_vl(tied=True)


@pytest.fixture
def adapt_args() -> Callable[..., AdaptArgs]:
    return lambda **changes: AdaptArgs(**{**DEFAULTS, **changes})


@pytest.fixture
def train_args() -> Callable[..., TrainArgs]:
    from tessera.config.resolve import run_of

    return lambda **changes: run_of("sft", model="DIR", dataset=("rows.jsonl",), **changes).train


@pytest.fixture
def shake() -> Callable[[nn.Module], None]:
    """Give the zero-initialised parts of an adapter values, as training would."""

    def move(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(11)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.05 * noise.to(parameter.dtype)

    return move
