"""A model with an adapter added in, tensor by tensor.

Merging needs some rows of one weight at a time: their own values, A, and the same rows of B. So the model stays on the
meta device, only the adapter has memory, and whoever writes the result asks for one region after the other::

    empty model --attach--> wrapped, adapter filled --region("...q_proj.weight", rows)--> W + scale B A, in float32

What no adapter touches is read and handed on as it is; what its file holds whole (modules that were trained beside it,
biases) takes the place of the base's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tessera.adapt import experts, lora
from tessera.contract.plan import Groups
from tessera.contract.shards import WHOLE, Part


class Merged:
    """The tensors of an adapted model on the meta device under their plain names.

    ``read`` gives regions of those of the base.
    """

    def __init__(self, model: nn.Module, read: Callable[[str, Part], Tensor]) -> None:
        self._read = read
        self._layers: dict[str, Any] = dict(lora.layers_in(model))
        self._stacks = dict(experts.wrapped_in(model))
        held = {lora.stored_name(name): p.detach() for name, p in model.named_parameters() if not p.is_meta}
        self._held = {name: value for name, value in held.items() if name is not None}

    @classmethod
    def of(
        cls,
        model: nn.Module,
        directory: Path | str,
        groups: Groups,
        read: Callable[[str, Part], Tensor],
        rename: Callable[[str], str] = lambda name: name,
    ) -> Merged:
        """The tensors of ``model``, plain and on the meta device, with the adapter in ``directory``.

        ``rename`` and errors are those of :func:`~tessera.adapt.lora.attach`.
        """
        _, fill = lora.attach(model, directory, groups, trainable=False, rename=rename)
        fill(model, WHOLE)
        return cls(model, read)

    @property
    def adapted(self) -> int:
        """How many layers have an adapter."""
        return len(self._layers) + len(self._stacks)

    def region(self, name: str, part: Part) -> Tensor:
        """A region (of whole rows) of the plain model's tensor: merged ones in float32, others as they are stored."""
        owner, _, leaf = name.rpartition(".")
        base = self._held[name][part] if name in self._held else self._read(name, part)
        if owner in self._layers:
            merge = lora.merged_weight if leaf == "weight" else lora.merged_bias
            return merge(self._layers[owner], base, part[0])
        return self._stacks[owner].added(leaf, base, part) if owner in self._stacks else base
