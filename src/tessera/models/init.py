"""Random weights, reproducible tensor by tensor.

Every tensor draws from its own generator, seeded with the run's seed and the tensor's name, so its values do not depend
on which other tensors exist or in which order they are filled.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from tessera.contract.model import HFConfig
from tessera.contract.plan import within
from tessera.models.families import text_config

DECODER = ("model.language_model", "model.embed_tokens", "model.layers", "model.norm", "lm_head")
"""Names of a decoder and its head, with and without a tower beside it."""


def init_weights(
    module: nn.Module, config: HFConfig, seed: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """Fill ``module`` (of an own family, possibly on the meta device) as transformers initialises these models.

    Matrices are normal with the config's ``initializer_range`` (the tower's own inside it), norms one, biases and
    buffers zero.
    """
    for name, parameter in list(module.named_parameters()):
        value = drawn(name, tuple(parameter.shape), config, seed).to(device, dtype)
        prefix, _, leaf = name.rpartition(".")
        owner = module.get_submodule(prefix)
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))
    for owner in module.modules():
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            owner.register_buffer(leaf, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    return module


def drawn(name: str, shape: tuple[int, ...], config: HFConfig, seed: int) -> Tensor:
    """Initial float32 values of the parameter ``name``, as :func:`init_weights` draws them."""
    if len(shape) <= 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    text_std = text_config(config).get("initializer_range", 0.02)
    tower_std = config.get("vision_config", {}).get("initializer_range", text_std)
    std = text_std if within(DECODER, name) else tower_std
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed & 0xFFFFFFFF) | (seed >> 32 << 32))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
