"""Hugging Face to Megatron and back is the same bits: every family, dialect, format and layout of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera.config.errors import UserError
from tessera.models.families import FAMILIES, family_of
from tessera.weights.megatron import convert
from tessera.weights.megatron.checkpoint import LEGACY, TORCH_DIST, locate
from tessera.weights.megatron.options import Options
from tessera.weights.megatron.ranks import Ranks
from tessera.weights.megatron.towers import TOWERS, dialects_of
from tests.megatron import Model, dcp_tensors

SPARSE = ("qwen3_moe", "qwen3_vl_moe", "glm4v_moe")
CASES = [
    (name, dialect)
    for name, family in ((name, family_of({"model_type": name})) for name in FAMILIES)
    for dialect in (dialects_of(family) if family.name in TOWERS else ("swift",))
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "stacked": {"format": TORCH_DIST, "stacked": True},
    "per_layer": {"format": TORCH_DIST, "stacked": False, "ranks": Ranks(tp=2, pp=3, ep=2)},
    "ranks": {"format": LEGACY, "ranks": Ranks(tp=2, pp=3, ep=2), "iteration": None},
    "uneven": {"format": LEGACY, "ranks": Ranks(tp=2, ep=2, etp=1, pp=2, stages=(1, 2)), "local": True},
}
RUNS = [
    (name, dialect, layout)
    for name, dialect in CASES
    for layout in LAYOUTS
    # Dialects that keep a tower as it is differ in nothing but its prefix.
    if dialect in ("pai", "lm") or name not in TOWERS or layout in ("stacked", "ranks")
]


def fitting(layout: dict[str, Any], name: str) -> Options:
    """The layout, without expert ranks for a model that has none."""
    ranks: Ranks = layout.get("ranks", Ranks())
    if name not in SPARSE:
        ranks = Ranks(tp=ranks.tp, pp=ranks.pp, stages=ranks.stages)
    return Options(**{**layout, "ranks": ranks})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """One tiny model of each family, made when it is first asked for."""
    return lru_cache(maxsize=None)(lambda name: Model(tmp_path_factory.mktemp(name) / "hf", name))


@pytest.mark.parametrize(("name", "dialect", "kind"), RUNS)
def test_there_and_back(tmp_path: Path, models: Callable[[str], Model], name: str, dialect: str, kind: str) -> None:
    model, layout = models(name), LAYOUTS[kind]
    options = fitting({**layout, "dialect": dialect}, name)
    root = model.to_megatron(tmp_path / "megatron", options)
    found = locate(root)
    assert (found.format, found.iteration) == (options.format, options.iteration)
    if model.family.name in TOWERS:
        assert found.assembled(model.family, model.config).table.dialect == dialect
    model.same_weights(model.to_hf(root, tmp_path / "back"))
    for side in ("config.json", "tokenizer.json"):
        assert (root / side).read_bytes() == (model.path / side).read_bytes()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe", "qwen3_moe"])
def test_shards_and_index_come_back(tmp_path: Path, name: str) -> None:
    """A checkpoint of several files, experts one by one or turned as on the hub."""
    from tessera.weights import hf

    whole = Model(tmp_path / "whole", name)
    split = tmp_path / "split"
    split.mkdir()
    ours = {key: value.contiguous() for key, value in whole.ours.items()}
    hf.save(ours, split, whole.family.weightmap(whole.config, []), max_shard_size="100KB")
    (split / "config.json").write_text(json.dumps(whole.config))
    whole.path = split
    whole.reload()
    assert len(whole.checkpoint.metadata) > 2
    root = whole.to_megatron(tmp_path / "megatron", Options(dialect="swift", ranks=Ranks(tp=2)))
    whole.same_weights(whole.to_hf(root, tmp_path / "back"))


@pytest.mark.parametrize(("before", "after"), [(TORCH_DIST, LEGACY), (LEGACY, TORCH_DIST)])
def test_from_any_ranks_to_any_others(tmp_path: Path, before: str, after: str) -> None:
    model = Model(tmp_path / "hf", "qwen3_vl_moe")
    one = Options(dialect="pai", format=before, ranks=Ranks(tp=2, pp=1, ep=4), vocab_divisor=96)
    two = Options(dialect="pai", format=after, ranks=Ranks(tp=1, pp=3, ep=2))
    first = model.to_megatron(tmp_path / "first", one)
    second = tmp_path / "second"
    second.mkdir()
    held = locate(first).assembled(model.family, model.config)
    convert.reshard(held, model.family, model.config, second, two)
    model.same_weights(model.to_hf(second, tmp_path / "back", "pai"))
    direct = model.to_megatron(tmp_path / "direct", two)
    for file in (file for file in locate(direct).path.rglob("*") if file.is_file()):
        if file.name != "common.pt":
            assert file.read_bytes() == (locate(second).path / file.relative_to(locate(direct).path)).read_bytes(), file


def test_from_one_dialect_to_another(tmp_path: Path) -> None:
    model = Model(tmp_path / "hf", "qwen3_vl")
    first = model.to_megatron(tmp_path / "first", Options(dialect="pai"))
    second = tmp_path / "second"
    second.mkdir()
    held = locate(first).assembled(model.family, model.config)
    account = convert.reshard(held, model.family, model.config, second, Options(dialect="bridge", ranks=Ranks(tp=2)))
    assert account.dialect == "bridge" and account.parameters == sum(value.numel() for value in model.ours.values())
    assert locate(second).assembled(model.family, model.config).table.dialect == "bridge"
    model.same_weights(model.to_hf(second, tmp_path / "back"))


def test_types_are_kept_and_can_be_changed(tmp_path: Path) -> None:
    """A router's correction bias stays float32 whatever the weights become."""
    model = Model(tmp_path / "hf", "glm4v_moe", dtype=torch.float32)
    root = model.to_megatron(tmp_path / "megatron", Options(dialect="swift", dtype=torch.bfloat16))
    held = dcp_tensors(locate(root).path)
    kinds = {name: tensor.dtype for name, tensor in held.items()}
    assert {kind for name, kind in kinds.items() if "expert_bias" not in name} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if "expert_bias" in name} == {torch.float32}
    ours = model.ours["model.language_model.norm.weight"]
    assert torch.equal(held["language_model.decoder.final_layernorm.weight"], ours.bfloat16())


def test_parts_of_different_types_get_the_widest(tmp_path: Path) -> None:
    """Values are exact, and the recorded types are restored on the way back."""
    model = Model(tmp_path / "hf", "qwen2")
    file = model.path / "model.safetensors"
    held = load_file(file)
    held["model.layers.0.self_attn.q_proj.weight"] = held["model.layers.0.self_attn.q_proj.weight"].float()
    save_file(held, file, metadata={"format": "pt"})
    model.reload()
    root = model.to_megatron(tmp_path / "megatron", Options(dialect="lm", stacked=False))
    kinds = {name: tensor.dtype for name, tensor in dcp_tensors(locate(root).path).items()}
    assert kinds["decoder.layers.0.self_attention.linear_qkv.weight"] == torch.float32
    assert kinds["decoder.layers.1.self_attention.linear_qkv.weight"] == torch.bfloat16
    found = convert.from_megatron(locate(root).assembled(model.family, model.config))
    (tmp_path / "back").mkdir()
    account = convert.to_hf(found, model.family, model.config, tmp_path / "back", layout=root)
    # The other parts of that tensor were bfloat16 before they were widened; nobody can know that they still are.
    assert account.rounded == ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == held.keys()
    assert all(torch.equal(back[name], held[name]) and back[name].dtype == held[name].dtype for name in held)


def test_a_stored_copy_of_a_tied_head_comes_back(tmp_path: Path) -> None:
    model = Model(tmp_path / "hf", "qwen2")
    file = model.path / "model.safetensors"
    held = load_file(file)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, file, metadata={"format": "pt"})
    model.reload()
    root = model.to_megatron(tmp_path / "megatron", Options(dialect="lm", format=LEGACY, ranks=Ranks(pp=3)))
    back = load_file(model.to_hf(root, tmp_path / "back") / "model.safetensors")
    assert back.keys() == held.keys() and all(torch.equal(back[name], held[name]) for name in held)


def test_without_a_record_names_are_the_released_ones(tmp_path: Path) -> None:
    model = Model(tmp_path / "hf", "qwen2_5_vl")
    root = model.to_megatron(tmp_path / "megatron", Options(dialect="pai"))
    out = tmp_path / "back"
    out.mkdir()
    source = convert.from_megatron(locate(root).assembled(model.family, model.config))
    convert.to_hf(source, model.family, model.config, out, max_shard_size="100KB")
    assert (out / "model.safetensors.index.json").is_file()
    model.path = out
    (out / "config.json").write_text(json.dumps(model.config))
    before = model.ours
    model.reload()
    assert all(torch.equal(value, before[name]) for name, value in model.ours.items())


def test_the_same_conversion_writes_the_same_files(tmp_path: Path) -> None:
    model = Model(tmp_path / "hf", "qwen3_vl_moe")
    one, two = (model.to_megatron(tmp_path / name, Options(dialect="pai", ranks=Ranks(tp=2, ep=2))) for name in "ab")
    for file in (file for file in one.rglob("*") if file.is_file()):
        assert file.read_bytes() == (two / file.relative_to(one)).read_bytes(), file


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda text: text[:100], r"hf_layout.json: not readable"),
        (
            lambda text: text.replace("embed_tokens", "embedding"),
            r"its layout is that of another model; 1 differ: model.e",
        ),
        (lambda text: text.replace("[512, 64]", "[500, 64]"), r"its layout is that of another model; . differ: "),
    ],
)
def test_a_layout_of_something_else(tmp_path: Path, change: Callable[[str], str], line: str) -> None:
    model = Model(tmp_path / "hf", "llama")
    root = model.to_megatron(tmp_path / "megatron", Options(dialect="lm"))
    layout = root / convert.LAYOUT
    layout.write_text(change(layout.read_text()))
    with pytest.raises(UserError, match=line):
        model.to_hf(root, tmp_path / "back")
    assert not list((tmp_path / "back").iterdir())
