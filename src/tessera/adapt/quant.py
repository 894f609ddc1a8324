"""A frozen base in four bits (QLoRA), through bitsandbytes.

When only adapters train, the base weights are constants, and a constant may be stored coarsely: NF4 keeps each weight
as one of sixteen levels that are quantiles of a normal distribution, scaled per block of 64 (and the scales are
quantised again), about 0.55 bytes a weight instead of 2. A forward pass expands a layer just before it multiplies, so
the arithmetic stays in the compute dtype and gradients flow through to the adapters (Dettmers et al., 2023).

Only the linear layers of the language model are stored this way. The head and the embedding are read by the loss and
by lookups; the tower and the aligner are a small share of the bytes and sensitive to rounding. bitsandbytes runs
on CUDA and also on a CPU; whether it can on this machine is found out with a toy layer, not assumed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tessera.adapt.targets import HEADS, linear_names
from tessera.config.errors import UserError
from tessera.config.run import AdaptArgs, ModelArgs
from tessera.contract.plan import Groups, within

FIX = "install it with: pip install 'tessera[qlora]', or drop --quant_method"


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the frozen base is stored: ``bits`` 4 (NF4, double quantised) or 8 (LLM.int8)."""

    bits: int


def requested(model: ModelArgs, adapt: AdaptArgs) -> Quantisation | None:
    """What ``--quant_method`` / ``--quant_bits`` ask for, checked before any weight is read; None if nothing."""
    if model.quant_method is None and model.quant_bits is None:
        return None
    if model.quant_method is None:
        raise UserError(f"--quant_bits {model.quant_bits} needs --quant_method bnb")
    if model.quant_method != "bnb":
        raise UserError(f"--quant_method {model.quant_method}: only bnb (bitsandbytes) is supported")
    bits = 4 if model.quant_bits is None else model.quant_bits
    if bits not in (4, 8):
        raise UserError(f"--quant_bits {bits}: bitsandbytes stores 4 or 8 bits; use 4 for QLoRA")
    if adapt.train_type != "lora":
        raise UserError(
            f"--quant_method bnb with --train_type {adapt.train_type}: quantised weights cannot be trained; "
            "use --train_type lora"
        )
    if bits == 8 and adapt.use_dora:
        raise UserError("--quant_bits 8 with --use_dora true: DoRA cannot read 8-bit weights back; use --quant_bits 4")
    if sys.modules.get("bitsandbytes") is None and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--quant_method bnb needs the package bitsandbytes; {FIX}")
    return Quantisation(bits)


def quantise(model: nn.Module, groups: Groups, how: Quantisation, *, keep: Sequence[str] = ()) -> tuple[str, ...]:
    """Replace the language model's linear layers (weights loaded) by quantised ones, in place; returns their names.

    Modules within ``keep`` stay as they are, and so does the head. Compute dtype is each layer's own.
    """
    names = [name for name in linear_names(model) if groups.of(name) == "llm" and not within(keep, name)]
    names = [name for name in names if name.rpartition(".")[2] not in HEADS]
    if not names:
        raise UserError("--quant_method bnb: the language model has no linear layer left to quantise")
    _probe(model.get_submodule(names[0]), how)
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        model.set_submodule(name, _quantised(old, how))
    return tuple(names)


def is_quantised(module: nn.Module) -> bool:
    """Whether ``module`` is one of bitsandbytes' layers (told by its class, so that nothing needs importing)."""
    return type(module).__module__.partition(".")[0] == "bitsandbytes"


def quantised_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The packed weights: constants that cannot be sharded (for ``fully_shard(..., ignored_params=...)``)."""
    return {
        parameter for m in model.modules() if is_quantised(m) for parameter in m.parameters() if m.bias is not parameter
    }


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"--quant_method bnb: bitsandbytes cannot be imported ({error}); {FIX}") from error
    return bitsandbytes


def _quantised(old: nn.Linear, how: Quantisation) -> nn.Linear:
    """A quantised copy of ``old`` on the same device; ``.to(device)`` is what packs the weight."""
    bnb = _bitsandbytes()
    device, dtype = old.weight.device, old.weight.dtype
    shape = (old.in_features, old.out_features)
    new: Any
    if how.bits == 4:
        new = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        new.weight = bnb.nn.Params4bit(
            old.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
        )
        # On some CPUs the layer would repack itself for inference at the first evaluation and could not train on.
        new.support_avx512bf16_for_cpu = False
    else:
        new = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        new.weight = bnb.nn.Int8Params(old.weight.detach(), requires_grad=False, has_fp16_weights=False)
    new = new.to(device)
    new.bias = old.bias
    return new


def _probe(like: nn.Module, how: Quantisation) -> None:
    """Run a toy layer forward and backward where ``like`` lives; UserError with the reason if that fails."""
    weight = next(like.parameters())
    toy = nn.Linear(64, 64, bias=False).to(device=weight.device, dtype=weight.dtype)
    rows = torch.ones(2, 64, device=weight.device, dtype=weight.dtype, requires_grad=True)
    try:
        _quantised(toy, how)(rows).float().sum().backward()
    except (RuntimeError, NotImplementedError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--quant_bits {how.bits}: bitsandbytes cannot train on {weight.device.type} ({reason}); "
            "drop --quant_method"
        ) from error


@contextmanager
def peft_imports(*, quantised: bool) -> Iterator[None]:
    """Inside, peft sees bitsandbytes only if it is needed.

    peft imports bitsandbytes wherever it is installed, which costs about two seconds (it brings in torch's compiler).
    ``None`` in ``sys.modules`` is Python's own way of saying "treat as not installed"; it lasts for this block, and
    peft's cached answer is forgotten when a quantised model does come.
    """
    name = "bitsandbytes"
    if quantised:
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        is_bnb_available.cache_clear()
        is_bnb_4bit_available.cache_clear()
    hide = not quantised and name not in sys.modules
    if hide:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            del sys.modules[name]
