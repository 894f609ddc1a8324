"""AdamW on the host: what moves, where its state is, and that a checkpoint does not show it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tessera.adapt.trainable import ParamGroup
from tessera.checkpoint.state import Snapshot, load_tensors
from tessera.config.resolve import run_of
from tessera.contract.plan import Groups, Plan
from tessera.parallel import fsdp
from tessera.parallel.mesh import Mesh
from tessera.train.host import HostAdamW, buckets, chosen
from tessera.train.optim import Optimizers
from tessera.train.schedule import Schedule
from tests.ranks import run_ranks

PLAN = Plan(Groups(llm=("",)), fsdp_units=("*",), recompute_decoder=())


def made(mesh: Mesh, share: float, seed: int = 0) -> tuple[nn.Module, Optimizers]:
    """A small model, sharded over the mesh, and its optimisers with ``share`` on the host."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    fsdp.shard(model, PLAN, mesh, compute_dtype=torch.float32)
    groups = []
    for name, decay in (("llm.decay", 0.1), ("llm.rest", 0.0)):
        pairs = [(n, p) for n, p in model.named_parameters() if (p.dim() > 1) == bool(decay)]
        groups.append(ParamGroup(name, tuple(n for n, _ in pairs), tuple(p for _, p in pairs), 1e-2, decay))
    args = run_of("sft", model=".", dataset=("unused",)).train
    return model, Optimizers(model, groups, args, Schedule("constant", 10, 0), mesh, host_share=share)


def steps(model: nn.Module, optimizers: Optimizers, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizers.step()
        optimizers.zero_grad()


def values(model: nn.Module, optimizers: Optimizers, mesh: Mesh) -> dict[str, torch.Tensor]:
    found = {name: fsdp.full(p.detach(), mesh).clone() for name, p in model.named_parameters()}
    return found | {name: fsdp.full(state, mesh).clone() for name, state in optimizers.state().items()}


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def interchange(directory: str, before: float, after: float) -> None:
    """Two steps, a checkpoint, a fresh model that loads it, two more steps; equal to four steps at a stretch."""
    mesh = Mesh.from_env(timeout_s=60)
    straight = made(mesh, 0.0)
    steps(*straight, range(4))
    first = made(mesh, before)
    steps(*first, range(2))
    Snapshot.of(first[0], first[1].state(), mesh).write(Path(directory))
    mesh.barrier()
    second = made(mesh, after, seed=9)
    load_tensors(Path(directory), second[0], second[1].state(), mesh)
    second[1].refresh()
    steps(*second, range(2, 4))
    assert_equal(values(*second, mesh), values(*straight, mesh))


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.0), (0.0, 1.0), (0.6, 1.0)])
@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_does_not_show_where_the_optimizer_lived(
    tmp_path: Path, before: float, after: float, world: int
) -> None:
    if world == 1:
        interchange(str(tmp_path), before, after)
    else:
        run_ranks(interchange, world, str(tmp_path), before, after)


def test_without_taking_note_a_loaded_parameter_would_be_lost() -> None:
    mesh = Mesh.single()
    model, optimizers = made(mesh, 1.0)
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    optimizers.refresh()
    steps(model, optimizers, range(1))
    assert (model[0].weight - 7.0).abs().max() < 0.1


def test_the_share_is_counted_in_elements_and_chosen_by_size_and_name() -> None:
    named = [(name, nn.Parameter(torch.empty(size))) for name, size in (("a", 10), ("b", 60), ("c", 10), ("d", 20))]
    names = {id(p): name for name, p in named}

    def found(share: float) -> set[str]:
        return {names[key] for key in chosen(reversed(named), share)}

    assert found(0.0) == set()
    assert found(0.1) == {"a"}
    assert found(0.5) == {"d", "a", "c"}
    assert found(0.6) == {"b"}
    assert found(0.85) == {"b", "d"}
    assert found(1.0) == {"a", "b", "c", "d"}


def test_the_share_decides_what_has_a_twin() -> None:
    mesh = Mesh.single()
    for share, expected in ((0.0, 0), (0.65, 63), (1.0, 103)):
        _, optimizers = made(mesh, share)
        assert sum(twin.numel() for host in optimizers.hosts for twin, _ in host.pairs()) == expected
        assert len(optimizers.parameters) == 4
        assert set(optimizers.rates()) == {"llm.decay", "llm.rest"}


def test_buckets_hold_every_parameter_once_under_its_own_rate() -> None:
    first, second = [[nn.Parameter(torch.empty(4)) for _ in range(5)] for _ in range(2)]
    groups = [{"name": "x", "lr": 1.0, "params": first}, {"name": "y", "lr": 2.0, "params": second}]
    cut = buckets(groups, size=12)
    assert [[(g["name"], g["lr"], len(g["params"])) for g in bucket] for bucket in cut] == [
        [("x", 1.0, 3)],
        [("x", 1.0, 2), ("y", 2.0, 1)],
        [("y", 2.0, 3)],
        [("y", 2.0, 1)],
    ]
    flat = [p for bucket in cut for group in bucket for p in group["params"]]
    assert [id(p) for p in flat] == [id(p) for p in first + second]


def test_several_buckets_are_one_optimizer() -> None:
    mesh = Mesh.single()
    want = made(mesh, 0.0)
    steps(*want, range(3))
    model, got = made(mesh, 1.0)
    one = got.hosts[0]
    rows = [{**group, "params": [one.origins[id(p)] for p in group["params"]]} for group in one.param_groups]
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    got.parts = got.hosts = [HostAdamW(bucket, mesh, **options) for bucket in buckets(rows, 20)]
    assert len(got.hosts) == 3
    steps(model, got, range(3))
    assert_equal(values(model, got, mesh), values(*want, mesh))
