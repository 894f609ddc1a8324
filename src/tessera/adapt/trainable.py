"""What is trained, how fast, and how to say so on one screen.

A vision-language model has three parts: the language model (with its head), the vision tower, and the aligner that
joins them. In full training each is switched by a flag; the rules below are those other tools use, so that a command
line means the same here. They apply in this order, the last word wins::

    everything trains
    --freeze_llm / --freeze_vit / --freeze_aligner and --freeze_parameters <prefix> ...     freeze
    an unfrozen aligner (it may lie inside a frozen tower) and --trainable_parameters ...   thaw

Prefixes are plain string prefixes of parameter names. Afterwards every trainable parameter belongs to exactly one
optimiser group: its part decides the learning rate (``vit_lr`` and ``aligner_lr`` override), its shape the weight
decay (vectors, i.e. norms and biases, have none), and LoRA+ gives the zero-initialised B matrices a higher rate,
because their gradients are the ones that see a trained A (Hayou et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tessera.adapt.targets import nearest
from tessera.config.errors import UserError
from tessera.config.run import AdaptArgs, TrainArgs
from tessera.contract.plan import Groups


@dataclass(frozen=True)
class Adaptation:
    """What was done to a model so that it can be trained; made by ``apply`` or ``load_adapter``.

    ``mode`` is ``full`` or ``lora``; ``targets`` are the adapted modules, ``saved`` the modules trained whole beside
    them, ``quantised`` the frozen ones stored in few bits, ``trainable`` the names of the parameters that train.
    ``config`` is peft's ``LoraConfig`` (None for full training), as ``adapter_config.json`` will say it.
    """

    mode: str
    groups: Groups
    trainable: tuple[str, ...]
    targets: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    quantised: tuple[str, ...] = ()
    config: Any = None
    lorap_lr_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that share a peak learning rate and a weight decay; ``names[i]`` is the name of ``params[i]``."""

    name: str
    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]
    lr: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of the summary: a name pattern, and how many tensors and numbers (``parameters``) it stands for."""

    pattern: str
    tensors: int
    parameters: int
    lr: float


@dataclass(frozen=True, slots=True)
class TrainableTable:
    """The summary of what is trained: ``rows``, and the totals in numbers (not bytes)."""

    rows: tuple[TableRow, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        width = max([len(row.pattern) for row in self.rows], default=0)
        lines = [f"{row.pattern:<{width}}  {row.tensors:>5}  {row.parameters:>14,}  {row.lr:.1e}" for row in self.rows]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"trainable {self.trainable:,} of {self.total:,} parameters ({share:.2f}%)")
        return "\n".join(lines)


def freeze(model: nn.Module, args: AdaptArgs, groups: Groups) -> None:
    """Set ``requires_grad`` of every parameter for full training; see the module docstring for the rules."""
    frozen = list(_checked(model, args.freeze_parameters, "--freeze_parameters"))
    thawed = list(_checked(model, args.trainable_parameters, "--trainable_parameters"))
    frozen += [p for p in groups.llm if args.freeze_llm]
    frozen += [p for p in groups.vit if args.freeze_vit]
    (frozen if args.freeze_aligner else thawed).extend(groups.aligner)
    for name, parameter in model.named_parameters():
        trains = not name.startswith(tuple(frozen)) or name.startswith(tuple(thawed))
        parameter.requires_grad_(trains and parameter.is_floating_point())


def _checked(model: nn.Module, prefixes: Sequence[str], flag: str) -> Sequence[str]:
    """``prefixes``, after making sure that each one means something."""
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            stems = {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2, 3, 4)}
            raise UserError(f"{flag} {prefix}: no parameter name begins so; nearest: {nearest(prefix, stems)}")
    return prefixes


def trainable_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that train; UserError if there are none."""
    names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if not names:
        raise UserError(
            "nothing to train: every parameter is frozen; set one of --freeze_llm, --freeze_vit, --freeze_aligner "
            "to false, or name prefixes with --trainable_parameters"
        )
    return names


def param_groups(model: nn.Module, train: TrainArgs, adaptation: Adaptation) -> list[ParamGroup]:
    """The optimiser groups of ``model``'s trainable parameters, in the order of first appearance.

    Names are ``llm``, ``vit``, ``aligner``, with ``.lora_B`` under LoRA+ and ``.no_decay`` where weight decay is off.
    Works before and after sharding: it only reads names and shapes.
    """
    rates = {
        "llm": train.learning_rate,
        "vit": train.learning_rate if train.vit_lr is None else train.vit_lr,
        "aligner": train.learning_rate if train.aligner_lr is None else train.aligner_lr,
    }
    ratio = 1.0 if adaptation.lorap_lr_ratio is None else adaptation.lorap_lr_ratio
    members: dict[tuple[str, bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            boosted = adaptation.lorap_lr_ratio is not None and ".lora_B" in name
            key = (adaptation.groups.of(name), boosted, parameter.ndim > 1)
            members.setdefault(key, []).append((name, parameter))
    result = []
    for (part, boosted, decays), rows in members.items():
        label = part + (".lora_B" if boosted else "") + ("" if decays else ".no_decay")
        lr = rates[part] * (ratio if boosted else 1.0)
        names, params = zip(*rows, strict=True)
        result.append(ParamGroup(label, names, params, lr, train.weight_decay if decays else 0.0))
    return result


Counts = tuple[dict[str, tuple[int, float]], dict[str, int]]
"""By parameter name: how many numbers, and at which rate, of those that train; how many numbers, of all."""


def trainable_table(
    model: nn.Module,
    param_groups: Sequence[ParamGroup],
    gather: Callable[[Counts], Sequence[Counts]] = lambda mine: (mine,),
) -> TrainableTable:
    """What trains, a few lines for any model: layer numbers become ``*`` and siblings of one parent share a line.

    ``gather`` returns what every stage of a pipeline has counted, so that each of them sees the whole model.
    """
    mine = {
        name: (parameter.numel(), group.lr)
        for group in param_groups
        for name, parameter in zip(group.names, group.params, strict=True)
    }
    trained: dict[str, tuple[int, float]] = {}
    every: dict[str, int] = {}
    for more, held in gather((mine, {name: _count(p) for name, p in model.named_parameters()})):
        trained |= more
        every |= held  # a tied weight that two stages hold has one name
    merged: dict[tuple[str, str, float], tuple[dict[str, None], int, int]] = {}
    for name, (count, lr) in trained.items():
        parent, child, leaf = _anatomy(name)
        children, tensors, numbers = merged.get((parent, leaf, lr), ({}, 0, 0))
        merged[parent, leaf, lr] = ({**children, child: None}, tensors + 1, numbers + count)
    paths: dict[tuple[str, str, float], tuple[dict[str, None], int, int]] = {}
    for (parent, leaf, lr), (children, tensors, numbers) in merged.items():
        # lora_A and lora_B of the same modules at the same rate are one line.
        key = (parent, _braces(children), lr)
        leaves, more_tensors, more_numbers = paths.get(key, ({}, 0, 0))
        paths[key] = ({**leaves, leaf: None}, tensors + more_tensors, numbers + more_numbers)
    rows = []
    for (parent, children_text, lr), (leaves, tensors, numbers) in paths.items():
        pattern = ".".join(part for part in (parent, children_text, _braces(leaves)) if part)
        rows.append(TableRow(pattern, tensors, numbers, lr))
    trainable = sum(row.parameters for row in rows)
    return TrainableTable(tuple(rows), trainable, sum(every.values()))


def _anatomy(name: str) -> tuple[str, str, str]:
    """(parent, module, leaf) of a parameter name; the leaf is empty for a plain weight or bias."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    parts = [part for part in parts if part not in ("base_layer", "default")]
    parts = parts[:-1] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts
    leaf = parts.pop() if parts[-1].startswith("lora_") else ""
    return ".".join(parts[:-1]), parts[-1], leaf


def _braces(names: dict[str, None]) -> str:
    """``{a,b}`` for several names, the name itself for one."""
    known = [name for name in names if name]
    return "{" + ",".join(known) + "}" if len(known) > 1 else "".join(known)


def _count(parameter: nn.Parameter) -> int:
    """Numbers in a parameter; a 4-bit one packs two of them into each stored byte."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
