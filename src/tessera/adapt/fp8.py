"""Matrix products in float8, through torchao: half the bytes of bfloat16 and about twice the rate of its products.

A float8 number has 256 values, so each tensor is scaled to use their range just before it is multiplied: e4m3 (more
precision) for weights and activations, and for gradients either e5m2 (more range, ``hybrid``) or e4m3 too. Weights,
gradients and optimiser state stay what they are; sums are taken in float32 inside the product. torchao replaces linear
modules by its own of the same name and parameters. Here those are the decoder's, except the head and sizes
that float8 kernels do not take.

The units exist from compute capability 8.9 (Ada, Hopper) on. Everything else is refused before a model is read.
Not verified on a GPU.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from tessera.adapt.targets import HEADS
from tessera.config.errors import UserError
from tessera.config.run import MemoryArgs
from tessera.contract.plan import Groups

CAPABILITY = (8, 9)
MULTIPLE = 16
"""Sizes of a float8 product are multiples of this."""


def require(args: MemoryArgs, device: torch.device) -> None:
    """UserError if ``--fp8 true`` was asked for and cannot be had here; reads nothing but the device's name."""
    if not args.fp8:
        return
    if device.type != "cuda":
        raise UserError("--fp8 true needs an NVIDIA GPU with float8 units, and this run is on a CPU; drop --fp8")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        have, need = (f"{major}.{minor}" for major, minor in (capability, CAPABILITY))
        raise UserError(f"--fp8 true needs compute capability {need}, and this GPU has {have}; drop --fp8")
    if importlib.util.find_spec("torchao") is None:
        raise UserError("--fp8 true needs the package torchao; install it with: pip install 'tessera[fp8]'")


def convert(model: nn.Module, groups: Groups, args: MemoryArgs) -> None:
    """Let the decoder's linear layers multiply in float8, in place; before the model is sharded."""
    from torchao.float8 import CastConfig, Float8LinearConfig, convert_to_float8_training

    def wanted(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or name.rpartition(".")[2] in HEADS or groups.of(name) != "llm":
            return False
        return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0

    config = Float8LinearConfig()
    if args.fp8_format == "e4m3":
        config = Float8LinearConfig(cast_config_grad_output=CastConfig(target_dtype=torch.float8_e4m3fn))
    convert_to_float8_training(model, module_filter_fn=wanted, config=config)
