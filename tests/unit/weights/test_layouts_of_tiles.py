"""One model under the names of transformers and of the model's own repository: the same module, the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.resolve import run_of
from tessera.data.render import Renderer
from tessera.models.families import family_of
from tessera.models.vlm import VLM
from tessera.weights import hf
from tessera.weights.hf import Checkpoint
from tests.models import make_model_dir
from tests.parity import reference as ref

SAMPLES: list[ref.Sample] = [[5, (1, 4, 6), 7], [3, (1, 8, 8), 4, (1, 4, 4), 6], [9]]


def directory_of(path: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    hf.save(state, path, family_of(config).weightmap(config, []))
    return path


def opened(path: Path) -> tuple[VLM, door.Source]:
    source = door.describe(run_of("infer", model=str(path)).model)
    module = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    assert isinstance(module, VLM)
    return module, source


@pytest.mark.parametrize("decoder", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_both_layouts_are_one_model(tmp_path: Path, decoder: str) -> None:
    text = ref.config_of(decoder)
    chat = ref.config_of("internvl_chat", llm_config=text, tie_word_embeddings=text["tie_word_embeddings"])
    native = ref.native(chat)
    original = ref.ours(chat)
    state = original.state_dict()
    one, held = opened(directory_of(tmp_path / "chat", chat, state))
    two, other = opened(directory_of(tmp_path / "native", native, state))
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(value, one.state_dict()[key]) for key, value in two.state_dict().items())
    batch = ref.batch_of(chat, SAMPLES)
    assert torch.equal(ref.logits_of(one, batch), ref.logits_of(two, batch))

    names = set(held.checkpoint.names)
    layer = "vision_model.encoder.layers.2"
    assert {f"{layer}.attn.qkv.weight", f"{layer}.attn.proj.bias", f"{layer}.norm1.weight", f"{layer}.ls2"} <= names
    assert {"mlp1.0.bias", "mlp1.1.weight", "mlp1.3.bias", "vision_model.embeddings.class_embedding"} <= names
    assert {"language_model.model.layers.0.self_attn.q_proj.weight", "language_model.model.norm.weight"} <= names
    experts = "language_model.model.layers.1.mlp.experts.7.up_proj.weight"
    assert (experts in names) == (decoder == "qwen3_moe")
    assert not any("q_proj" in name for name in names if name.startswith("vision"))
    assert any("q_proj" in name for name in other.checkpoint.names if name.startswith("vision"))


def test_an_architecture_names_a_decoder(tmp_path: Path) -> None:
    config = ref.config_of("internvl_chat")
    del config["llm_config"]["model_type"]
    model = ref.ours(config)
    assert model.state_dict().keys() == ref.ours(ref.config_of("internvl_chat")).state_dict().keys()
    config["llm_config"]["architectures"] = ["InternLM2ForCausalLM"]
    with pytest.raises(UserError, match="language model of type 'InternLM2ForCausalLM' is not supported"):
        ref.ours(config)


def test_a_slice_of_a_fused_tensor_reads_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ref.config_of("NVLM_D")
    state = ref.ours(config).state_dict()
    path = directory_of(tmp_path / "model", config, state)
    checkpoint = Checkpoint(path)
    table = family_of(config).weightmap(config, checkpoint.names)
    name = "model.vision_tower.encoder.layer.1.attention.k_proj.weight"
    pieces = table.pieces(name, tuple(state[name].shape))
    part = (slice(3, 9), slice(0, 5))
    ((where, value),) = hf.regions(checkpoint, pieces, part)
    assert torch.equal(value, state[name][part]) and value.shape == (6, 5)
    assert where == (slice(0, 6), slice(0, 5))


def test_a_fused_tensor_of_another_size_is_named(tmp_path: Path) -> None:
    """A tower without the spare heads under a config that promises them, and the way out."""
    config = ref.config_of("NVLM_D")
    plain = ref.config_of("NVLM_D")
    plain["vision_config"]["num_dummy_heads"] = 0
    state = ref.ours(plain).state_dict()
    path = directory_of(tmp_path / "model", config, state)
    with pytest.raises(UserError, match=r"of another shape: .*qkv\.weight \(model \[384, 32\], file \[96, 32\]\)"):
        opened(path)
    (path / "config.json").write_text(json.dumps(plain))
    model, _ = opened(path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_dummies_change_nothing_as_long_as_they_are_zero(tmp_path: Path) -> None:
    """What converters add for eight ranks: zero rows in queries, keys, values and norms, zero columns behind them."""
    config, plain = ref.config_of("NVLM_D"), ref.config_of("NVLM_D")
    plain["vision_config"]["num_dummy_heads"] = 0
    small, large = ref.ours(plain), ref.ours(config)
    with torch.no_grad():
        for name, value in small.state_dict().items():
            target = large.state_dict()[name]
            target.zero_()
            target[tuple(slice(0, size) for size in value.shape)] = value
    batch = ref.batch_of(config, SAMPLES)
    expected, found = ref.logits_of(small, batch), ref.logits_of(large, batch)
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    large(batch, ref.loss).total.backward()
    gradient = large.get_parameter("model.vision_tower.encoder.layer.1.attention.v_proj.weight").grad
    assert gradient is not None and gradient[:32].any() and not gradient[32:].any()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("name", ref.REMOTE)
def test_the_tokenizer_knows_the_image_token(tmp_path: Path, name: str, file: str) -> None:
    path = make_model_dir(tmp_path / "model", name)
    assert "image_token_id" not in json.loads((path / "config.json").read_text())
    text = {"internvl_chat": "<IMG_CONTEXT>", "NVLM_D": "<|vision_pad|>"}[name]
    if file == "tokenizer_config.json":
        held = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps({**held, "added_tokens_decoder": {"77": {"content": text}}}))
    if file == "added_tokens.json":
        (path / file).write_text(json.dumps({"<other>": 3, text: 77}))
    _, source = opened(path)
    assert source.geometry.pad_ids == {"image": 5 if file == "tokenizer.json" else 77}
    assert text in source.geometry.placeholder["image"]
    assert source.max_positions == 4096 and source.dtype_name == "float32"


def test_a_tokenizer_without_an_image_token_is_refused(tmp_path: Path) -> None:
    path = make_model_dir(tmp_path / "model", "NVLM_D")
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|vision_pad|>", "<|other|>"))
    with pytest.raises(UserError, match=r"no token <\|vision_pad\|> or <image>, .* set image_token and image_token_id"):
        opened(path)
    file.write_text(file.read_text().replace("<|other|>", "<image>"))
    assert opened(path)[1].geometry.placeholder == {"image": "<Image><image></Image>"}


def test_a_tokenizer_in_pieces_beside_modelling_code(tmp_path: Path) -> None:
    """``vocab.json`` and ``merges.txt`` instead of ``tokenizer.json``, and a config that names code of its own."""
    path = make_model_dir(tmp_path / "model", "internvl_chat")
    held = json.loads((path / "tokenizer.json").read_text())
    special = [token["content"] for token in held["added_tokens"]]
    plain = [token for token in held["model"]["vocab"] if token not in special]
    added = {token: len(plain) + index for index, token in enumerate(special)}
    (path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(plain)}))
    merges = [" ".join(pair) for pair in held["model"]["merges"]]
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (path / "added_tokens.json").write_text(json.dumps(added))
    decoder = {str(index): {"content": token, "special": True} for token, index in added.items()}
    named = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (path / "config.json").write_text(json.dumps(config))
    expected = Tokenizer.from_file(str(path / "tokenizer.json")).encode("<img><IMG_CONTEXT></img>\nWhat is it?").tokens
    (path / "tokenizer.json").unlink()
    _, source = opened(path)
    renderer = Renderer(path, source.geometry)
    assert renderer.tokenizer.encode("<img><IMG_CONTEXT></img>\nWhat is it?").tokens == expected
    assert source.geometry.pad_ids == {"image": added["<IMG_CONTEXT>"]}


VIT = {"num_hidden_layers": 45, "image_size": 448}
SMALL_VIT = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
SMALL_VIT |= {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True, "image_size": 448}
QWEN2_72B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "vocab_size": 152064,
}
QWEN2_72B |= {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
QWEN2_HALF_B = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864}
QWEN2_HALF_B |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151674}
QWEN2_HALF_B |= {"rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}}


@pytest.mark.parametrize(
    ("name", "vision", "llm", "published"),
    [("NVLM_D", VIT, QWEN2_72B, 79.38e9), ("internvl_chat", SMALL_VIT, QWEN2_HALF_B, 0.938e9)],
)
def test_full_models_have_their_published_size(
    name: str, vision: dict[str, Any], llm: dict[str, Any], published: float
) -> None:
    """Which says that the spare heads are on disk: without them NVLM-D would have half a billion less."""
    config = {"model_type": name, "ps_version": "v2", "vision_config": vision, "llm_config": llm}
    with torch.device("meta"):
        model = family_of(config).build(config)
    assert abs(sum(parameter.numel() for parameter in model.parameters()) - published) < 1e-3 * published
