"""Low-rank adapters: made, stored, read and merged, in peft's layers and peft's files.

LoRA leaves a weight ``W [out, in]`` as it is and learns a difference of low rank beside it::

    y = W x + scale * B (A x)          A [r, in] random, B [out, r] zero, so training starts at the base model
    scale = alpha / r                  rsLoRA: alpha / sqrt(r), which keeps the size of the update as r grows
    DoRA: W' = m * (W + scale B A) / |W + scale B A|_row     m [out] learnt, starts at |W|_row

The layers are those of the ``peft`` library, injected in place, so module names stay those of the transformers model
and the files can be read by anything that reads peft's. What is ours: adapter parameters are float32 masters whatever
the base dtype (run under autocast); their start is a function of the seed and the parameter's *name*, hence the same
on every rank and layout; modules to save are trained in place rather than in a copy; merging is done in float32,
layer by layer (``merging``). Adapters can be put beside weights that have no values yet (meta): model and adapters are
then spread over ranks, weights read, and each rank gives its own slices of the adapters their values
(:func:`initialise`, or what :func:`attach` returns).
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tessera.adapt import experts
from tessera.adapt.dora import Dora, row_squares
from tessera.adapt.quant import is_quantised, peft_imports
from tessera.adapt.stored import CONFIG_FILE, WEIGHTS_FILE, Stored, open_tensors, read_config
from tessera.adapt.targets import Targets, ends_with, nearest
from tessera.adapt.trainable import Adaptation
from tessera.config.errors import UserError
from tessera.config.run import AdaptArgs
from tessera.contract.plan import Groups, within
from tessera.contract.shards import WHOLE, Shards, keep
from tessera.models.layers import Linear

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."
"""What peft's files put before every module name."""

_NAME = "default"

# ---------------------------------------------------------------------------------------------------- making adapters


def modules_to_save(
    model: nn.Module, suffixes: Sequence[str], match: Callable[[str, str], bool] = ends_with
) -> tuple[str, ...]:
    """Full names of the modules that ``--modules_to_save`` means, and of those that share a parameter with them."""
    parameters = _by_every_name(model)
    owners = (name.rpartition(".")[0] for name in parameters)
    names = list(dict.fromkeys([*(name for name, _ in model.named_modules() if name), *owners]))
    found: list[str] = []
    for suffix in suffixes:
        matched = [name for name in names if match(name, suffix) and not within(found, name)]
        if not matched and not any(match(name, suffix) for name in names):
            known = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise UserError(
                f"--modules_to_save {suffix}: the model has no such module; nearest: {nearest(suffix, known)}"
            )
        for name in matched:
            found += [] if within(found, name) else [name]
    shared = {id(p) for name, p in parameters.items() if within(found, name)}
    for name, parameter in parameters.items():
        owner = name.rpartition(".")[0]
        if id(parameter) in shared and not within(found, owner):
            found.append(owner)
    return tuple(found)


def _by_every_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by all their names; a tied head that is no module here is ``lm_head.weight``, as in transformers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not any(name.startswith("lm_head.") for name in parameters):
        for embedding in [name for name in parameters if name.endswith("embed_tokens.weight")]:
            parameters["lm_head.weight"] = parameters[embedding]
    return parameters


def inject(model: nn.Module, targets: Targets, saved: Sequence[str], args: AdaptArgs, *, quantised: bool) -> LoraConfig:
    """Put adapters beside ``targets`` and freeze everything else but the ``saved`` modules; in place.

    They have no meaningful values before :func:`initialise`.
    """
    clash = [name for name in (*targets.names, *targets.stacks) if within(saved, name)]
    if clash:
        raise UserError(
            f"--modules_to_save: {clash[0]} would be both adapted and trained whole; freeze its part "
            "(--freeze_vit, --freeze_aligner) or name other --target_modules"
        )
    with peft_imports(quantised=quantised):
        from peft import LoraConfig

        config = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            bias=args.lora_bias,
            use_dora=args.use_dora,
            use_rslora=args.use_rslora,
            target_modules=targets.spec if isinstance(targets.spec, str) else list(targets.spec),
            task_type="CAUSAL_LM",
        )
    if targets.stacks:
        # peft has no dropout for experts, and its files have one for all; see adapt/experts.py.
        config.lora_dropout = 0.0
    _inject(model, config, quantised=quantised, nothing=not targets.names)
    adapted = {name for name, _ in layers_in(model)}
    assert adapted == set(targets.names), f"peft adapted {adapted ^ set(targets.names)} differently"
    experts.wrap(model, targets.stacks, config.r, _scaling(config))
    _train_whole(model, saved)
    config.modules_to_save = list(saved) or None
    if targets.stacks:
        _name_for_peft(config, targets)
    return config


def initialise(model: nn.Module, seed: int, shards: Shards = WHOLE) -> None:
    """Give fresh adapters their values, functions of (seed, name); of sharded ones what ``shards`` says is here.

    The weights beside them must have theirs (DoRA starts at the norms of their rows).
    """
    for name, layer in layers_in(model):
        _initialise(layer, name, seed, shards)
    for name, stack in experts.wrapped_in(model):
        stack.initialise(name, seed, shards)


def is_empty(model: nn.Module) -> bool:
    """Whether ``model`` has no values yet."""
    return any(parameter.is_meta for parameter in model.parameters())


def stored_name(name: str) -> str | None:
    """What the parameter ``name`` of an adapted model is called in the plain one; None if it is an adapter's own."""
    return None if _is_adapter(name) else name.replace(".base_layer.", ".")


def _name_for_peft(config: LoraConfig, targets: Targets) -> None:
    """Make ``config`` name experts and routers, and other layers so that peft finds them.

    For some sparse models peft takes a *module* target called like an expert's matrix to mean the experts of an older
    naming, and no other module. A weight that is named as a parameter has one meaning; the tensors are the same.
    """
    alike = [name for name in targets.names if name.rpartition(".")[2] in experts.ALIKE]
    config.target_parameters = [f"{name}.weight" for name in alike]
    config.target_parameters += [*experts.TARGETS] if targets.experts else []
    config.target_parameters += [experts.ROUTER] if targets.routers else []
    if alike:
        config.target_modules = sorted(set(targets.names) - set(alike))


def _scaling(config: LoraConfig) -> float:
    return float(config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))


def _inject(model: nn.Module, config: LoraConfig, *, quantised: bool, nothing: bool = False) -> None:
    """peft's layers with float32 parameters; leaves the global random state and the model's attributes alone.

    ``nothing``: there is no layer to adapt, which peft refuses, and all that is left is to freeze the model.
    """
    if next(layers_in(model), None) is not None or experts.wrapped_in(model):
        raise UserError(
            "--adapters: this model has an adapter already; merge one (tessera export) before adding another"
        )
    if nothing:
        model.requires_grad_(False)
        return
    with peft_imports(quantised=quantised), torch.random.fork_rng(devices=[]):
        from peft import inject_adapter_in_model

        # How peft is told to use its layers for bitsandbytes; each applies to modules of its kind only.
        vars(model).update({"is_loaded_in_4bit": True, "is_loaded_in_8bit": True} if quantised else {})
        inject_adapter_in_model(copy.copy(config), model, adapter_name=_NAME, low_cpu_mem_usage=is_empty(model))
    # Bookkeeping of peft's that would only disturb whoever looks at the model next.
    for attribute in ("peft_config", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(attribute, None)
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
            parameter.data = parameter.data.float()
    for _, layer in layers_in(model):
        layer.lora_A[_NAME], layer.lora_B[_NAME] = _spread(layer.lora_A[_NAME]), _spread(layer.lora_B[_NAME])
        if _NAME in layer.lora_magnitude_vector and not quantised:
            layer.lora_magnitude_vector[_NAME] = Dora(layer.lora_magnitude_vector[_NAME].weight)


def _spread(plain: nn.Linear) -> Linear:
    """``plain`` as the kind of linear layer whose parameters may be spread over ranks; same parameters."""
    linear = Linear(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
    linear.weight, linear.bias = plain.weight, plain.bias
    return linear


def layers_in(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every adapted module; a layer is told by the children that only peft's layers have."""
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if {"base_layer", "lora_A", "lora_B"} <= children.keys():
            yield name, module


def _is_adapter(name: str) -> bool:
    """Whether a parameter name is that of an adapter rather than of the base model."""
    return any(part.startswith("lora_") for part in name.split("."))


@torch.no_grad()
def _initialise(layer: Any, name: str, seed: int, shards: Shards) -> None:
    """A uniform in +-1/sqrt(in), B zero, DoRA's magnitudes the row norms of W: all functions of (seed, name)."""
    a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    # 32 bits: the CPU generator drops the rest of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    bound = a.shape[1] ** -0.5
    keep(a, torch.empty(a.shape).uniform_(-bound, bound, generator=generator), shards)
    shards.local(b).zero_()
    if _NAME in layer.lora_magnitude_vector:
        magnitude, base = layer.lora_magnitude_vector[_NAME], layer.get_base_layer()
        squares = row_squares(_weight(layer, shards))
        if isinstance(magnitude, Dora):  # where ranks hold some columns each, a row's squares are added up over them
            assert shards.held(magnitude.weight) == shards.held(base.weight)[:1], (
                f"{name}: other rows than its weight's"
            )
            squares = magnitude.across(squares)
        shards.local(magnitude.weight).copy_(squares.sqrt())


def _weight(layer: Any, shards: Shards = WHOLE) -> Tensor:
    """The base weight ``[out, in]``, or this rank's rows of it, in float32, expanded if it is quantised."""
    base = layer.get_base_layer()
    if not is_quantised(base):
        return shards.local(base.weight).float()
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(base).detach().float()


def _train_whole(model: nn.Module, saved: Sequence[str]) -> None:
    for name, parameter in _by_every_name(model).items():
        if within(saved, name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


# --------------------------------------------------------------------------------------------------- files, peft's way


def adapter_tensors(
    model: nn.Module, adaptation: Adaptation, full: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, Tensor]:
    """The adapter's tensors under peft's file names, on the CPU; a collective if ``full`` is one."""
    assert adaptation.config is not None, "full training has no adapter"
    tensors = {}
    for name, parameter in _by_every_name(model).items():
        bias = adaptation.config.bias != "none" and name.endswith(".bias")
        if _is_adapter(name) or bias or within(adaptation.saved, name):
            # contiguous().clone(): tied modules share storage in memory, files must not.
            whole = full(parameter.detach()).cpu()
            key, value = experts.to_file(name, whole) or (_file_name(name), whole)
            tensors[PREFIX + key] = value.contiguous().clone()
    return tensors


def _file_name(name: str) -> str:
    name = name.replace(f".{_NAME}.", ".") if _is_adapter(name) else name
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def save_adapter(
    tensors: dict[str, Tensor], adaptation: Adaptation, directory: Path | str, *, base_model: str | None
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into ``directory``.

    ``tensors`` are those of :func:`adapter_tensors`, ``base_model`` what ``base_model_name_or_path`` will say.
    """
    from safetensors.torch import save

    config = copy.copy(adaptation.config)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    fields = {key: sorted(v) if isinstance(v, (set, frozenset)) else v for key, v in config.to_dict().items()}
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    # Not save_file: on a full disk it raises an error of its own, which is no OSError.
    (out / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    (out / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(
    model: nn.Module,
    directory: Path | str,
    groups: Groups,
    *,
    trainable: bool,
    lorap_lr_ratio: float | None = None,
    quantised: Sequence[str] = (),
    rename: Callable[[str], str] = lambda name: name,
) -> Adaptation:
    """Read an adapter that tessera or peft wrote and put it beside ``model``'s weights (already loaded), in place.

    ``rename`` maps a module name of the file to the model's where those differ (adapters of an older naming). Every
    tensor of the file must find its place and every adapter parameter its tensor; UserError otherwise.
    """
    made, fill = attach(
        model, directory, groups, trainable=trainable, lorap_lr_ratio=lorap_lr_ratio, quantised=quantised, rename=rename
    )
    fill(model, WHOLE)
    return made


def attach(
    model: nn.Module,
    directory: Path | str,
    groups: Groups,
    *,
    trainable: bool = True,
    lorap_lr_ratio: float | None = None,
    quantised: Sequence[str] = (),
    rename: Callable[[str], str] = lambda name: name,
) -> tuple[Adaptation, Callable[[nn.Module, Shards], None]]:
    """As :func:`load_adapter` for a ``model`` that may be empty: what was done, and what fills it.

    The second is called when ``model``, or what this rank holds of it, has its memory; what the file holds gets it then
    if it has none.
    """
    config = read_config(Path(directory), ("weight", *experts.PARTS))
    tensors = {_memory_name(key, rename): tensor for key, tensor in open_tensors(Path(directory)).items()}
    sizes = {name: model.get_parameter(f"{name}.down_proj").shape[0] for name in experts.names_in(model)}
    known = (*sizes, *experts.routers_in(model))
    stacks = [name for name in known if f"{name}.lora_A.{_NAME}.weight" in tensors]
    counted = {name: size for name, size in sizes.items() if name in stacks}
    tensors = experts.from_file(tensors, counted, _NAME, [name for name in stacks if name not in counted])
    names = sorted({name.partition(".lora_")[0] for name in tensors if _is_adapter(name)} - set(stacks))
    adaptable = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in names:
        if name not in adaptable or name.rpartition(".")[2] == "lm_head":
            raise UserError(
                f"{directory}: adapts {name}, which is no adaptable linear layer of this model; wrong --model?"
            )
    # peft matches by the end of the string, so that norm also means input_layernorm.
    saved = modules_to_save(model, config.modules_to_save or (), str.endswith)
    # The file's tensors, not its patterns, say what is adapted: patterns are read differently between versions.
    exact = copy.copy(config)
    exact.target_modules, exact.modules_to_save, exact.exclude_modules = set(names), None, None
    exact.layers_to_transform, exact.layers_pattern, exact.init_lora_weights = None, None, True
    exact.inference_mode, exact.target_parameters = False, None
    _inject(model, exact, quantised=bool(quantised), nothing=not names)
    experts.wrap(model, stacks, config.r, _scaling(config))
    places = _places(model, tensors, saved, str(directory), tied=config.ensure_weight_tying)
    if trainable:
        _train_whole(model, saved)
    else:
        model.requires_grad_(False)
    config.modules_to_save = list(saved) or None
    trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    made = Adaptation("lora", groups, trained, (*names, *stacks), saved, tuple(quantised), config, lorap_lr_ratio)
    return made, partial(_fill, places=places, source=str(directory))


def _memory_name(key: str, rename: Callable[[str], str]) -> str:
    """The parameter name in memory of a tensor name in a file."""
    name = rename(key.removeprefix(PREFIX).replace(".modules_to_save.", "."))
    if name.endswith(".lora_magnitude_vector"):
        name += ".weight"
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        name = name.replace(f".{part}.", f".{part}.{_NAME}.")
    return name


Places = dict[str, list[tuple[str, Stored]]]
"""By parameter name, the tensors of the file that belong there (several if they are tied), with their names."""


def _places(model: nn.Module, tensors: dict[str, Stored], saved: Sequence[str], source: str, *, tied: bool) -> Places:
    """Where every tensor belongs; nothing left over, nothing left out.

    ``tied``: the file keeps one copy of tensors that are tied (otherwise it must hold both).
    """
    parameters = _by_every_name(model)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    needed = {name for name in parameters if _is_adapter(name) or within(saved, name)}
    places: Places = {}
    for key, tensor in tensors.items():
        stem, _, leaf = key.rpartition(".")
        name = key if key in parameters else f"{stem}.base_layer.{leaf}"
        if name not in parameters:
            raise UserError(f"{source}: holds {key}, which this model has no place for; wrong --model?")
        parameter = parameters[name]
        if tuple(parameter.shape) != tensor.shape:
            shapes = f"{tensor.shape} in the file, {tuple(parameter.shape)} in the model"
            raise UserError(f"{source}: {key} is {shapes}; wrong --model?")
        places.setdefault(first[id(parameter)], []).append((key, tensor))
        needed.discard(name)
    untied = sorted(name for name in needed if first[id(parameters[name])] in places)
    if untied and not tied:
        raise UserError(
            f"{source}: trains one of two tensors that this model ties, {untied[0]} not; merge it with peft first"
        )
    missing = sorted(needed.difference(untied))
    if missing:
        raise UserError(f"{source}: {missing[0]} is missing ({len(missing)} in all); the adapter is incomplete")
    return places


@torch.no_grad()
def _fill(model: nn.Module, shards: Shards, *, places: Places, source: str) -> None:
    """Copy every tensor, or this rank's slice of it, to its parameter."""
    for name, parameter in list(model.named_parameters()):
        if name not in places:
            continue
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
            model.get_submodule(owner).register_parameter(leaf, parameter)
        target, part = shards.local(parameter), shards.held(parameter)
        if not target.numel():
            continue
        (_, tensor), *twins = places[name]
        value = tensor.read(part)
        for key, twin in twins:
            if not torch.equal(value, twin.read(part)):
                raise UserError(
                    f"{source}: {key} differs from the tensor that this model ties it to; merge it with peft first"
                )
        target.copy_(value)


# ------------------------------------------------------------------------------------------------------------- merging


@torch.no_grad()
def merged_weight(layer: Any, weight: Tensor, rows: slice) -> Tensor:
    """``W + scale B A`` in float32 for these ``rows`` of the weight of an adapted layer, which ``weight`` holds.

    With DoRA, rows as long as it learnt.
    """
    first, second = layer.lora_A[_NAME].weight.float(), layer.lora_B[_NAME].weight[rows].float()
    merged = weight.to(torch.float32, copy=True).addmm_(second, first, alpha=layer.scaling[_NAME])
    if _NAME in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[_NAME].weight[rows].float()
        merged *= (magnitude / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
    return merged


@torch.no_grad()
def merged_bias(layer: Any, bias: Tensor, rows: slice) -> Tensor:
    """These ``rows`` of the bias of an adapted layer, which ``bias`` holds, with the adapter's own, if it has one."""
    extra = layer.lora_B[_NAME].bias
    return bias if extra is None else bias + (extra[rows] * layer.scaling[_NAME]).to(bias.dtype)
