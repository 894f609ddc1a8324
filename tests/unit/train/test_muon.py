"""Our CPU Muon is torch's Muon, up to the precision of torch's bfloat16 iteration."""

from __future__ import annotations

import pytest
import torch

from tessera.train.muon import Muon, orthogonalise


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_same_update_as_torch(adjust: str) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (8, 24), (32, 8), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    kwargs = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust}
    pair = Muon(ours, **kwargs), torch.optim.Muon(theirs, **kwargs)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=g)
            other.grad = mine.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for mine, other, old in zip(ours, theirs, start, strict=True):
        moved = (other - old).norm()
        assert moved > 0 and (mine - other).norm() / moved < 0.02
        torch.testing.assert_close(pair[0].state[mine]["momentum_buffer"], pair[1].state[other]["momentum_buffer"])


def test_singular_values_end_up_around_one() -> None:
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7))
    assert values.min() > 0.5 and values.max() < 1.3
