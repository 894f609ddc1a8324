"""Activations on the host: which bytes go, that each goes once, and that nothing outlives its backward."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from tessera.train import offload
from tessera.train.offload import HostStore
from tests.ranks import run_ranks


class Toy(nn.Module):
    """Three layers, each of which saves its input twice, once as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(3)])

    def forward(self, x: Tensor, store: HostStore | None) -> Tensor:
        for position, layer in enumerate(self.layers):
            if store is None:
                x = self.one(layer, x)
                continue
            with store.visit(range(position, position + 1), list(self.layers)):
                x = self.one(layer, x)
        return x.square().sum()

    def one(self, layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = layer(x) + (x.t() * x.t()).t()
        return out


def gradients(model: Toy, store: HostStore | None, autocast: bool = False) -> list[Tensor]:
    model.zero_grad()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        total = model(x + 0, store)
    total.backward()
    assert x.grad is not None
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layers", [None, 1, 3])
def test_values_are_untouched(layers: int | None, autocast: bool) -> None:
    model = Toy()
    store = HostStore(layers, smallest=1)
    for got, want in zip(gradients(model, store, autocast), gradients(model, None, autocast), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("layers", "expected"), [(None, 2), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_each_chosen_layers_storage_goes_down_and_up_once(layers: int | None, expected: int) -> None:
    """Views of one storage are one copy, and no weight is among them."""
    model = Toy()
    store = HostStore(layers, smallest=1)
    gradients(model, store)
    assert store.bytes_down == store.bytes_up == expected * 16 * 8 * 4


def test_what_is_small_stays() -> None:
    model = Toy()
    store = HostStore(3)
    gradients(model, store)
    assert store.bytes_down == 0 and offload.SMALLEST == 2**20


def test_sixteen_bit_copies_of_weights_stay() -> None:
    model = Toy()
    store = HostStore(1, smallest=1)
    gradients(model, store, autocast=True)
    assert store.bytes_down == 16 * 8 * (4 + 2)  # the input, and its own copy in bfloat16


def test_a_view_of_something_much_larger_stays() -> None:
    store = HostStore(1, smallest=1)
    row = torch.randn(100, 8)[3].requires_grad_()
    with store.visit(range(1), [nn.Identity()]):
        out = (row * row).sum()
    assert store.bytes_down == 0
    out.backward()


def test_host_memory_is_gone_with_the_graph() -> None:
    model = Toy()
    store = HostStore(3, smallest=1)
    total = model(torch.randn(16, 8), store)
    assert store._last is not None
    last = store._last
    assert isinstance(last, weakref.ref) and last() is not None
    total.backward()
    del total
    gc.collect()
    assert last() is None


def test_microbatches_in_flight_do_not_mix() -> None:
    """Two forwards, then two backwards, as a pipeline does."""
    model = Toy()
    store = HostStore(3, smallest=1)
    inputs = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for x in inputs:
        model(x, None).backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    totals = [model(x, store) for x in inputs]
    for total in totals:
        total.backward()
    for p, gradient in zip(model.parameters(), want, strict=True):
        assert p.grad is not None and torch.equal(p.grad, gradient)


def down(stage: int, frozen: bool) -> int:
    """Bytes that leave a sharded layer whose weights are large beside its activations."""
    from tessera.contract.layout import layout_of
    from tessera.contract.plan import Groups, Plan
    from tessera.parallel import fsdp
    from tessera.parallel.mesh import Mesh, world_size

    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model.requires_grad_(not frozen)
    mesh = Mesh.from_env(layout_of(world_size(), zero=stage), timeout_s=60)
    fsdp.shard(model, Plan(Groups(("",)), ("*",), ()), mesh, compute_dtype=torch.bfloat16)
    for layer in model:
        layer.set_unshard_in_backward(True)  # frozen as they are, backward runs through them to x
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    store, h = HostStore(2, smallest=1), x * 1
    for position, layer in enumerate(model):
        with store.visit(range(position, position + 1), list(model)):
            h = layer(h)
    h.float().sum().backward()
    return store.bytes_down


@pytest.mark.parametrize("frozen", [False, True])
def test_gathered_weights_stay(frozen: bool) -> None:
    for stage in (2, 3):
        for moved in run_ranks(down, 2, stage, frozen):
            assert moved == (0 if frozen else 2 * 2 * 64 * 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_values_are_the_same_and_memory_is_freed() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(8))).cuda()
    x = torch.randn(8192, 1024, device="cuda")

    def run(store: HostStore | None) -> tuple[int, list[Tensor]]:
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        h = x
        for position, layer in enumerate(model):
            if store is None:
                h = layer(h)
                continue
            with store.visit(range(position, position + 1), list(model)):
                h = layer(h)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        h.square().mean().backward()
        return held, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, want = run(None)
    held, got = run(HostStore())
    assert held < 0.5 * plain
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
