"""Adapters: every tensor comes back, and the update of every fused matrix is that of the separate ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tessera.adapt.merging import Merged
from tessera.config.errors import UserError
from tessera.contract.model import Family
from tessera.contract.shards import whole
from tessera.models.families import family_of
from tessera.weights.hf import shapes_of
from tessera.weights.megatron import adapters
from tessera.weights.megatron.checkpoint import LEGACY, locate
from tessera.weights.megatron.options import Options
from tessera.weights.megatron.ranks import Ranks
from tests.megatron import Model, dcp_tensors

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEM = "base_model.model."


def peft_adapter(
    path: Path, name: str, *, shared: bool, rank: int = 4, only: tuple[str, ...] = LINEAR
) -> dict[str, Tensor]:
    """An adapter on all linear layers of the decoder, experts and routers, as peft's files spell it."""
    family = family_of({"model_type": name})
    with torch.device("meta"):
        shapes = shapes_of(family.build(family.tiny()))
    made: dict[str, Tensor] = {}
    common: dict[tuple[str, str], Tensor] = {}
    for key, shape in shapes.items():
        module, _, leaf = key.rpartition(".")
        last = module.rpartition(".")[2]
        if leaf in adapters.EXPERTS and only == LINEAR:
            stem = f"{STEM}{module}{adapters.EXPERTS[leaf]}"
            made[f"{stem}.lora_A.weight"] = torch.randn(shape[0] * rank, shape[2])
            made[f"{stem}.lora_B.weight"] = torch.randn(shape[1], rank * shape[0])
        elif leaf == "weight" and "visual" not in key and (last in only or (last == "gate" and only == LINEAR)):
            first = torch.randn(rank, shape[1])
            group = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "fc1", "up_proj": "fc1"}.get(last)
            if shared and group:
                first = common.setdefault((module.rpartition(".")[0], group), first)
            made[f"{STEM}{module}.lora_A.weight"] = first.clone()
            made[f"{STEM}{module}.lora_B.weight"] = torch.randn(shape[0], rank)
    path.mkdir()
    save_file(made, path / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "use_rslora": False, "target_modules": list(only)}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return made


def converted(tmp_path: Path, name: str, options: Options) -> tuple[Path, Family, dict[str, Any]]:
    family = family_of({"model_type": name})
    root = tmp_path / "m"
    root.mkdir()
    adapters.to_megatron(tmp_path / "peft", family, family.tiny(), root, options)
    return root, family, family.tiny()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["qwen3_moe", "internvl"])
def test_there_and_back(tmp_path: Path, name: str, shared: bool, tp: int) -> None:
    made = peft_adapter(tmp_path / "peft", name, shared=shared)
    root, family, config = converted(tmp_path, name, Options(dialect="swift", ranks=Ranks(tp=tp)))
    assert json.loads((root / "adapter_config.json").read_text())["r"] == (4 if shared else 12)
    (tmp_path / "back").mkdir()
    assert adapters.to_peft(root, family, config, tmp_path / "back") == len(made) // 2
    held = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert held.keys() == made.keys() and all(torch.equal(held[key], made[key]) for key in made)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["lora_alpha"] == 8


def updates(held: dict[str, Tensor], fields: dict[str, Any]) -> dict[str, Tensor]:
    """scale * B A of every linear pair, in float64."""
    scale = fields["lora_alpha"] / fields["r"]
    keys = [key for key in held if key.endswith("lora_A.weight") and ".experts" not in key]
    return {key: scale * held[key.replace("_A.", "_B.")].double() @ held[key].double() for key in keys}


@pytest.mark.parametrize("shared", [True, False])
def test_updates_are_those_of_the_fused_pair(tmp_path: Path, shared: bool) -> None:
    """What is stored there, multiplied out and cut by Megatron's definition, is what we would have added."""
    made = peft_adapter(tmp_path / "peft", "qwen3_moe", shared=shared)
    root, _, _ = converted(tmp_path, "qwen3_moe", Options(dialect="swift", stacked=False))
    fields = json.loads((root / "adapter_config.json").read_text())
    wanted = updates(made, {"lora_alpha": 8, "r": 4})
    held = dcp_tensors(locate(root).path)
    for layer in range(3):
        stem = f"decoder.layers.{layer}.self_attention.linear_qkv.lora_"
        b, a = held[f"{stem}B.default.weight"].double(), held[f"{stem}A.default.weight"].double()
        fused = (fields["lora_alpha"] / fields["r"] * b @ a).view(2, -1, 64)
        q, k, v = fused.split([64, 32, 32], 1)
        own = f"{STEM}model.layers.{layer}.self_attn."
        for name, part in {"q": q, "k": k, "v": v}.items():
            expected = wanted[f"{own}{name}_proj.lora_A.weight"]
            torch.testing.assert_close(part.reshape(-1, 64), expected, rtol=0, atol=1e-12)
    expert = held["decoder.layers.1.mlp.experts.experts.linear_fc2.lora_B.default.weight"]
    folded = made[f"{STEM}model.layers.1.mlp.experts.lora_B.weight"].view(64, 4, 8)  # the expert runs fastest
    assert torch.equal(expert[5, :, :4], folded[:, :, 5])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("source", ["adapter_config.json", "args.json"])
def test_an_adapter_of_another_toolkit(tmp_path: Path, source: str, tp: int) -> None:
    """No record of ours: one pair per fused matrix becomes pairs that share A. Gate and up lie rank by rank."""
    made = peft_adapter(tmp_path / "peft", "llama", shared=True)
    root, family, config = converted(tmp_path, "llama", Options(dialect="swift", ranks=Ranks(tp=tp)))
    (root / "adapter_layout.json").unlink()
    common = locate(root).path / "common.pt"
    import argparse

    torch.save({"args": argparse.Namespace(tensor_model_parallel_size=tp)}, common)
    if source == "args.json":
        (root / "adapter_config.json").unlink()
        (root / "args.json").write_text(json.dumps({"lora_alpha": 8, "lora_rank": 4}))
    (tmp_path / "back").mkdir()
    adapters.to_peft(root, family, config, tmp_path / "back", base_model="base")
    held = load_file(tmp_path / "back" / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert held.keys() == made.keys() and all(torch.equal(held[key], made[key]) for key in made)
    assert (fields["r"], fields["lora_alpha"]) == (4, 8)
    assert "model.layers.0.self_attn.q_proj" in fields["target_modules"]


def test_a_part_that_is_not_adapted_gets_no_update(tmp_path: Path) -> None:
    made = peft_adapter(tmp_path / "peft", "llama", shared=True, only=("q_proj", "v_proj"))
    root, family, config = converted(tmp_path, "llama", Options(dialect="swift", stacked=False))
    b = dcp_tensors(locate(root).path)["decoder.layers.0.self_attention.linear_qkv.lora_B.default.weight"]
    assert not b.view(2, -1, 4)[:, 32:48].any() and b.any()
    (tmp_path / "back").mkdir()
    adapters.to_peft(root, family, config, tmp_path / "back")
    assert load_file(tmp_path / "back" / "adapter_model.safetensors").keys() == made.keys()


def test_tessera_reads_the_adapter_it_gets_back(tmp_path: Path) -> None:
    """peft itself takes the files, and merging gives the same bits."""
    peft_adapter(tmp_path / "peft", "llama", shared=False)
    root, family, config = converted(tmp_path, "llama", Options(dialect="swift"))
    (tmp_path / "back").mkdir()
    adapters.to_peft(root, family, config, tmp_path / "back")
    source = Model(tmp_path / "hf", "llama")
    together = []
    for folder in ("peft", "back"):
        with torch.device("meta"):
            module = family.build(config)
        held = Merged.of(
            module, tmp_path / folder, family.plan(config).groups, lambda name, part: source.ours[name][part]
        )
        assert held.adapted > 0
        together.append({name: held.region(name, whole(tuple(value.shape))) for name, value in source.ours.items()})
    assert all(torch.equal(value, together[1][name]) for name, value in together[0].items())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"use_dora": True}, r"DoRA has no place in a Megatron adapter; add --merge_lora true"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save has no place"),
        ({"alpha_pattern": {"q_proj": 2}}, r"pairs of different rank or alpha"),
    ],
)
def test_what_megatron_has_no_place_for(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    peft_adapter(tmp_path / "peft", "llama", shared=True)
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=line):
        converted(tmp_path, "llama", Options(dialect="swift"))
    assert not list((tmp_path / "m").iterdir())


def test_bad_adapters_are_one_line(tmp_path: Path) -> None:
    peft_adapter(tmp_path / "peft", "llama", shared=True)
    family = family_of({"model_type": "llama"})
    with pytest.raises(UserError, match=r"--mcore_format torch: adapters are written as torch_dist only"):
        adapters.to_megatron(tmp_path / "peft", family, family.tiny(), tmp_path, Options(format=LEGACY))
    root, _, _ = converted(tmp_path, "llama", Options(dialect="swift"))
    for name in ("adapter_layout.json", "adapter_config.json"):
        (root / name).unlink()
    with pytest.raises(UserError, match=r"neither adapter_config.json nor args.json there says what lora_alpha is"):
        adapters.to_peft(root, family, family.tiny(), tmp_path)
