"""Adapters on sharded models: the same gradients and the same file as on one process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tessera.adapt as adapt
from tessera.config.run import AdaptArgs
from tessera.contract.layout import layout_of
from tessera.models.families import family_of
from tessera.parallel import fsdp
from tessera.parallel.mesh import Mesh, world_size
from tests.parity import reference as ref
from tests.ranks import run_ranks

SAMPLES: list[ref.Sample] = [[5, (1, 4, 6), 7], [3, (1, 8, 8), 4]]


def _step(fields: dict[str, Any], quantised: bool, out: str) -> dict[str, torch.Tensor]:
    """One SGD step on the same batch per rank; the whole gradient of every trained parameter."""
    mesh = Mesh.from_env(layout_of(world_size(), zero=3))
    config = ref.config_of("qwen3_vl")
    plan, batch = family_of(config).plan(config), ref.batch_of(config, SAMPLES)
    model = ref.ours(config)
    how = adapt.Quantisation(4) if quantised else None
    made = adapt.apply(model, AdaptArgs(**fields), plan, seed=3, quantisation=how)
    fsdp.shard(model, plan, mesh, compute_dtype=torch.float32)
    (model(batch, ref.loss).total / batch.weight / mesh.world).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if name in made.trainable and parameter.grad is not None:
            gradients[name] = fsdp.full(parameter.grad, mesh).detach().clone()
            parameter.data -= 0.1 * parameter.grad
    tensors = adapt.adapter_tensors(model, made, lambda tensor: fsdp.full(tensor, mesh))
    if mesh.is_main:
        adapt.save_adapter(tensors, made, out, base_model=None)
    return gradients


@pytest.mark.parametrize(
    ("variant", "quantised"),
    [({}, False), ({"use_dora": True, "modules_to_save": ("embed_tokens",)}, False), ({}, True)],
)
def test_two_ranks_equal_one(adapt_args, tmp_path: Path, variant: dict, quantised: bool) -> None:
    if quantised:
        pytest.importorskip("bitsandbytes")
    fields = asdict(adapt_args(**variant))
    alone = _step(fields, quantised, str(tmp_path / "alone"))
    for gradients in run_ranks(_step, 2, fields, quantised, str(tmp_path / "two")):
        assert gradients.keys() == alone.keys()
        for name, gradient in alone.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)
    one, two = (load_file(str(tmp_path / place / "adapter_model.safetensors")) for place in ("alone", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-4)
