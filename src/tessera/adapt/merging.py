"""A model with an adapter added in, tensor by tensor.

Merging needs some rows of one weight at a time: their own values, A, and the same rows of B. So the model stays on the
meta device, only the adapter has memory, and whoever writes the result asks for one region after the other::

    empty model --attach--> wrapped model, adapter filled --region("...q_proj.weight", rows)--> W + scale B A, in float32

What no adapter touches is read and handed on as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tessera.adapt import experts, lora
from tessera.contract.plan import within
from tessera.contract.shards import Part


def give_memory(model: nn.Module, saved: Sequence[str]) -> None:
    """Memory for the adapter's own parameters and for the modules ``saved`` whole, of a model on the meta device."""
    for name, parameter in list(model.named_parameters()):
        if lora.stored_name(name) is None or within(saved, name):
            owner, _, leaf = name.rpartition(".")
            held = torch.empty(parameter.shape, dtype=parameter.dtype)
            model.get_submodule(owner).register_parameter(leaf, nn.Parameter(held, requires_grad=False))


class Merged:
    """The tensors of an adapted model on the meta device under their plain names.

    ``read`` gives regions of those of the base.
    """

    def __init__(self, model: nn.Module, read: Callable[[str, Part], Tensor]) -> None:
        self._read = read
        self._layers: dict[str, Any] = dict(lora.layers_in(model))
        self._stacks = dict(experts.wrapped_in(model))
        self._held: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            plain = lora.stored_name(name)
            if plain is not None and not parameter.is_meta:
                self._held[plain] = parameter.detach()

    @property
    def adapted(self) -> int:
        """How many layers have an adapter."""
        return len(self._layers) + len(self._stacks)

    def region(self, name: str, part: Part) -> Tensor:
        """A region (of whole rows) of the plain model's tensor: merged ones in float32, others as they are stored."""
        if name in self._held:
            return self._held[name][part]
        owner, _, leaf = name.rpartition(".")
        value = self._read(name, part)
        if owner in self._stacks:
            return self._stacks[owner].added(leaf, value, part)
        if owner not in self._layers:
            return value
        merge = lora.merged_weight if leaf == "weight" else lora.merged_bias
        return merge(self._layers[owner], value, part[0])
