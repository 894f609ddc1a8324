"""Which linear layers get an adapter.

LoRA adds a small trainable matrix pair beside chosen ``nn.Linear`` modules. Choosing is the interesting part on a
vision-language model, because ``all-linear`` must not mean all of them: by default only the language model is
adapted, the tower and the aligner join when they are unfrozen, and the head never does::

    --freeze_llm false (default)   model.language_model.layers.*.{self_attn,mlp}.*_proj
    --freeze_vit false             model.visual.blocks.*.{attn.qkv, attn.proj, mlp.*}   (patch_embed is a convolution)
    --freeze_aligner false         model.visual.merger.*, model.visual.deepstack_merger_list.*

The choice is written to ``adapter_config.json`` as one regular expression over module names, as other tools do, so
that any reader of the file selects the same modules. It is built from the names' endings: ``q_proj``, but
``attn\\.proj`` where ``proj`` alone would also hit the patch convolution. Names given explicitly are suffixes, like
in ``peft``: ``q_proj`` means every module called so, frozen part or not. Experts are linear layers too, though stacked
ones: ``all-linear`` adapts them wherever it adapts the language model (``adapt/experts.py``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from tessera.adapt.experts import names_in, routers_in
from tessera.config.errors import UserError
from tessera.config.run import AdaptArgs
from tessera.contract.plan import Groups, within

HEADS = ("lm_head", "score", "v_head", "classifier")
"""Output heads: never adapted. The loss multiplies by the head's weight itself and would ignore an adapter there."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The chosen modules: full ``names``, and ``spec``, how ``adapter_config.json`` says it (regex or suffixes).

    ``experts`` and ``routers`` are adapted besides; the file names them as parameters.
    """

    names: tuple[str, ...]
    spec: str | tuple[str, ...]
    experts: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()

    @property
    def stacks(self) -> tuple[str, ...]:
        """Everything that is adapted and no linear layer."""
        return (*self.experts, *self.routers)


def ends_with(name: str, suffix: str) -> bool:
    """Whether the dotted ``name`` is ``suffix`` or ends with it, whole components only."""
    return name == suffix or name.endswith("." + suffix)


def nearest(word: str, known: Iterable[str]) -> str:
    """A readable list of the names most like ``word``; all of them if none is."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return ", ".join(close or names[:12])


def select(model: nn.Module, args: AdaptArgs, groups: Groups) -> Targets:
    """The modules of ``model`` that ``--target_modules`` / ``--target_regex`` mean; UserError if that is none."""
    if args.target_regex:
        return _by_regex(model, args.target_regex)
    if tuple(args.target_modules) == ("all-linear",):
        return _all_linear(model, args, groups)
    if args.target_modules and set(args.target_modules) <= {"all-linear", "all-router"}:
        return _with_routers(model, args, groups)
    if "all-linear" in args.target_modules:
        raise UserError(
            f"--target_modules {' '.join(args.target_modules)}: all-linear cannot be combined with names; "
            "use --target_regex for a mixture"
        )
    return _by_suffix(model, args.target_modules)


def _all_linear(model: nn.Module, args: AdaptArgs, groups: Groups) -> Targets:
    frozen = {"llm": args.freeze_llm, "vit": args.freeze_vit, "aligner": args.freeze_aligner}
    linear = [name for name in linear_names(model) if name.rpartition(".")[2] not in HEADS]
    names = [name for name in linear if not frozen[groups.of(name)]]
    if not names:
        flags = " ".join(f"--freeze_{group} {str(value).lower()}" for group, value in frozen.items())
        raise UserError(
            f"nothing to train: {flags} leaves no linear layer to adapt; set one of them to false, "
            "or name modules with --target_modules"
        )
    spec: str | tuple[str, ...]
    if groups.vit or groups.aligner:
        spec = _regex(names, _module_names(model), groups)
        found = [name for name, _ in model.named_modules() if re.fullmatch(spec, name)]
    else:
        spec = tuple(sorted({name.rpartition(".")[2] for name in names}))
        found = [name for name, _ in model.named_modules() if any(ends_with(name, suffix) for suffix in spec)]
    assert sorted(found) == sorted(names), f"{spec} selects {set(found) ^ set(names)} differently"
    stacks = () if args.freeze_llm else names_in(model)
    if stacks and args.use_dora:
        raise UserError(
            "--use_dora true: experts cannot have a DoRA adapter and all-linear means them too; "
            "name linear layers, such as --target_modules q_proj k_proj v_proj o_proj, or drop --use_dora"
        )
    return Targets(tuple(names), spec, stacks)


def _with_routers(model: nn.Module, args: AdaptArgs, groups: Groups) -> Targets:
    """The routers of the language model, alone or beside everything linear."""
    routers = () if args.freeze_llm else routers_in(model)
    if not routers or args.use_dora:
        why = "--use_dora true is not for routers" if routers else "the model has no router that is not frozen"
        raise UserError(f"--target_modules all-router: {why}; drop one of the two")
    rest = _all_linear(model, args, groups) if "all-linear" in args.target_modules else Targets((), ())
    return replace(rest, routers=routers)


def linear_names(model: nn.Module) -> list[str]:
    """Full names of every ``nn.Linear`` (quantised ones included)."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _module_names(model: nn.Module) -> list[str]:
    """Names of all modules; also the owners of parameters, which a replaced module may keep only as a name."""
    owners = (name.rpartition(".")[0] for name, _ in model.named_parameters())
    return list(dict.fromkeys([*(name for name, _ in model.named_modules()), *owners]))


def _regex(names: Sequence[str], everything: Sequence[str], groups: Groups) -> str:
    """One expression that matches exactly ``names`` among ``everything``."""
    parts = []
    for prefix in (*groups.llm, *groups.vit, *groups.aligner):
        inner = tuple(a for a in groups.aligner if a != prefix and within((prefix,), a))
        mine = [name for name in names if within((prefix,), name) and not within(inner, name)]
        if not mine:
            continue
        rest = set(everything) - set(mine)
        rest = {name for name in rest if within((prefix,), name) and not within(inner, name)}
        reject = "(?!(" + "|".join(re.escape(a) for a in inner) + r")(\.|$))" if inner else ""
        parts.append(rf"{reject}{re.escape(prefix)}(?=\.).*\.({'|'.join(_endings(mine, rest))})")
    return f"^({'|'.join(parts)})$"


def _endings(names: Sequence[str], rest: Iterable[str]) -> list[str]:
    """The shortest name endings (as expressions) that all ``names`` have and none of ``rest``."""
    taken = {_ending(name, depth) for name in rest for depth in range(1, name.count(".") + 2)}
    endings: dict[str, None] = {}
    for name in names:
        depth = 2 if name.rpartition(".")[2].isdigit() else 1
        while _ending(name, depth) in taken:
            depth += 1
        endings[_ending(name, depth)] = None
    return list(endings)


def _ending(name: str, depth: int) -> str:
    """The last ``depth`` components of ``name`` as an expression; layer numbers become ``\\d+``."""
    *outer, last = name.split(".")[-depth:]
    return r"\.".join([*(r"\d+" if part.isdigit() else re.escape(part) for part in outer), re.escape(last)])


def _by_suffix(model: nn.Module, suffixes: Sequence[str]) -> Targets:
    if not suffixes:
        raise UserError("--target_modules is empty; give all-linear or module names such as q_proj v_proj")
    names: dict[str, None] = {}
    for suffix in suffixes:
        found = [name for name, _ in model.named_modules() if name and ends_with(name, suffix)]
        if not found:
            known = {name.rpartition(".")[2] for name in linear_names(model)} - set(HEADS)
            raise UserError(
                f"--target_modules {suffix}: the model has no such module; nearest: {nearest(suffix, known)}"
            )
        _check_adaptable(model, found, f"--target_modules {suffix}")
        names.update(dict.fromkeys(found))
    ordered = [name for name in linear_names(model) if name in names]
    return Targets(tuple(ordered), tuple(sorted(set(suffixes))))


def _by_regex(model: nn.Module, regex: str) -> Targets:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UserError(f"--target_regex {regex}: not a regular expression ({error})") from error
    found = [name for name, _ in model.named_modules() if name and pattern.fullmatch(name)]
    if not found:
        example = next(iter(linear_names(model)), "none")
        raise UserError(f"--target_regex {regex}: matches no whole module name; names look like {example}")
    _check_adaptable(model, found, f"--target_regex {regex}")
    return Targets(tuple(found), regex)


def _check_adaptable(model: nn.Module, names: Sequence[str], flag: str) -> None:
    linear = set(linear_names(model))
    for name in names:
        if name.rpartition(".")[2] in HEADS:
            raise UserError(f"{flag}: an output head cannot have an adapter; train it with --modules_to_save {name}")
        if name not in linear:
            kind = type(model.get_submodule(name)).__name__
            raise UserError(
                f"{flag}: also means {name}, a {kind}, and only linear layers can be adapted; "
                "give a longer name (attn.proj rather than proj), or --modules_to_save to train it whole"
            )
