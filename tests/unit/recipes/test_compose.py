"""``tessera compose``: both halves are exactly their sources, and the rest follows from them."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tessera.checkpoint import open as door
from tessera.config.resolve import resolve
from tessera.contract.batch import Batch
from tessera.models.vlm import VLM
from tessera.recipes import compose
from tessera.recipes.vocabulary import grown
from tessera.weights.hf import Checkpoint
from tests.disk import save_checkpoint
from tests.parity import reference as ref

EXPRESSIBLE = [
    ("qwen2_5_vl", "qwen2", "qwen2_5_vl"),
    ("qwen3_vl", "qwen3", "qwen3_vl"),
    ("qwen3_vl", "qwen3_moe", "qwen3_vl_moe"),
    ("qwen3_vl_moe", "qwen3_vl", "qwen3_vl"),
    ("internvl", "llama", "internvl"),
    ("internvl", "qwen3_moe", "internvl"),
]
OTHERS = [
    ("qwen2_5_vl", "qwen3", "composite"),
    ("qwen2_5_vl", "qwen3_moe", "composite"),
    ("qwen2_5_vl", "llama", "composite"),
    ("qwen2_5_vl", "qwen3_vl", "composite"),
    ("qwen3_vl", "qwen2", "composite"),
    ("qwen3_vl", "qwen2_5_vl", "composite"),
]
WINDOWED = """{
  "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
  "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 3584,
  "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 128000, "max_window_layers": 28,
  "model_type": "qwen2_5_vl", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": true, "use_sliding_window": false,
  "vision_config": {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
    "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2
  },
  "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064
}"""
NORMED = """{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
  "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151936
}"""
TEXT: list[ref.Sample] = [[13], [5], [21]]
IMAGES: list[ref.Sample] = [[5, (1, 4, 6), 7], [9]]


def run(*words: Any) -> Path:
    return compose.main(resolve(["compose", *map(str, words)], {}))


def opened(path: Path) -> VLM:
    module = door.load(door.read(path), dtype=torch.float32, device=torch.device("cpu"))
    assert isinstance(module, VLM)
    return module.eval()


@lru_cache(maxsize=1)
def text() -> Batch:
    return ref.batch_of(ref.config_of("qwen3"), TEXT)


def text_logits(path: Path) -> Tensor:
    with torch.no_grad():
        return ref.logits_of(opened(path), text())


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("vision", "language", "family"), [*EXPRESSIBLE, *OTHERS])
def test_each_half_is_exactly_its_source(
    models: Path, tmp_path: Path, vision: str, language: str, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("--vision", models / vision, "--llm", models / language, "--output_dir", tmp_path / "out")
    assert config_of(out)["model_type"] == family
    assert ("transformers cannot express it" in capsys.readouterr().out) == (family == "composite")
    assert ("transformers cannot express it" in (out / "README.md").read_text()) == (family == "composite")
    assert torch.equal(text_logits(out), text_logits(models / language))
    made, seeing = opened(out), opened(models / vision)
    groups = door.read(out).plan.groups
    before = seeing.state_dict()
    tower = {name: value for name, value in made.state_dict().items() if groups.of(name) == "vit"}
    assert tower and all(torch.equal(value, before[name]) for name, value in tower.items())


@pytest.mark.parametrize(("vision", "language", "family"), EXPRESSIBLE)
def test_transformers_loads_what_it_can_express(
    models: Path, tmp_path: Path, vision: str, language: str, family: str
) -> None:
    from transformers import AutoModelForImageTextToText

    out = run("--vision", models / vision, "--llm", models / language, "--output_dir", tmp_path / "out")
    theirs, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    config = config_of(out)
    batch = ref.batch_of(config, IMAGES)
    with torch.no_grad():
        logits, expected = ref.logits_of(opened(out), batch), ref.reference_logits(theirs.float(), config, batch)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("vision", "language"), [("qwen2_5_vl", "qwen2"), ("qwen3_vl", "qwen3")])
def test_parts_that_transformers_saved(tmp_path: Path, vision: str, language: str) -> None:
    """transformers 5 nests what earlier releases wrote flat, and renames tensors; it loads what is made of its own."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    for name in (vision, language):
        save_checkpoint(tmp_path / name, name)
    out = run("--vision", tmp_path / vision, "--llm", tmp_path / language, "--output_dir", tmp_path / "out")
    assert torch.equal(text_logits(out), text_logits(tmp_path / language))
    theirs, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config = config_of(out)
    batch = ref.batch_of(config, IMAGES)
    with torch.no_grad():
        logits, expected = ref.logits_of(opened(out), batch), ref.reference_logits(theirs, config, batch)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert AutoTokenizer.from_pretrained(out)("<|image_pad|>").input_ids == [config["image_token_id"]]


def test_transformers_refuses_a_composite(models: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    out = run("--vision", models / "qwen2_5_vl", "--llm", models / "qwen3", "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match="composite"):
        AutoConfig.from_pretrained(out)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl"])
def test_taken_apart_and_put_together_it_is_the_same(models: Path, tmp_path: Path, name: str) -> None:
    place = models / name
    out = run("--vision", place, "--llm", place, "--aligner", place, "--output_dir", tmp_path / "out")
    before, after = tensors(place), tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert config_of(out)["model_type"] == name


def test_published_configs_are_derived_value_by_value() -> None:
    """The configs of document 003: a flat one of the first releases, and that of a larger language model."""
    from tessera.models.families.pairing import pair, vision_token_ids

    vision, language = json.loads(WINDOWED), json.loads(NORMED)
    made = pair(vision, language, 151936, vision_token_ids(vision)).config
    text = made["text_config"]
    expected = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 36,
        "vocab_size": 151936,
        "max_window_layers": 36,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "model_type": "qwen3",
    }
    assert {key: text[key] for key in expected} == expected
    assert made["vision_config"]["out_hidden_size"] == 4096
    assert made["vision_config"]["hidden_size"] == 1280
    assert text["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        "mrope_section": [16, 24, 24],
        "mrope_interleaved": False,
    }
    assert (made["image_token_id"], made["vision_token_id"]) == (151655, 151654)

    # A decoder with biases and no norms is what the published family has: flat, as it was.
    smaller = {**language, "model_type": "qwen2", "hidden_size": 2048, "num_attention_heads": 16, "head_dim": 128}
    flat = pair(vision, smaller, 151936, {}).config
    assert flat["model_type"] == "qwen2_5_vl" and "text_config" not in flat
    assert (flat["hidden_size"], flat["max_window_layers"], flat["vision_config"]["out_hidden_size"]) == (
        2048,
        36,
        2048,
    )
    assert flat["rope_scaling"] == {"type": "mrope", "mrope_section": [16, 24, 24]}


def test_the_seed_decides_the_aligner_and_nothing_else(models: Path, tmp_path: Path) -> None:
    words = ["--vision", models / "qwen2_5_vl", "--llm", models / "qwen3"]
    one, again, other = (
        run(*words, "--seed", seed, "--output_dir", tmp_path / name) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert (one / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    before, after = tensors(one), tensors(other)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and all("merger" in name for name in moved)


def test_shards_and_types(models: Path, tmp_path: Path) -> None:
    words = ["--vision", models / "qwen3_vl", "--llm", models / "qwen3_moe", "--output_dir", tmp_path / "out"]
    out = run(*words, "--torch_dtype", "bfloat16", "--max_shard_size", "200KB")
    assert len(list(out.glob("*.safetensors"))) > 2
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.bfloat16}
    assert door.read(out).dtype_name == "bfloat16"
    source = opened(models / "qwen3_moe").state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    made = opened(out).state_dict()["model.language_model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(made, source.bfloat16().float())


@pytest.fixture
def foreign(models: Path, tmp_path: Path) -> Path:
    """A language model whose tokenizer knows nothing of images or turns, and whose embedding is exactly full."""
    place = tmp_path / "foreign"
    shutil.copytree(models / "llama", place)
    tokens = json.loads((place / "tokenizer.json").read_text())
    names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokens["added_tokens"] = [token for token in tokens["added_tokens"] if token["content"] not in names]
    for index, name in enumerate(names):
        tokens["model"]["vocab"][f"word{index}"] = tokens["model"]["vocab"].pop(name)
    (place / "tokenizer.json").write_text(json.dumps(tokens))
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}}
    (place / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages[0].content }}"}))
    (place / "chat_template.jinja").unlink()
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.5}))
    size = Tokenizer.from_file(str(place / "tokenizer.json")).get_vocab_size()
    _cut(place, size)
    return place


def _cut(place: Path, rows: int) -> None:
    """Keep this many rows of embedding and head."""
    state = load_file(place / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:rows].clone()
    save_file(state, place / "model.safetensors", {"format": "pt"})
    config = config_of(place)
    (place / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))


def test_missing_tokens_are_added_and_rows_are_means(models: Path, foreign: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = run("--vision", models / "qwen2_5_vl", "--llm", foreign, "--output_dir", tmp_path / "out")
    size = config_of(foreign)["vocab_size"]
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    config = config_of(out)
    pad = tokenizer.token_to_id("<|image_pad|>")
    assert config["image_token_id"] == pad >= size
    assert config["vision_start_token_id"] == tokenizer.token_to_id("<|vision_start|>")
    rows = config["text_config"]["vocab_size"]
    assert rows == grown(size, tokenizer.get_vocab_size()) and rows >= size + 6

    before, after = tensors(foreign), tensors(out)
    for name, there in (
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight",) * 2,
    ):
        assert torch.equal(after[name][:size], before[there])
        mean = before[there].double().mean(0).float()
        assert torch.equal(after[name][size:], mean.expand(rows - size, -1))
    batch = text()
    with torch.no_grad():
        new, old = ref.logits_of(opened(out), batch), ref.logits_of(opened(foreign), batch)
    torch.testing.assert_close(new[:, :size], old, rtol=1e-6, atol=1e-6)

    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is written here?"}]}]
    theirs = AutoTokenizer.from_pretrained(out)
    shown = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert "<|vision_start|><|image_pad|><|vision_end|>" in shown
    assert theirs(shown).input_ids == tokenizer.encode(shown).ids
    assert theirs(shown).input_ids.count(pad) == 1
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [0, tokenizer.token_to_id("<|im_end|>")], "temperature": 0.5}


def test_padding_rows_take_new_tokens(models: Path, foreign: Path, tmp_path: Path) -> None:
    """An embedding with rows to spare does not grow, and the language model stays exactly what it was."""
    shutil.copy(models / "llama" / "model.safetensors", foreign / "model.safetensors")
    shutil.copy(models / "llama" / "config.json", foreign / "config.json")
    out = run("--vision", models / "qwen2_5_vl", "--llm", foreign, "--output_dir", tmp_path / "out")
    assert config_of(out)["text_config"]["vocab_size"] == config_of(foreign)["vocab_size"]
    assert torch.equal(text_logits(out), text_logits(foreign))


def test_growth_keeps_what_divided_the_embedding() -> None:
    assert grown(151936, 151669) == 151936
    assert grown(128256, 128262) == 128384
    assert grown(32000, 32006) == 32128
    assert grown(50257, 50263) == 50263


def test_a_template_that_renders_images_stays(models: Path, tmp_path: Path) -> None:
    language = tmp_path / "llm"
    shutil.copytree(models / "qwen3", language)
    template = (language / "chat_template.jinja").read_text()
    (language / "chat_template.jinja").write_text("{# the language model's own #}" + template)
    out = run("--vision", models / "qwen2_5_vl", "--llm", language, "--output_dir", tmp_path / "a")
    assert "own" in (out / "chat_template.jinja").read_text()
    (language / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    out = run("--vision", models / "qwen2_5_vl", "--llm", language, "--output_dir", tmp_path / "b")
    assert (out / "chat_template.jinja").read_text() == (models / "qwen2_5_vl" / "chat_template.jinja").read_text()


def test_an_aligner_that_fits_is_taken(models: Path, tmp_path: Path) -> None:
    words = ["--vision", models / "qwen3_vl", "--llm", models / "qwen2", "--aligner", models / "qwen3_vl_moe"]
    out = run(*words, "--output_dir", tmp_path / "out")
    other, made = tensors(models / "qwen3_vl_moe"), tensors(out)
    mergers = [name for name in made if "merger" in name]
    assert len(mergers) == 18
    assert all(torch.equal(made[name], other[name]) for name in mergers)


def test_the_account_adds_up(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--vision", models / "qwen3_vl", "--llm", models / "qwen3_moe"]
    run(*words, "--output_dir", tmp_path / "out", "--dry_run", "true")
    assert not (tmp_path / "out").exists()
    dry = capsys.readouterr().out
    assert "would write" in dry
    out = run(*words, "--output_dir", tmp_path / "out")
    printed = capsys.readouterr().out
    assert dry.splitlines()[:-1] == printed.splitlines()[:-1]
    total = sum(len(Checkpoint(models / name).names) for name in ("qwen3_vl", "qwen3_moe"))
    assert f"{total} source tensors" in printed
    assert f"{len(Checkpoint(out).names)} tensors written" in printed
    assert "stacked from 16 tensors each" in printed
    rows = [line for line in printed.splitlines() if line.startswith(("vision: ", "llm: "))]
    assert len(rows) > 20 and printed.splitlines()[0].split() == [
        "source",
        "destination",
        "tensors",
        "parameters",
        "how",
    ]
    assert rows[0] in (out / "README.md").read_text()


def test_a_file_of_flags(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "parts.yaml"
    file.write_text(
        f"vision: {models / 'qwen3_vl'}\nllm: {models / 'qwen3'}\noutput_dir: {tmp_path / 'out'}\nseed: 3\n"
    )
    assert run(file) == tmp_path / "out"
    assert config_of(tmp_path / "out")["model_type"] == "qwen3_vl"


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_moe", "glm4v_moe"])
def test_random_weights_for_a_config(tmp_path: Path, name: str) -> None:
    from tessera.models.init import init_weights

    config = ref.config_of(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = run("--config", tmp_path / "config.json", "--seed", 5, "--output_dir", tmp_path / "out")
    made = opened(out)
    expected = init_weights(ref.ours(config), config, 5).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in made.state_dict().items())


def test_random_weights_for_a_blueprint(models: Path, tmp_path: Path) -> None:
    blueprint = tmp_path / "blueprint"
    shutil.copytree(models / "qwen3_vl", blueprint, ignore=shutil.ignore_patterns("*.safetensors"))
    out = run("--config", blueprint, "--output_dir", tmp_path / "out", "--torch_dtype", "bfloat16")
    assert {file.name for file in blueprint.iterdir()} < {file.name for file in out.iterdir()}
    assert config_of(out)["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.bfloat16}
