"""Several models around one set of weights: each adapter gets modules of its own, and no weight is copied.

A module tree is small; what is large are the tensors. :func:`share` copies the tree and keeps the tensors, so that an
adapter can be injected into the copy without anybody else noticing. Where an adapter brings whole modules or biases of
its own, those tensors are copied first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import nn

from tessera.adapt import lora
from tessera.contract.plan import Groups
from tessera.contract.shards import WHOLE

Module = TypeVar("Module", bound=nn.Module)


def share(model: Module) -> Module:
    """``model`` again, with the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    # What the memo says to be copied already is not copied again.
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def attach_shared(
    model: nn.Module, directory: Path | str, groups: Groups, *, rename: Callable[[str], str] = lambda name: name
) -> None:
    """Put the adapter in ``directory`` into ``model``, made by :func:`share`; UserError as ``lora.load_adapter``."""
    before = {id(parameter) for parameter in model.parameters()}
    made, fill = lora.attach(model, directory, groups, trainable=True, rename=rename)
    own: dict[int, nn.Parameter] = {}
    for name in made.trainable:
        parameter = model.get_parameter(name)
        if id(parameter) in before:
            own[id(parameter)] = nn.Parameter(parameter.detach().clone())
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in own:
                setattr(module, name, own[id(parameter)])
            else:
                parameter.requires_grad_(False)
    fill(model, WHOLE)
