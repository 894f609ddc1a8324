"""A composed model is a model directory like any other: here, in tokenizers, and in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tessera.checkpoint import open as door
from tessera.config.resolve import run_of
from tessera.data.render import Renderer
from tessera.data.sample import normalise
from tessera.recipes import blueprint, demo
from tessera.weights.hf import Checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composed") / "model"
    assert blueprint.compose(demo.BLUEPRINT, ["123456", "47+8=55"] * 10, folder, seed=7) > 1_000_000
    return folder


def test_opens_and_accounts_for_every_tensor(model: Path) -> None:
    source = door.describe(run_of("infer", model=str(model)).model)
    module = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    assert source.has_tower
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_seed_decides_the_weights(model: Path, tmp_path: Path) -> None:
    for seed, same in ((7, True), (8, False)):
        folder = tmp_path / str(seed)
        blueprint.compose(demo.BLUEPRINT, ["1"], folder, seed)
        first, second = Checkpoint(model), Checkpoint(folder)
        name = next(name for name in first.names if name.endswith("embed_tokens.weight"))
        assert torch.equal(first.read(name), second.read(name)) is same


def test_tokenizer_and_config_agree(model: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    config = json.loads((model / "config.json").read_text())
    assert config["image_token_id"] == tokenizer.token_to_id("<|image_pad|>")
    assert config["video_token_id"] == tokenizer.token_to_id("<|video_pad|>")
    assert config["vision_start_token_id"] == tokenizer.token_to_id("<|vision_start|>")
    assert config["text_config"]["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.get_vocab_size() <= config["text_config"]["vocab_size"]
    assert len(tokenizer.encode("123456").ids) == 6
    assert tokenizer.decode(tokenizer.encode("12+3=15, Hé! 你").ids) == "12+3=15, Hé! 你"


def test_the_answer_and_its_end_are_learnt(model: Path) -> None:
    source = door.describe(run_of("infer", model=str(model)).model)
    renderer = Renderer(model, source.geometry)
    messages = [{"role": "user", "content": "read"}, {"role": "assistant", "content": "12"}]
    encoded = renderer.encode(renderer.render(normalise({"messages": messages})))
    learnt = renderer.decode(encoded.tokens[encoded.loss_weight > 0])
    assert learnt == "12<|im_end|>"


def test_transformers_opens_it(model: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    loaded, report = AutoModelForImageTextToText.from_pretrained(model, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "12"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False)
    assert text == "<|vision_start|><|image_pad|><|vision_end|><|im_start|>12<|im_end|>"
    assert tokenizer(text).input_ids[1] == loaded.config.image_token_id
