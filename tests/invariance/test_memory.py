"""Whatever is recomputed or moved to the host, training is the same: losses, gradient norms, every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tessera.contract.layout import layout_of
from tessera.contract.memory import Recompute
from tessera.parallel.mesh import Mesh, world_size
from tests.invariance.engine import Trajectory, assert_same, train
from tests.invariance.test_step import TOLERANCE, packed, single_process
from tests.parity.reference import config_of
from tests.ranks import run_ranks

ALL = ("core_attn", "mlp", "layernorm")
HOW = {
    "full": Recompute("full"),
    "uniform2": Recompute("full", "uniform", 2),
    "uniform3": Recompute("full", "uniform", 3),
    "uniform99": Recompute("full", "uniform", 99),
    "block1": Recompute("full", "block", 1),
    "block99": Recompute("full", "block", 99),
    "core_attn": Recompute("selective", modules=("core_attn",)),
    "mlp": Recompute("selective", modules=("mlp",)),
    "layernorm": Recompute("selective", modules=("layernorm",)),
    "selective": Recompute("selective", modules=ALL),
}
LAYERS = 4  # so that groups of two and three end in full and in broken groups; deepstack comes in between


def deep(name: str) -> dict[str, Any]:
    config = config_of(name)
    text = {**config.get("text_config", config), "num_hidden_layers": LAYERS}
    return {**config, "text_config": text} if "text_config" in config else text


def alone(name: str, **kwargs: Any) -> Trajectory:
    config = deep(name)
    return train(config, [packed(config, 2, step) for step in range(3)], **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_no_way_of_recomputing_changes_a_bit(name: str, dtype: torch.dtype) -> None:
    want = alone(name, compute_dtype=dtype)
    for how in HOW.values():
        assert_same(alone(name, compute_dtype=dtype, recompute=(how, True)), want, 0.0)


@pytest.mark.parametrize("how", ["uniform3", "selective"])
def test_recomputing_adapters_with_dropout_changes_no_bit(how: str) -> None:
    flags = {"train_type": "lora", "freeze_vit": True, "freeze_aligner": True, "lora_dropout": 0.5}
    trajectories = []
    for what in (False, HOW[how]):
        torch.manual_seed(0)
        trajectories.append(alone("qwen3_vl", recompute=(what, True), **flags))
    assert_same(trajectories[1], trajectories[0], 0.0)


HOST = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.6, "activation_cpu_offload": True}


def on_ranks(stage: int) -> list[Trajectory]:
    """This rank's trajectories: nothing recomputed or moved, then in every other way."""
    mesh = Mesh.from_env(layout_of(world_size(), zero=stage), timeout_s=60)
    config = deep("qwen3_vl")
    steps = [packed(config, 1, step)[mesh.rank :: mesh.world] for step in range(3)]
    ways: list[tuple[Recompute | bool, dict[str, Any]]] = [(False, {}), (True, HOST)]
    ways += [(HOW[how], {}) for how in ("full", "uniform2", "uniform3", "block1", "selective")]
    return [train(config, steps, mesh=mesh, recompute=(how, bool(how)), **flags) for how, flags in ways]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_recompute_and_offload_exactly(stage: int) -> None:
    """Also groups of layers, whose parameters are gathered again, one after the other, inside backward."""
    config = deep("qwen3_vl")
    one = train(config, [packed(config, 1, step) for step in range(3)])
    for plain, *others in run_ranks(on_ranks, 2, stage):
        assert_same(plain, one, TOLERANCE)
        for other in others:
            assert_same(other, plain, 0.0)


@pytest.mark.parametrize("flags", [{}, {"activation_offload_num_layers": 1}, {"activation_offload_num_layers": 99}])
@pytest.mark.parametrize("how", [False, True, "uniform2", "core_attn"])
def test_offloaded_activations_change_no_bit(how: str | bool, flags: dict[str, Any]) -> None:
    what = HOW[how] if isinstance(how, str) else how
    got = alone("qwen3_vl", recompute=(what, False), activation_cpu_offload=True, **flags)
    assert_same(got, alone("qwen3_vl"), 0.0)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("flags", [{}, {"train_type": "lora", "freeze_vit": True}], ids=["full", "lora"])
def test_an_optimizer_on_the_host_is_the_same_optimizer(share: float, flags: dict[str, Any]) -> None:
    host = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": share}
    assert_same(single_process("qwen3_vl", 2, **host, **flags), single_process("qwen3_vl", 2, **flags), 0.0)
