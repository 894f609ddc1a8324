"""A model with an adapter added in, as an export writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tessera.adapt.merging import Merged
from tessera.contract.plan import Groups


def merged(make: Callable[[], nn.Module], directory: Path, groups: Groups) -> tuple[nn.Module, int]:
    """What ``make`` makes with the adapter in ``directory`` added to its values, and how many layers it adapts."""
    plain, empty = make(), make()
    metas: dict[nn.Parameter, nn.Parameter] = {}  # what is tied stays tied
    for module in empty.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            metas.setdefault(parameter, nn.Parameter(parameter.detach().to("meta")))
            module.register_parameter(leaf, metas[parameter])
    values = dict(plain.named_parameters())
    found = Merged.of(empty, directory, groups, lambda name: values[name].detach().clone())
    with torch.no_grad():
        for name, parameter in values.items():
            parameter.copy_(found.value(name))
    return plain, found.adapted
