"""What backward finds in memory, and what it computes again or fetches: the choice as data, the seam as a protocol.

Autograd keeps every tensor that a backward pass reads. Recomputation drops some of them and runs their forward again
(Chen et al., 2016); which ones is Megatron-LM's vocabulary (Korthikanti et al., 2022)::

    full, uniform, N   groups of N consecutive layers: each keeps its input only and runs again as a whole
    full, block, N     the first N layers keep their input only, the others everything
    selective          named modules inside every layer: core_attn, mlp, layernorm, moe
    none               everything is kept

Where layers and modules are is the family's :class:`~tessera.contract.plan.Plan`; a name that its plan lacks is
refused before any weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tessera.config.errors import UserError
from tessera.config.run import MemoryArgs
from tessera.contract.plan import Plan

if TYPE_CHECKING:
    from torch import nn  # `observe` reads this module, and does without torch


@dataclass(frozen=True, slots=True)
class Recompute:
    """What of the decoder is computed again; see the module docstring. ``modules`` matters to ``selective`` only."""

    granularity: str = "none"
    method: str = "uniform"
    num_layers: int = 1
    modules: tuple[str, ...] = ()

    @classmethod
    def of(cls, what: Recompute | bool) -> Recompute:
        """``what`` itself; True is every layer on its own, False nothing."""
        return what if isinstance(what, Recompute) else cls("full" if what else "none")

    @classmethod
    def asked(cls, args: MemoryArgs) -> Recompute:
        """What the resolved flags ask for."""
        return cls(args.recompute_granularity, args.recompute_method, args.recompute_num_layers, args.recompute_modules)

    def spans(self, layers: int) -> tuple[range, ...]:
        """Ranges of layer positions that are recomputed together, in a stack (or pipeline stage) of ``layers``."""
        if self.granularity != "full":
            return ()
        if self.method == "block":
            return tuple(range(i, i + 1) for i in range(min(self.num_layers, layers)))
        return tuple(range(i, min(i + self.num_layers, layers)) for i in range(0, layers, self.num_layers))

    def check(self, plan: Plan) -> None:
        """UserError if a model with this plan cannot do it."""
        if self.granularity == "selective":
            for name in self.modules:
                if name not in plan.recompute_modules:
                    known = ", ".join(plan.recompute_modules)
                    fix = f"it has {known}" if known else "use --recompute_granularity full"
                    raise UserError(f"--recompute_modules {name}: this model has no such part to recompute; {fix}")
        if self.granularity == "full" and self.method == "uniform" and self.num_layers > 1 and not plan.layer_loop:
            raise UserError(
                f"--recompute_num_layers {self.num_layers}: this model's layers run in transformers' own loop and are "
                "recomputed one by one; use --recompute_num_layers 1, or --recompute_method block"
            )


class ActivationStore(Protocol):
    """Where a layer's saved tensors go; the default, no store at all, is the device they are on."""

    def visit(self, group: range, layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """What to run the layers at the positions of ``group`` in."""
        ...
