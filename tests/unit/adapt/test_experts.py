"""Adapters of experts: the update they stand for, shares of them, and what peft cannot say."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import tessera.adapt as adapt
from tessera.adapt.experts import ExpertLora, from_file, to_file
from tessera.adapt.stored import Stored
from tessera.adapt.trainable import param_groups
from tessera.config.errors import UserError
from tessera.contract.shards import whole
from tessera.models.families import family_of
from tessera.models.moe import Experts
from tests.parity import reference as ref

COUNTS = torch.tensor([3, 0, 5, 1])


def adapted(experts: int = 4) -> ExpertLora:
    torch.manual_seed(0)
    base = Experts(experts, 8, 6)
    layer = ExpertLora(base, rank=2, scaling=0.5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def test_the_update_is_the_merged_one() -> None:
    layer, rows = adapted(), torch.randn(9, 8)
    together = copy.deepcopy(layer.base_layer)
    for part, weight in together.named_parameters():
        weight.data = layer.added(part, weight.data, whole(tuple(weight.shape)))
    torch.testing.assert_close(together(rows, COUNTS), layer(rows, COUNTS), rtol=1e-5, atol=1e-5)


def test_a_share_of_the_experts_is_the_same_rows_of_the_adapter() -> None:
    layer, rows = adapted(), torch.randn(9, 8)
    everything = layer(rows, COUNTS)
    for first, part in ((0, rows[:3]), (2, rows[3:])):
        half = ExpertLora(Experts(2, 8, 6), rank=2, scaling=0.5)
        with torch.no_grad():
            for name, parameter in half.named_parameters():
                parameter.copy_(layer.get_parameter(name)[first : first + 2])
        start = 0 if first == 0 else 3
        torch.testing.assert_close(half(part, COUNTS[first : first + 2]), everything[start : start + len(part)])


def test_files_keep_every_number() -> None:
    layer = adapted()
    ours = {f"a.experts.{name}": p.detach() for name, p in layer.named_parameters() if "lora" in name}
    held = {}
    for name, tensor in ours.items():
        found = to_file(name, tensor)
        assert found is not None and found[1].dim() == 2
        held[found[0].removesuffix(".weight") + ".default.weight"] = Stored.of(found[1])
    unfolded = from_file(held, {"a.experts": 4}, "default")
    again = {name: stored.read(whole(stored.shape)) for name, stored in unfolded.items()}
    assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)
    assert to_file("a.q_proj.lora_A.default.weight", torch.ones(2, 2)) is None


def test_all_linear_covers_experts(adapt_args, tmp_path: Path) -> None:
    config = ref.config_of("qwen3_vl_moe")
    plan, model = family_of(config).plan(config), ref.ours(config).train()
    made = adapt.apply(model, adapt_args(lora_dropout=0.1, lorap_lr_ratio=4.0), plan, seed=1)
    stacks = {f"model.language_model.layers.{index}.mlp.experts" for index in (0, 2)}
    assert stacks <= set(made.targets)
    batch = ref.batch_of(config, [[5, (1, 4, 6), 7], [9]])
    model(batch, ref.loss).total.backward()
    assert all(model.get_parameter(name).grad is not None for name in made.trainable)
    assert not any("base_layer" in name or "mlp.gate." in name for name in ref.gradients(model))
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path, base_model=None)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["lora_dropout"] == 0.0, "peft could not load it"
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= set(written["target_parameters"])


def test_b_has_its_own_rate_under_lora_plus(adapt_args, train_args) -> None:
    config = ref.config_of("qwen3_moe")
    model = ref.ours(config)
    made = adapt.apply(model, adapt_args(lorap_lr_ratio=4.0), family_of(config).plan(config), seed=1)
    names = {group.name: group.names for group in param_groups(model, train_args(), made)}
    assert all("lora_B" in name for name in names["llm.lora_B"])
    assert any("lora_B_down_proj" in name for name in names["llm.lora_B"])


def test_the_seed_and_the_name_decide(adapt_args) -> None:
    config = ref.config_of("qwen3_moe")
    starts = []
    for seed in (1, 1, 2):
        model = ref.ours(config)
        adapt.apply(model, adapt_args(), family_of(config).plan(config), seed=seed)
        starts.append(model.get_parameter("model.layers.1.mlp.experts.lora_A_gate_up_proj").detach())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_what_experts_cannot_have_is_refused(adapt_args) -> None:
    config = ref.config_of("qwen3_moe")
    plan = family_of(config).plan(config)
    with pytest.raises(UserError, match="DoRA"):
        adapt.apply(ref.ours(config), adapt_args(use_dora=True), plan, seed=1)
    linear = adapt.apply(ref.ours(config), adapt_args(use_dora=True, target_modules=("q_proj",)), plan, seed=1)
    assert not any("experts" in name for name in linear.targets)
    with pytest.raises(UserError, match="DoRA|use_dora"):
        adapt.apply(ref.ours(config), adapt_args(use_dora=True, target_modules=("all-router",)), plan, seed=1)
    dense = ref.config_of("qwen3")
    with pytest.raises(UserError, match="no router"):
        adapt.apply(ref.ours(dense), adapt_args(target_modules=("all-router",)), plan, seed=1)
    with pytest.raises(UserError, match="both adapted and trained whole"):
        adapt.apply(ref.ours(config), adapt_args(modules_to_save=("experts",)), plan, seed=1)
