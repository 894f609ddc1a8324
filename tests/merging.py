"""A model with an adapter added in, as an export writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tessera.adapt.merging import Merged
from tessera.contract.plan import Groups
from tessera.contract.shards import boxes


def merged(make: Callable[[], nn.Module], directory: Path, groups: Groups) -> tuple[nn.Module, int]:
    """What ``make`` makes with the adapter in ``directory`` added to its values, and how many layers it adapts."""
    plain, empty = make(), make()
    metas: dict[nn.Parameter, nn.Parameter] = {}  # what is tied stays tied
    for module in empty.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            metas.setdefault(parameter, nn.Parameter(parameter.detach().to("meta")))
            module.register_parameter(leaf, metas[parameter])
    values = dict(plain.named_parameters())
    found = Merged.of(empty, directory, groups, lambda name, part: values[name].detach()[part].clone())
    with torch.no_grad():
        for name, parameter in values.items():
            for part in boxes(tuple(parameter.shape), max(7, parameter.shape[-1])):  # some rows at a time
                parameter[part] = found.region(name, part).to(parameter.dtype)
    return plain, found.adapted
