"""Low-rank adapters for experts and routers, which are not linear layers but stacks of matrices, and scores.

Every expert gets its own pair ``A [r, in]``, ``B [out, r]`` for each of its two matrices, stacked like the experts
themselves: ``A [E, r, in]``, ``B [E, out, r]``. So whoever holds some of the experts holds the same rows of their
adapters, and the update is two more grouped products over the rows that are sorted by expert anyway; the update of
the whole stack, ``B A``, never exists in training.

``peft`` keeps the same numbers in two-dimensional tensors and adapts one parameter per layer of wrapping, so its files
spell them ``experts.base_layer.lora_A`` (gate_up_proj, wrapped first) and ``experts.lora_A`` (down_proj)::

    A [E, r, in]   <->  [E * r, in]
    B [E, out, r]  <->  [out, r * E]      the expert runs fastest

It has neither dropout nor DoRA for them, and one dropout per file, so an adapter that covers experts has none at all.
A router's adapter (``--target_modules all-router``) is an ordinary pair beside its weight.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tessera.adapt.stored import Stored
from tessera.contract.seams import Divisible
from tessera.contract.shards import WHOLE, Part, Shards, keep
from tessera.models.layers import gated
from tessera.models.moe import Experts, Router, grouped_product

PARTS: Mapping[str, str] = {"gate_up_proj": ".base_layer", "down_proj": ""}
"""The adapted parameters, and what peft puts behind the module's name for each."""

ROUTER = "mlp.gate.weight"
"""How ``adapter_config.json`` names a router."""

TARGETS = tuple(f"mlp.experts.{part}" for part in PARTS)
"""How ``adapter_config.json`` names them (``target_parameters``)."""

ALIKE = ("gate_proj", "up_proj", "down_proj")
"""What the matrices of a single expert are called, and those of dense and shared MLPs too."""

_OURS = re.compile(r"(.+)\.lora_([AB])_(gate_up_proj|down_proj|weight)")


class ExpertLora(Divisible):
    """Experts with an adapter beside each matrix; float32 masters, computed in the type of the rows."""

    def __init__(self, base: Experts, rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.scaling = scaling
        for part in PARTS:
            weight = base.get_parameter(part)
            experts, out, inner = weight.shape
            for side, shape in (("A", (experts, rank, inner)), ("B", (experts, out, rank))):
                empty = torch.zeros(shape, dtype=torch.float32, device=weight.device)
                self.register_parameter(f"lora_{side}_{part}", nn.Parameter(empty))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """``rows [N, H]`` sorted by expert, ``counts [E held here]`` of each, to ``[N, H]``."""
        gate, up = self._product(rows, "gate_up_proj", counts).chunk(2, dim=-1)
        return self._product(gated(gate, up), "down_proj", counts)

    def _product(self, rows: Tensor, part: str, counts: Tensor) -> Tensor:
        narrow = grouped_product(rows, self.part(self.get_parameter(f"lora_A_{part}")), counts)
        update = grouped_product(narrow, self.part(self.get_parameter(f"lora_B_{part}")), counts)
        base = self.base_layer.part(self.base_layer.get_parameter(part))
        return grouped_product(rows, base, counts) + self.scaling * update

    @torch.no_grad()
    def initialise(self, name: str, seed: int, shards: Shards = WHOLE) -> None:
        """A uniform in +-1/sqrt(in) and B zero: a function of (seed, name), of which a rank keeps its slice."""
        for part in PARTS:
            a = self.get_parameter(f"lora_A_{part}")
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}.{part}".encode()))
            bound = a.shape[-1] ** -0.5
            keep(a, torch.empty(a.shape).uniform_(-bound, bound, generator=generator), shards)
            shards.local(self.get_parameter(f"lora_B_{part}")).zero_()

    @torch.no_grad()
    def added(self, part: str, weight: Tensor, region: Part) -> Tensor:
        """The values ``weight`` of a region (of whole rows) of ``part`` and its adapter's together, in float32."""
        experts, rows = region[0], region[1]
        a = self.get_parameter(f"lora_A_{part}")[experts].float()
        b = self.get_parameter(f"lora_B_{part}")[experts, rows].float()
        return weight.to(torch.float32, copy=True).baddbmm_(b, a, alpha=self.scaling)


class RouterLora(Divisible):
    """A router with an adapter beside its weight; float32 masters."""

    def __init__(self, base: Router, rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.scaling = scaling
        (experts, hidden), device = base.weight.shape, base.weight.device
        self.lora_A_weight = nn.Parameter(torch.zeros(rank, hidden, dtype=torch.float32, device=device))
        self.lora_B_weight = nn.Parameter(torch.zeros(experts, rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the router, with the sum of its weight and the adapter's."""
        weight = self.base_layer.part(self.base_layer.weight)
        update = self.scaling * (self.part(self.lora_B_weight) @ self.part(self.lora_A_weight))
        return self.base_layer.route(x, weight + update.to(weight))

    @torch.no_grad()
    def initialise(self, name: str, seed: int, shards: Shards = WHOLE) -> None:
        """A uniform in +-1/sqrt(in) and B zero: a function of (seed, name), of which a rank keeps its slice."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        bound = self.lora_A_weight.shape[-1] ** -0.5
        keep(
            self.lora_A_weight,
            torch.empty(self.lora_A_weight.shape).uniform_(-bound, bound, generator=generator),
            shards,
        )
        shards.local(self.lora_B_weight).zero_()

    @torch.no_grad()
    def added(self, part: str, weight: Tensor, region: Part) -> Tensor:
        """As :meth:`ExpertLora.added`; a router has nothing but its weight that is adapted."""
        if part != "weight":
            return weight
        b, a = self.lora_B_weight[region[0]].float(), self.lora_A_weight.float()
        return weight.to(torch.float32, copy=True).addmm_(b, a, alpha=self.scaling)


def routers_in(model: nn.Module) -> tuple[str, ...]:
    """Full names of the plain routers of ``model``."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, Router))


def names_in(model: nn.Module) -> tuple[str, ...]:
    """Full names of the plain experts of ``model``."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, Experts))


def wrap(
    model: nn.Module, names: Sequence[str], rank: int, scaling: float
) -> list[tuple[str, ExpertLora | RouterLora]]:
    """Put adapters, of zeros, beside the experts and routers ``names``; in place."""
    made: list[tuple[str, ExpertLora | RouterLora]] = []
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, Experts | Router)
        one = ExpertLora(base, rank, scaling) if isinstance(base, Experts) else RouterLora(base, rank, scaling)
        made.append((name, one))
        model.set_submodule(name, one)
    return made


def wrapped_in(model: nn.Module) -> list[tuple[str, ExpertLora | RouterLora]]:
    """Every adapted stack of experts and every adapted router, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ExpertLora | RouterLora)]


def to_file(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """An adapter parameter of experts under peft's name and in its shape; None if ``name`` is none."""
    found = _OURS.fullmatch(name)
    if found is None:
        return None
    module, side, part = found.groups()
    if part == "weight":
        return f"{module}.lora_{side}.weight", tensor
    flat = tensor.flatten(0, 1) if side == "A" else tensor.permute(1, 2, 0).flatten(1)
    return f"{module}{PARTS[part]}.lora_{side}.weight", flat


def from_file(
    tensors: Mapping[str, Stored], sizes: Mapping[str, int], adapter: str, routers: Sequence[str] = ()
) -> dict[str, Stored]:
    """``tensors`` by peft's names in memory, those of experts ``sizes`` (name -> how many) and ``routers`` as ours."""
    out = dict(tensors)
    for module in routers:
        for side in "AB":
            held = out.pop(f"{module}.lora_{side}.{adapter}.weight", None)
            out |= {} if held is None else {f"{module}.lora_{side}_weight": held}
    for module, experts in sizes.items():
        for part, nested in PARTS.items():
            for side in "AB":
                held = out.pop(f"{module}{nested}.lora_{side}.{adapter}.weight", None)
                if held is None:
                    continue
                out[f"{module}.lora_{side}_{part}"] = held.turned(partial(_unfolded, side=side, experts=experts))
    return out


def _unfolded(held: Tensor, side: str, experts: int) -> Tensor:
    """A tensor of peft's as the stack that it is."""
    return held.unflatten(0, (experts, -1)) if side == "A" else held.unflatten(1, (-1, experts)).permute(2, 0, 1)
