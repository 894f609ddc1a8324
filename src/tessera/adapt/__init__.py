"""What is trainable? Freeze groups, adapters, a quantised base, and the files adapters are kept in.

The order of a run: build the empty model, :func:`apply` (which injects adapters and sets ``requires_grad``), shard,
read the weights, :func:`initialise` the adapters, then :func:`param_groups` for the optimiser and
:func:`trainable_table` for the one-screen summary. A model whose weights are there already gets its adapters' values
at once; quantising needs that. An :class:`Adaptation` says what was done and is what :func:`save_adapter` needs later.
"""

from __future__ import annotations

from torch import nn

from tessera.adapt import fp8, lora, quant, targets, trainable
from tessera.adapt.lora import adapter_tensors, attach, initialise, load_adapter, save_adapter, stored_name
from tessera.adapt.quant import Quantisation, quantised_parameters
from tessera.adapt.trainable import Adaptation, ParamGroup, param_groups, trainable_table
from tessera.config.errors import UserError
from tessera.config.run import AdaptArgs
from tessera.contract.plan import Plan

__all__ = [
    "Adaptation",
    "ParamGroup",
    "Quantisation",
    "adapter_tensors",
    "apply",
    "attach",
    "fp8",
    "initialise",
    "load_adapter",
    "param_groups",
    "quantised_parameters",
    "save_adapter",
    "stored_name",
    "trainable_table",
]


def apply(
    model: nn.Module, args: AdaptArgs, plan: Plan, *, seed: int, quantisation: Quantisation | None = None
) -> Adaptation:
    """Make ``model`` trainable as ``--train_type`` and its companions say; in place.

    If it has no values yet (meta), its adapters wait for :func:`initialise`.
    ``quantisation`` comes from :func:`tessera.adapt.quant.requested`, which refuses bad flags before weights load.
    """
    if args.train_type == "full":
        assert quantisation is None, "quant.requested() lets lora only"
        _refuse_lora_flags(args)
        trainable.freeze(model, args, plan.groups)
        return Adaptation("full", plan.groups, trainable.trainable_names(model))
    if args.train_type != "lora":
        raise UserError(f"--train_type {args.train_type}: expected lora or full")
    for flag, prefixes in (("trainable", args.trainable_parameters), ("freeze", args.freeze_parameters)):
        if prefixes:
            raise UserError(
                f"--{flag}_parameters {prefixes[0]} acts on --train_type full only; "
                "with lora, --target_modules and --modules_to_save say what trains"
            )
    saved = lora.modules_to_save(model, args.modules_to_save)
    chosen = targets.select(model, args, plan.groups)
    quantised = quant.quantise(model, plan.groups, quantisation, keep=saved) if quantisation else ()
    config = lora.inject(model, chosen, saved, args, quantised=bool(quantised))
    if not lora.is_empty(model):
        lora.initialise(model, seed)
    names = trainable.trainable_names(model)
    return Adaptation(
        "lora", plan.groups, names, (*chosen.names, *chosen.stacks), saved, quantised, config, args.lorap_lr_ratio
    )


def _refuse_lora_flags(args: AdaptArgs) -> None:
    """Flags that only mean something for adapters; the others have defaults that full training ignores."""
    given = {
        "use_dora": args.use_dora,
        "use_rslora": args.use_rslora,
        "lorap_lr_ratio": args.lorap_lr_ratio,
        "modules_to_save": args.modules_to_save,
        "target_regex": args.target_regex,
    }
    for flag, value in given.items():
        if value:
            raise UserError(f"--{flag} is for adapters; add --train_type lora, or drop it with --train_type full")
