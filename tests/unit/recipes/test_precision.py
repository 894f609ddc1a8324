"""What is float32 when products are bfloat16: masters, gradients, their sums over ranks, AdamW's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera import adapt
from tessera.checkpoint import open as door
from tessera.config.resolve import run_of
from tessera.contract.layout import layout_of
from tessera.objectives.lm import NextToken
from tessera.parallel import fsdp
from tessera.parallel.mesh import Mesh, world_size
from tessera.recipes.placement import load_model
from tessera.train.optim import Optimizers
from tessera.train.schedule import Schedule
from tessera.train.step import Engine, train_step
from tests.invariance.test_step import packed
from tests.models import make_model_dir
from tests.parity.reference import config_of
from tests.ranks import run_ranks
from tests.toys import VOCABULARY

BF16, FP32 = torch.bfloat16, torch.float32


def one_step(directory: str, stage: int, flags: dict[str, Any]) -> dict[str, Any]:
    """A step of the recipe's own model in bfloat16; dtypes by name, and how far each parameter moved."""
    mesh = Mesh.from_env(layout_of(world_size(), zero=stage), timeout_s=60)
    run = run_of(
        "sft", model=directory, dataset=("unused",), torch_dtype="bfloat16", deepspeed=f"zero{stage}", lora_dropout=0.0,
        max_grad_norm=0.0, adam_epsilon=1e-2, **flags
    )  # fmt: skip
    source = door.describe(run.model)
    placed = load_model(run, source, mesh, BF16)
    model, adaptation = placed.model, placed.adaptation
    optimizers = Optimizers(
        model, adapt.param_groups(model, run.train, adaptation), run.train, Schedule("constant", 1, 0), mesh,
        host_share=run.memory.optimizer_share,
    )  # fmt: skip
    products: set[torch.dtype] = set()
    linear = model.get_submodule("model.language_model.layers.0.mlp.down_proj")
    linear.register_forward_hook(lambda module, args, out: products.add(out.dtype))
    before = {name: fsdp.full(p.detach(), mesh).clone() for name, p in model.named_parameters()}
    gradients: dict[str, torch.dtype] = {}
    step = optimizers.step

    def seen() -> None:
        gradients.update({name: p.grad.dtype for name, p in model.named_parameters() if p.grad is not None})
        step()

    optimizers.step = seen  # type: ignore[method-assign]
    config = config_of("qwen3_vl")
    config["text_config"]["vocab_size"] = VOCABULARY
    model.train()
    result = train_step(Engine(model, NextToken(64), mesh, BF16), optimizers, packed(config, 2, 0), max_grad_norm=0.0)
    assert result.skipped is None
    after = {name: fsdp.full(p.detach(), mesh).clone() for name, p in model.named_parameters()}
    return {
        "trained": {name for name, p in model.named_parameters() if p.requires_grad},
        "parameters": {name: p.dtype for name, p in model.named_parameters()},
        "gradients": gradients,
        "state": {name: tensor.dtype for name, tensor in optimizers.state().items()},
        "products": products,
        "moved": {name: after[name] - before[name] for name in after},
        "norm": result.grad_norm,
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("precision") / "model", "qwen3_vl", dtype=BF16)


FULL = {"train_type": "full", "freeze_vit": False, "freeze_aligner": False, "learning_rate": 1e-5}
LORA = {"train_type": "lora", "learning_rate": 1e-4}


def check(found: dict[str, Any]) -> None:
    trained, parameters = found["trained"], found["parameters"]
    assert {parameters[name] for name in trained} == {FP32}
    assert {dtype for name, dtype in parameters.items() if name not in trained} <= {BF16}
    assert found["gradients"].keys() == trained and set(found["gradients"].values()) == {FP32}
    assert set(found["state"].values()) == {FP32}
    assert found["products"] == {BF16}


@pytest.mark.parametrize("flags", [FULL, LORA, {**FULL, "optimizer_cpu_offload": True}], ids=["full", "lora", "host"])
def test_masters_gradients_and_state_are_float32(directory: Path, flags: dict[str, Any]) -> None:
    found = one_step(str(directory), 0, flags)
    check(found)
    frozen = {name for name, dtype in found["parameters"].items() if dtype == BF16}
    assert bool(frozen) == (flags["train_type"] == "lora")
    # A step of 1e-5 is far below bfloat16's resolution at these weights; a float32 master takes it all the same.
    name = next(name for name in found["trained"] if name.endswith("layers.0.mlp.down_proj.weight") or "lora_B" in name)
    assert found["moved"][name].abs().max() > 0


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("flags", [FULL, LORA], ids=["full", "lora"])
def test_ranks_sum_gradients_in_float32(directory: Path, flags: dict[str, Any], stage: int) -> None:
    """Both ranks see the same batches, so a sum of two equal gradients is exactly the gradient of one process."""
    one = one_step(str(directory), 0, flags)
    for found in run_ranks(one_step, 2, str(directory), stage, flags):
        check(found)
        assert found["norm"] == pytest.approx(one["norm"], rel=2e-2)


def test_the_sum_over_ranks_is_not_rounded(directory: Path) -> None:
    for found in run_ranks(reduced, 2, 3):
        assert found == pytest.approx(1.0 + 2**-10, abs=1e-7)


def reduced(stage: int) -> float:
    """Gradients 1 and 2^-10, whose sum bfloat16 cannot hold, added up over two ranks under bfloat16 compute."""
    from tessera.contract.plan import Groups, Plan

    mesh = Mesh.from_env(layout_of(world_size(), zero=stage), timeout_s=60)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    fsdp.shard(model, Plan(Groups(("",)), ("0",), ()), mesh, compute_dtype=BF16)
    x = torch.full((1, 2), 1.0 if mesh.rank == 0 else 2.0**-10, dtype=BF16)
    model(x).sum().backward()
    gradient: Tensor | None = model[0].weight.grad
    assert gradient is not None and gradient.dtype == FP32
    return float(fsdp.full(gradient, mesh)[0, 0])
