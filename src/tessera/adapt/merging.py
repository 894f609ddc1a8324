"""A model with an adapter added in, tensor by tensor.

Merging needs one weight at a time: its own values, and the small A and B beside it. So the model stays on the meta
device, only the adapter has memory, and whoever writes the result asks for one tensor after the other::

    empty model --attach--> wrapped model, adapter filled --value("...q_proj.weight")--> W + scale B A, in float32

What no adapter touches is read and handed on as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tessera.adapt import experts, lora
from tessera.adapt.experts import ExpertLora, RouterLora
from tessera.contract.plan import within


def give_memory(model: nn.Module, saved: Sequence[str]) -> None:
    """Memory for the adapter's own parameters and for the modules ``saved`` whole, of a model on the meta device."""
    for name, parameter in list(model.named_parameters()):
        if lora.stored_name(name) is None or within(saved, name):
            owner, _, leaf = name.rpartition(".")
            held = torch.empty(parameter.shape, dtype=parameter.dtype)
            model.get_submodule(owner).register_parameter(leaf, nn.Parameter(held, requires_grad=False))


class Merged:
    """The tensors of an adapted model on the meta device under their plain names; ``read`` gives those of the base."""

    def __init__(self, model: nn.Module, read: Callable[[str], Tensor]) -> None:
        self._read = read
        layers: dict[str, Any] = dict(lora.layers_in(model))
        stacks = dict(experts.wrapped_in(model))
        self.adapted = len(layers) + len(stacks)
        self._values: dict[str, Callable[[], Tensor]] = {}
        for name, parameter in model.named_parameters():
            plain = lora.stored_name(name)
            if plain is None:
                continue
            owner, _, leaf = plain.rpartition(".")
            if not parameter.is_meta:
                self._values[plain] = parameter.detach
            elif owner in layers:
                self._values[plain] = self._layer(layers[owner], plain, leaf)
            elif owner in stacks:
                self._values[plain] = self._stack(stacks[owner], plain, leaf)

    def value(self, name: str) -> Tensor:
        """The tensor ``name`` of the plain model: merged ones in float32, others in the type they are stored in."""
        found = self._values.get(name)
        return self._read(name) if found is None else found()

    def _layer(self, layer: Any, name: str, leaf: str) -> Callable[[], Tensor]:
        def value() -> Tensor:
            held = self._read(name)
            return lora.merged_weight(layer, held) if leaf == "weight" else lora.merged_bias(layer, held)

        return value

    def _stack(self, stack: ExpertLora | RouterLora, name: str, leaf: str) -> Callable[[], Tensor]:
        def value() -> Tensor:
            held = self._read(name)
            stack.add(leaf, held)
            return held

        return value
