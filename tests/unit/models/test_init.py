"""Random weights are a function of seed and name alone."""

from __future__ import annotations

import pytest
import torch

from tessera.models.families import FAMILIES, family_of
from tessera.models.init import init_weights
from tests.parity import reference as ref


def filled(name: str, seed: int, **changes: object) -> dict[str, torch.Tensor]:
    config = ref.config_of(name, **changes)
    with torch.device("meta"):
        module = family_of(config).build(config)
    return dict(init_weights(module, config, seed).named_parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_values_follow_the_config(name: str) -> None:
    values = filled(name, 7)
    assert not any(value.is_meta for value in values.values())
    for key, value in values.items():
        if value.dim() == 1:
            assert torch.equal(value, torch.zeros_like(value) if key.endswith("bias") else torch.ones_like(value))
        elif value.numel() > 1000:
            assert 0.045 < float(value.detach().std()) < 0.055


def test_seed_and_name_decide() -> None:
    one, again, other = filled("llama", 1), filled("llama", 1), filled("llama", 2)
    key = "model.layers.1.mlp.up_proj.weight"
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one[key], other[key])
    assert not torch.equal(one[key], one["model.layers.2.mlp.up_proj.weight"])
    longer = filled("llama", 1, num_hidden_layers=5)
    assert torch.equal(one[key], longer[key])
