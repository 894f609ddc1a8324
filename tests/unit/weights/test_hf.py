"""Checkpoints survive a round trip byte for byte, whatever lies in memory; nothing is missing unnoticed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tessera.config.errors import UserError
from tessera.contract.weightmap import WeightMap
from tessera.models.families import FAMILIES, family_of
from tessera.models.vlm import VLM
from tessera.weights import hf
from tessera.weights.hf import INDEX, Checkpoint, load, place, save
from tests.parity import reference as ref

SIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
SIDE += ("preprocessor_config.json", "chat_template.jinja", "special_tokens_map.json", "video_preprocessor_config.json")


def hub_directory(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], shard: str = "5GB") -> Path:
    """A directory like those on the hub, its weights split by hand-picked size."""
    path.mkdir()
    save(tensors, path, WeightMap(), max_shard_size=shard)
    (path / "config.json").write_text(json.dumps(config))
    for name in SIDE:
        (path / name).write_text(f"contents of {name}")
    (path / "README.md").write_text("a model card")
    return path


def renamed(name: str, old: bool) -> str:
    if not old:
        return name
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def checkpoint_of(
    path: Path, name: str, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", old: bool = False, **changes: Any
) -> tuple[Path, dict[str, Any]]:
    config = ref.config_of(name, **changes)
    state = ref.ours(config).state_dict()
    tensors = {renamed(key, old): value.to(dtype) for key, value in state.items()}
    return hub_directory(path, config, tensors, shard), config


def loaded(path: Path, config: dict[str, Any], dtype: Any = torch.float32) -> tuple[VLM, WeightMap]:
    family = family_of(config)
    with torch.device("meta"):
        model = family.build(config)
    checkpoint = Checkpoint(path)
    table = family.weightmap(config, checkpoint.names)
    report = load(model, checkpoint, table, dtype=dtype)
    held = [*model.parameters(), *model.buffers()]
    assert (report.tensors, report.parameters) == (len(held), sum(tensor.numel() for tensor in held))
    assert isinstance(model, VLM)
    return model, table


def same_files(one: Path, two: Path) -> None:
    names = {file.name for file in one.iterdir()} - {"README.md"}
    assert {file.name for file in two.iterdir()} == names
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(ref.REMOTE)))
@pytest.mark.parametrize("shard", ["5GB", "150KB"])
def test_no_op_round_trip_is_byte_identical(tmp_path: Path, name: str, shard: str) -> None:
    source, config = checkpoint_of(tmp_path / "in", name, shard=shard, old=name == "qwen2_5_vl")
    assert (source / INDEX).exists() == (shard != "5GB")
    model, table = loaded(source, config)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    (tmp_path / "out").mkdir()
    save(model.state_dict(), tmp_path / "out", table, source=source)
    same_files(source, tmp_path / "out")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "150KB"])
def test_no_op_round_trip_of_the_layout_on_the_hub(tmp_path: Path, name: str, shard: str) -> None:
    """What a family writes without a source to follow is how it is released; read back it is the same model."""
    config = ref.config_of(name)
    released = family_of(config).weightmap(config, [])
    original = ref.ours(config)
    tensors = {key: value.to(torch.bfloat16) for key, value in released.forward(original.state_dict()).items()}
    source = hub_directory(tmp_path / "in", config, tensors, shard)
    model, table = loaded(source, config)
    for key, value in model.state_dict().items():
        assert torch.equal(value, original.state_dict()[key].bfloat16().float()), key
    (tmp_path / "out").mkdir()
    save(model.state_dict(), tmp_path / "out", table, source=source)
    same_files(source, tmp_path / "out")


def test_experts_inside_another_family_are_named_like_it(tmp_path: Path) -> None:
    """A sparse decoder behind a tower that renames everything: both read what the other writes."""
    from transformers import AutoModelForImageTextToText

    text = {key: value for key, value in ref.config_of("qwen3_moe").items() if key != "architectures"}
    config = ref.config_of("internvl", text_config=text)
    original = ref.ours(config)
    released = family_of(config).weightmap(config, [])
    source = tmp_path / "in"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save(original.state_dict(), source, released)
    names = Checkpoint(source).names
    assert "language_model.model.layers.1.mlp.experts.7.up_proj.weight" in names
    assert "language_model.lm_head.weight" in names and "vision_tower.embeddings.cls_token" in names
    model, report = AutoModelForImageTextToText.from_pretrained(source, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    state = original.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "theirs")
    again, _ = loaded(tmp_path / "theirs", config)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("inner", [48, 32, 64])  # 32: gate_up is square, 64: down is
def test_experts_lie_either_way(tmp_path: Path, turned: bool, inner: int) -> None:
    config = ref.config_of("qwen3_vl_moe")
    config["text_config"]["moe_intermediate_size"] = inner
    original = ref.ours(config).state_dict()
    table = family_of(config).weightmap(config, [])
    source = hub_directory(tmp_path / "in", config, table.forward(original) if turned else original)
    shape = Checkpoint(source).entries["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape
    assert shape == ((8, 64, 2 * inner) if turned else (8, 2 * inner, 64))
    model, table = loaded(source, config)
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())
    (tmp_path / "out").mkdir()
    save(model.state_dict(), tmp_path / "out", table, source=source)
    same_files(source, tmp_path / "out")


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe"])
def test_a_share_of_the_experts_reads_its_own_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stacked: bool
) -> None:
    """Two of eight experts: a quarter of the bytes is read, whichever way they lie."""
    config = ref.config_of(name)
    original = ref.ours(config).state_dict()
    released = family_of(config).weightmap(config, [])
    source = hub_directory(tmp_path / "in", config, original if stacked else released.forward(original))
    checkpoint, read = Checkpoint(source), []
    plain = Checkpoint.read

    def counted(self: Checkpoint, name: str, part: Any = None) -> Tensor:
        found = plain(self, name, part)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(Checkpoint, "read", counted)
    shapes = {key: tuple(value.shape) for key, value in original.items()}
    table = family_of(config).weightmap(config, checkpoint.names)
    table = table.settled(shapes, {key: entry.shape for key, entry in checkpoint.entries.items()})
    for key in (key for key in shapes if ".experts." in key):
        pieces = table.pieces(key, shapes[key])
        part = (slice(4, 6), *(slice(0, size) for size in shapes[key][1:]))
        target = place(
            torch.empty(original[key][4:6].shape, device="meta"),
            lambda region, pieces=pieces, part=part: hf.regions(checkpoint, pieces, part),
            torch.float32,
            torch.device("cpu"),
        )
        assert torch.equal(target, original[key][4:6])
        assert sum(read) * 4 == original[key].nbytes
        read.clear()


@pytest.mark.parametrize("name", sorted({*ref.VLMS, *ref.TEXTS} - set(ref.REMOTE)))
def test_transformers_reads_and_writes_the_same(tmp_path: Path, name: str) -> None:
    """What transformers saves we load; what we save from it transformers loads, with the same logits."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = ref.config_of(name)
    original = ref.ours(config)
    ref.theirs(config, original).save_pretrained(tmp_path / "in", max_shard_size="200KB")
    written = json.loads((tmp_path / "in/config.json").read_text())
    model, table = loaded(tmp_path / "in", written)
    batch = ref.batch_of(config, [[5, (1, 4, 6), 7], [9]] if name in ref.VLMS else [[5], [9]])
    assert torch.equal(model(batch), original(batch))

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    (tmp_path / "out").mkdir()
    save(model.state_dict(), tmp_path / "out", table, source=tmp_path / "in")
    auto = AutoModelForImageTextToText if name in ref.VLMS else AutoModelForCausalLM
    again, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = ref.reference_logits(again, config, batch)
    torch.testing.assert_close(ref.logits_of(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("old", [False, True])
def test_both_namings_of_one_family(tmp_path: Path, old: bool) -> None:
    source, config = checkpoint_of(tmp_path / "in", "qwen2_5_vl", torch.float32, old=old)
    assert any(name.startswith("visual.") for name in Checkpoint(source).names) == old
    model, _ = loaded(source, config)
    expected = ref.ours(config).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def _uneven(name: str) -> torch.dtype:
    return torch.float32 if "norm" in name or "mlp" in name else torch.bfloat16


def test_source_type_wins_and_may_be_overridden(tmp_path: Path) -> None:
    """Norms in float32 beside bfloat16 matrices stay so; an explicit dtype changes floating tensors and config.json."""
    config = ref.config_of("llama", torch_dtype="bfloat16")
    state = {
        k: v.to(torch.float32 if "norm" in k else torch.bfloat16) for k, v in ref.ours(config).state_dict().items()
    }
    source = hub_directory(tmp_path / "in", config, state, "100KB")
    model, table = loaded(source, config, _uneven)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    (tmp_path / "same").mkdir()
    save(model.named_parameters(), tmp_path / "same", table, source=source)
    same_files(source, tmp_path / "same")

    (tmp_path / "half").mkdir()
    save(model.named_parameters(), tmp_path / "half", table, source=Checkpoint(source), dtype=torch.float16)
    files = {file.name: load_file(file) for file in (tmp_path / "half").glob("*.safetensors")}
    assert files.keys() == {file.name for file in source.glob("*.safetensors")}
    assert all(value.dtype == torch.float16 for held in files.values() for value in held.values())
    index = json.loads((tmp_path / "half" / INDEX).read_text())
    assert index["weight_map"] == json.loads((source / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(v.nbytes for held in files.values() for v in held.values())
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "float16"


def test_tied_head_with_a_copy_on_disk(tmp_path: Path) -> None:
    config = ref.config_of("qwen3_vl")
    state = ref.ours(config).state_dict()
    copied = state | {"lm_head.weight": state["model.language_model.embed_tokens.weight"].clone()}
    source = hub_directory(tmp_path / "in", config, copied)
    model, table = loaded(source, config)
    assert model.lm_head is None
    with torch.no_grad():
        model.head_weight.add_(1)
    (tmp_path / "out").mkdir()
    save(model.named_parameters(), tmp_path / "out", table, source=source)
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.language_model.embed_tokens.weight"])
    assert torch.equal(written["lm_head.weight"], copied["lm_head.weight"] + 1)

    copied["lm_head.weight"][3, 4] += 1
    other = hub_directory(tmp_path / "other", config, copied)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        loaded(other, config)


def test_ignored_tensors_are_carried_over(tmp_path: Path) -> None:
    config = ref.config_of("llama")
    state = ref.ours(config).state_dict() | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.rand(8)}
    source = hub_directory(tmp_path / "in", config, state)
    model, table = loaded(source, config)
    (tmp_path / "out").mkdir()
    save(model.named_parameters(), tmp_path / "out", table, source=source)
    same_files(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda state: state.update(extra=torch.ones(2)), "1 unexpected: extra"),
        (lambda state: state.update({"model.norm.weight": torch.ones(3)}), r"model\.norm\.weight \(model \[64\], file"),
        (lambda state: [state.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)], "3 missing"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path: Path, damage: Any, message: str) -> None:
    config = ref.config_of("llama")
    state = dict(ref.ours(config).state_dict())
    damage(state)
    with pytest.raises(UserError, match=message):
        loaded(hub_directory(tmp_path / "in", config, state), config)


def test_unreadable_directories_say_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="no safetensors file"):
        Checkpoint(tmp_path)
    source, _ = checkpoint_of(tmp_path / "in", "llama")
    file = source / "model.safetensors"
    whole = file.read_bytes()
    for size, message in ((len(whole) - 10, "is cut short"), (100, "not a readable"), (4, "not a readable")):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=message):
            Checkpoint(source)


def test_library_reads_what_we_write_without_a_source(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.int64).view(2, 3),
        "a": torch.randn(5).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.randn(4, 6).t(),
    }
    save(tensors, tmp_path, WeightMap())
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in read)
    (tmp_path / "reference").mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "reference/m.safetensors", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "reference/m.safetensors").read_bytes()


def test_loading_overwrites_real_parameters_in_place(tmp_path: Path) -> None:
    source, config = checkpoint_of(tmp_path / "in", "qwen2", torch.float32)
    model = ref.ours(config, seed=9)
    before = dict(model.named_parameters())
    load(model, Checkpoint(source), WeightMap(), dtype=torch.float32)
    expected = ref.ours(config).state_dict()
    for name, parameter in model.named_parameters():
        assert parameter is before[name] and torch.equal(parameter, expected[name])


def test_disk_full_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        save({"a": torch.ones(3)}, tmp_path, WeightMap())


def test_shard_sizes(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.ones(250) for index in range(10)}
    save(tensors, tmp_path, WeightMap(), max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*-of-00005.safetensors"))) == 5
    with pytest.raises(UserError, match="max_shard_size"):
        save(tensors, tmp_path, WeightMap(), max_shard_size="lots")
