"""From what the user typed to a :class:`~tessera.config.run.Run`, remembering where every value came from.

Five sources may set a flag; the first one in this order wins::

    flag        --max_length 2048
    yaml        tessera sft run.yaml        (its ENV block counts as environment, unless the shell sets the variable)
    env         MAX_PIXELS=602112, NPROC_PER_NODE=8, ...   (the rows of the table that name a variable)
    args.json   infer, deploy and export: what the model or adapter was trained with
    default     the table's, or derived: learning rate from --train_type, accumulation from batch and processes

``tessera megatron VERB`` is the same with the names and defaults of that dialect, and ``tessera megatron SCRIPT ...``
is first translated into such a command (``scripts``).

Then the combination is checked: whatever needs no weights and no data to be known as wrong is refused here, in one
sentence. This module and ``cli.py`` are the only ones outside ``parallel/mesh.py`` that see the environment, and this
one only through the mapping it is given.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tessera.config import batches, memory, parallel, scripts, serving
from tessera.config import convert as conversion
from tessera.config import evaluate as evaluation
from tessera.config.flags import BY_NAME, FLAGS, TRAIN, USE, VERBS, Dialect, Flag
from tessera.config.parse import (
    Words,
    convert,
    json_object,
    lookup,
    nearest,
    program,
    shown,
    split,
    usage_error,
    words_of,
)
from tessera.config.run import ROOM_CLASSES, Run
from tessera.config.sources import Sources, is_mcore
from tessera.config.tasks import data_task

VISION = ("max_pixels", "min_pixels", "video_max_pixels", "fps", "fps_max_frames", "max_num")
LATER = ("rlhf", "plan", "rollout", "app", "web-ui", "sample")


@dataclass
class _Draft:
    """A Run in the making: values by flag name, where they came from, and what to tell the user."""

    verb: str
    dialect: Dialect = "swift"
    values: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    task: tuple[str, ...] = ()
    target: str | None = None
    config_file: str | None = None
    spelled: Mapping[str, str] = field(default_factory=dict)

    def offer(self, flag: Flag, words: Any, origin: str, label: str) -> None:
        """Set ``flag`` from command line words or a parsed value, unless an earlier source did; None sets nothing.

        The value is checked either way.
        """
        if words is None:
            return
        empty = flag.kind == "list" and words in ([], ()) and origin != "flag"
        value = () if empty else convert(flag, words_of(words), label)
        if flag.name not in self.values:
            self.values[flag.name], self.provenance[flag.name] = value, origin

    def given(self, name: str) -> bool:
        """Whether the user set the flag, here and now."""
        return self.provenance.get(name) in ("flag", "yaml", "env", "program")

    def label(self, name: str) -> str:
        """The flag as the user wrote it."""
        return self.spelled.get(name, f"--{name}")


def under_launcher(env: Mapping[str, str]) -> bool:
    """Whether this process is one rank of a group. ``RANK`` alone does not say so: schedulers set it per machine."""
    return "LOCAL_RANK" in env


def processes(nproc: int, nnodes: int, env: Mapping[str, str]) -> int:
    """Processes of a run with these flags: as many as the launcher says, or will be told to start."""
    return int(env.get("WORLD_SIZE", "1")) if under_launcher(env) else nproc * nnodes


def resolve(argv: Sequence[str], env: Mapping[str, str]) -> Run:
    """The Run that the command line ``argv`` (verb first, program name not included) asks for.

    Raises UserError (exit code 2) for anything that can be known as wrong without weights and data.
    """
    command, remarks = scripts.translated(argv, env)
    dialect, verb, rest = command_of(command)
    words = split(rest, verb, dialect)
    draft = _Draft(verb, dialect, notes=[*remarks, *words.notes], spelled=words.spelled)
    _from_flags(draft, words)
    variables = dict(env)
    if draft.config_file is not None:
        _from_file(draft, Path(draft.config_file), variables)
    _from_env(draft, variables)
    _from_short(draft)
    Sources(draft.values, draft.provenance, draft.label, draft.notes).settle(verb)
    _from_args_json(draft)
    _from_defaults(draft)
    _require(draft, words)
    run = _finish(draft, variables)
    if verb in TRAIN:
        parallel.fits(run, processes(run.parallel.nproc_per_node, run.parallel.nnodes, env))
    return run


def run_of(verb: str, **flags: Any) -> Run:
    """The Run of ``verb`` with these flags (Python values) and nothing else: no environment, nothing required."""
    draft = _Draft(verb)
    for name, value in flags.items():
        draft.offer(lookup(name, verb, name), value, "program", name)
    _from_defaults(draft)
    return _finish(draft, {})


def run_from_json(data: Mapping[str, Any]) -> Run:
    """The Run that an ``args.json`` written by :meth:`Run.to_json` describes; unknown keys are left alone."""
    dialect: Dialect = "megatron" if data.get("dialect") == "megatron" else "swift"
    draft = _Draft(str(data["verb"]), dialect, env=dict(data.get("env", {})))
    for flag in FLAGS:
        draft.offer(flag, data.get(flag.name), "args.json", f"args.json: {flag.name}")
    _from_defaults(draft)
    return _finish(draft, {})


def command_of(argv: Sequence[str]) -> tuple[Dialect, str, Sequence[str]]:
    """The dialect, the verb and the words after it, if it is a verb of this version."""
    dialect: Dialect = "megatron" if argv and argv[0] == "megatron" else "swift"
    words = argv[1:] if dialect == "megatron" else argv
    verb = words[0] if words else ""
    if verb in (scripts.VERBS if dialect == "megatron" else VERBS):
        return dialect, verb, words[1:]
    known = [*scripts.VERBS, *scripts.NAMES] if dialect == "megatron" else list(VERBS)
    there = f"there are {', '.join(known)}"
    if verb in LATER or verb in VERBS:
        raise usage_error(f"{program(verb, dialect)}: not in this version; {there}")
    near = nearest(verb, known)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise usage_error(f"{program(verb, dialect)}: no such verb{hint}; {there}")


def _from_flags(draft: _Draft, words: Words) -> None:
    positional = list(words.positional)
    if draft.verb == "data" and not (positional and Path(positional[0]).suffix in (".yaml", ".yml", ".json")):
        found = data_task(positional)
        draft.task, draft.target, positional = found.task, found.target, []
        draft.offer(BY_NAME["dataset"], found.datasets or None, "flag", "--dataset")
        draft.offer(BY_NAME["output_dir"], found.out, "flag", "--output_dir")
    elif positional and draft.verb in ("report", "demo"):
        draft.target = positional.pop(0)
    elif positional and Path(positional[0]).suffix in (".yaml", ".yml", ".json"):
        draft.config_file = positional.pop(0)
    if positional:
        command = program(draft.verb, draft.dialect)
        raise usage_error(f"{command} {shown(positional)}: unexpected; a flag starts with two dashes")
    for name, values in words.flags.items():
        draft.offer(BY_NAME[name], values, "flag", draft.label(name))


def _from_file(draft: _Draft, path: Path, variables: dict[str, str]) -> None:
    """Flags of a YAML or JSON file; its ``ENV`` block sets variables that the shell does not."""
    if not path.is_file():
        raise usage_error(f"{path}: no such file (the first word after the verb is a YAML or JSON file of flags)")
    if path.suffix == ".json":
        data: Any = json_object(str(path), "")
    else:
        import yaml

        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise usage_error(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    block = data.pop("ENV", {}) if isinstance(data, dict) else None
    if not isinstance(block, dict):
        raise usage_error(f"{path}: expected a mapping of flags to values")
    for name, value in block.items():
        variables.setdefault(str(name), str(value))
        draft.env[str(name)] = variables[str(name)]
    for name, value in data.items():
        label = f"{path}: {name}"
        draft.offer(lookup(str(name), draft.verb, label, draft.dialect), value, "yaml", label)


def _from_env(draft: _Draft, variables: Mapping[str, str]) -> None:
    if "model_kwargs" in draft.values:
        for name, value in draft.values["model_kwargs"].items():
            if name not in VISION:
                raise usage_error(f"--model_kwargs {name}: allowed are {', '.join(VISION)}")
            draft.offer(BY_NAME[name], value, draft.provenance["model_kwargs"], f"--model_kwargs {name}")
    for flag in FLAGS:
        if flag.env and flag.belongs_to(draft.verb, draft.dialect) and variables.get(flag.env, "").strip():
            text = variables[flag.env].strip()
            draft.offer(flag, [text], "env", flag.env)
            if flag.secret:
                continue
            draft.env[flag.env] = text
            if str(draft.values[flag.name]) != str(convert(flag, [text], flag.env)):
                held, dropped = ("", "") if flag.secret else (f" {draft.values[flag.name]}", f"={text}")
                draft.notes.append(f"--{flag.name}{held} holds, {flag.env}{dropped} is dropped")


def _from_short(draft: _Draft) -> None:
    """What flags that are short for others say, where those others are not given themselves."""
    for flag in FLAGS:
        if not flag.means or flag.name not in draft.values:
            continue
        word = str(draft.values[flag.name]).lower()
        for name, value in flag.means.get(word, {}).items():
            if name in draft.values and str(draft.values[name]).lower() != value:
                held = f"{draft.label(name)} {draft.values[name]}"
                draft.notes.append(f"{held} holds, {draft.label(flag.name)} {word} is dropped")
            draft.offer(BY_NAME[name], value, draft.provenance[flag.name], draft.label(flag.name))


def _from_args_json(draft: _Draft) -> None:
    """What infer, deploy and export take over from the model or adapter; every verb finds an adapter's base model."""
    adapters = draft.values.get("adapters", ())
    if draft.verb == "deploy":
        adapters = tuple(serving.named(adapter)[1] for adapter in adapters)
    for adapter in adapters if draft.verb in USE else ():
        _carry(draft, Path(adapter), ("adapter", "always"))
    for adapter in adapters:
        config = Path(adapter, "adapter_config.json")
        if "model" not in draft.values and config.is_file():
            base = json_object(str(config), "").get("base_model_name_or_path")
            if base:
                draft.offer(BY_NAME["model"], base, "args.json", f"{config}: base_model_name_or_path")
    if draft.provenance.get("model") == "args.json":
        named = f"--adapters {adapters[0]}" if adapters else f"--mcore_adapters {draft.values['mcore_adapters'][0]}"
        draft.values["model"] = _local(f"{named}: its base model", draft.values["model"])
    if draft.verb in USE and "model" in draft.values:
        _carry(draft, Path(draft.values["model"]), ("always",))
    if draft.values.get("load_data_args", False):
        places = [*adapters, *([draft.values["model"]] if "model" in draft.values else [])]
        if not any(Path(place, "args.json").is_file() for place in places):
            raise usage_error(f"--load_data_args true: no args.json in {shown(places)}")


def _carry(draft: _Draft, directory: Path, kinds: tuple[str, ...]) -> None:
    path = directory / "args.json"
    if not path.is_file():
        return
    stored = json_object(str(path), "")
    if draft.values.get("load_data_args", False):
        kinds = (*kinds, "data")
    for flag in FLAGS:
        spelled = next((name for name in flag.names("megatron") if stored.get(name) is not None), "")
        if flag.carry not in kinds:
            continue
        if flag.name in (*VISION, "image_resize") and flag.name in draft.values and "tessera_version" in stored:
            _note_vision(draft, flag, stored.get(flag.name), path)
        if spelled:
            draft.offer(flag, stored[spelled], "args.json", f"{path}: {spelled}")


def _note_vision(draft: _Draft, flag: Flag, trained: Any, path: Path) -> None:
    if trained != draft.values[flag.name]:
        was = "the model's own" if trained is None else str(trained)
        draft.notes.append(f"--{flag.name} {draft.values[flag.name]} differs from training's ({was}, {path})")


def _from_defaults(draft: _Draft) -> None:
    for flag in FLAGS:
        if flag.room not in ("inert", "short") and flag.name not in draft.values:
            default = flag.default_for(draft.verb, draft.dialect)
            draft.values[flag.name], draft.provenance[flag.name] = default, "default"


def _require(draft: _Draft, words: Words) -> None:
    """What a verb cannot do without."""
    values, cut = draft.values, f" (the command seems cut after {words.cut_after})" if words.cut_after else ""
    command, theirs = program(draft.verb, draft.dialect), draft.dialect == "megatron"
    named = [values["model"]] if draft.verb in TRAIN else [values["model"], values["mcore_model"]]
    if draft.verb == "eval":
        evaluation.require(values, draft.given)
    elif draft.verb in (*TRAIN, *USE) and not any((*named, *values["adapters"], *values["mcore_adapters"])):
        more = " or --adapters" if draft.verb in USE else ""
        raise usage_error(f"{command}: {'--load' if theirs else '--model'}{more} is required{cut}")
    if (draft.verb in TRAIN or (draft.verb == "data" and draft.target is None)) and not values["dataset"]:
        raise usage_error(f"{command}: --dataset is required{cut}")
    if theirs and draft.verb in TRAIN:
        lengths = ("num_train_epochs", "max_steps", "train_samples")
        if not any(draft.given(name) for name in lengths):
            raise usage_error(f"{command}: --max_epochs, --train_iters or --train_samples is required{cut}")
    if draft.verb == "report" and draft.target is None:
        raise usage_error("tessera report RUN: the directory of a run is required")
    if draft.verb == "compose":
        _require_parts(values)


def _require_parts(values: Mapping[str, Any]) -> None:
    """Two models, or a description of one; and a place."""
    given = [f"--{name}" for name in ("vision", "llm") if values[name] is not None]
    if values["config"] is not None and given:
        raise usage_error(f"--config makes a model of random weights; it does not go with {' and '.join(given)}")
    if values["config"] is None and len(given) < 2:
        lacking = " and ".join(name for name in ("--vision", "--llm") if name not in given)
        raise usage_error(f"tessera compose: {lacking} {'is' if given else 'are'} required (or --config alone)")
    if values["output_dir"] is None:
        raise usage_error("tessera compose: --output_dir is required")


def _finish(draft: _Draft, env: Mapping[str, str]) -> Run:
    values = draft.values
    _paths(draft)
    memory.stage_of(values, draft.given, draft.notes)
    world = processes(values["nproc_per_node"], values["nnodes"], env)
    batches.settle(values, draft.given, draft.label, world, pads=draft.dialect == "megatron")
    _derive(draft)
    memory.settle(values, draft.given)
    _check(draft.verb, values)
    if draft.verb == "export":
        conversion.check(values, draft.given, draft.label)
    serving.settle(draft.verb, values, draft.given("infer_backend"), draft.notes)
    draft.env.update(serving.environment(draft.verb, values))
    parallel.check(values, draft.given, draft.notes)
    _hints(draft)
    rooms = {
        room: kind(**{spec.name: values[spec.name] for spec in fields(kind)}) for room, kind in ROOM_CLASSES.items()
    }
    return Run(
        verb=draft.verb,
        dialect=draft.dialect,
        dry_run=values["dry_run"],
        task=draft.task,
        target=draft.target,
        config_file=draft.config_file,
        provenance=draft.provenance,
        env=draft.env,
        inert={name: value for name, value in values.items() if BY_NAME[name].room == "inert"},
        notes=tuple(draft.notes),
        **rooms,
    )


def _paths(draft: _Draft) -> None:
    """Local paths become absolute, so that args.json means the same from anywhere; a system prompt is read."""
    values = draft.values
    for name in ("model", "hf_dir", "mcore_model", "mcore_vision_model"):
        if name == "model" and values["eval_url"] is not None:
            continue  # what the server calls it
        if values[name] is not None and draft.provenance[name] != "args.json":
            values[name] = _local(
                draft.label("load" if name == "model" and "load" in draft.spelled else name), values[name]
            )
    values["mcore_adapters"] = tuple(_local("--mcore_adapters", adapter) for adapter in values["mcore_adapters"])
    if draft.given("adapters"):
        values["adapters"] = serving.placed(draft.verb, values["adapters"], _local)
    for name in ("vision", "llm", "aligner"):
        if draft.given(name) and values[name] != "init":
            values[name] = _local(f"--{name}", values[name])
    if values["system"] is not None and draft.given("system"):
        text: str = values["system"]
        if text.endswith(".txt"):
            if not Path(text).is_file():
                raise usage_error(f"--system {text}: no such file")
            text = Path(text).read_text(encoding="utf-8")
        values["system"] = text.replace("\\n", "\n")


def _local(label: str, name: str) -> str:
    """The absolute path of a local directory, or a hub id as it is."""
    path = Path(name).expanduser()
    if path.is_dir():
        return os.path.abspath(path)
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise usage_error(f"{label} {name}: no such directory")
    return name


def _derive(draft: _Draft) -> None:
    """Defaults that follow from other values."""
    values, theirs = draft.values, draft.dialect == "megatron"
    full = values["train_type"] == "full"
    name = os.path.basename(values["model"] or "") or "model"
    fallbacks = {
        "learning_rate": 1e-5 if full else 1e-4,
        "pipeline_schedule": "interleaved" if values["virtual_pipeline_model_parallel_size"] > 1 else "1f1b",
        "eval_strategy": values["save_strategy"],
        "eval_steps": values["save_steps"],
        "data_seed": values["seed"],
        "output_dir": {
            "export": _export_dir(values),
            "demo": draft.target or "demo_output",
            "data": "data_output",
        }.get(draft.verb, os.path.join("megatron_output" if theirs else "output", name)),
        "save_format": "mcore" if theirs and is_mcore(Path(values["model"] or "")) else "hf",
    }
    for flag, value in fallbacks.items():
        if values[flag] is None:
            values[flag] = value
    if values["resume_from_checkpoint"] is not None and values["resume_from_checkpoint"].lower() in ("false", "none"):
        values["resume_from_checkpoint"] = None
    if values["quant_method"] is not None and values["quant_bits"] is None:
        values["quant_bits"] = 4
    if values["wandb_project"] and not draft.given("report_to"):
        values["report_to"] = (*values["report_to"], "wandb")
    values["report_to"] = tuple(name for name in values["report_to"] if name != "none")


def _export_dir(values: Mapping[str, Any]) -> str:
    converted = conversion.output_of(values)
    if converted is not None:
        return converted
    source = values["adapters"][0] if values["adapters"] else values["model"] or "model"
    return f"{source.rstrip('/')}-merged" if values["merge_lora"] else f"{source.rstrip('/')}-export"


def _check(verb: str, values: Mapping[str, Any]) -> None:
    """Combinations that cannot work, whatever the model and the data are."""
    if values["train_type"] == "full" and values["quant_method"] is not None:
        raise usage_error("--train_type full cannot train a quantised model; use --train_type lora (QLoRA)")
    if values["quant_bits"] is not None and values["quant_method"] is None:
        raise usage_error(f"--quant_bits {values['quant_bits']} needs --quant_method bnb")
    if verb == "sft" and values["truncation_strategy"] == "split":
        raise usage_error("--truncation_strategy split cuts documents for tessera pt; sft takes delete, left or right")
    if values["push_to_hub"] and not values["hub_model_id"]:
        raise usage_error("--push_to_hub true needs --hub_model_id namespace/name")
    if values["merge_lora"] and not (values["adapters"] or values["mcore_adapters"]):
        raise usage_error("--merge_lora true needs --adapters DIR")
    if values["task"] is not None and verb == "infer":
        _check_task(values)
    if values["nnodes"] > 1 and not values["master_addr"]:
        raise usage_error(f"NNODES={values['nnodes']} needs MASTER_ADDR, the address of the first machine")
    if values["node_rank"] >= values["nnodes"]:
        raise usage_error(f"NODE_RANK={values['node_rank']}: expected less than NNODES={values['nnodes']}")
    if values["packing_length"] and values["max_length"] and values["packing_length"] < values["max_length"]:
        raise usage_error(
            f"--packing_length {values['packing_length']} cannot hold rows of --max_length {values['max_length']}"
        )


def _check_task(values: Mapping[str, Any]) -> None:
    """What a benchmark's questions need, and what they exclude."""
    for name in ("input_image_path", "output_path"):
        if not values[name]:
            raise usage_error(f"--task {values['task']} needs --{name}")
    for name in ("dataset", "val_dataset", "result_path"):
        if values[name]:
            raise usage_error(f"--task {values['task']} brings its own rows; leave --{name} out")
    if values["num_partitions"] and values["partition_id"] >= values["num_partitions"]:
        raise usage_error(
            f"--partition_id {values['partition_id']}: expected less than --num_partitions {values['num_partitions']}"
        )


def _hints(draft: _Draft) -> None:
    """What the user should know once: flags without effect, an evaluation that cannot happen."""
    values = draft.values
    for name in values:
        if BY_NAME[name].inert and draft.given(name):
            label = BY_NAME[name].env if draft.provenance[name] == "env" else draft.label(name)
            draft.notes.append(f"{label} has no effect: {BY_NAME[name].inert}")
    asked = [name for name in ("eval_steps", "eval_strategy") if draft.given(name)]
    if values["eval_dataset"] and draft.verb in TRAIN:
        asked = []
    if asked and values["eval_strategy"] != "no" and not values["val_dataset"] and not values["split_dataset_ratio"]:
        draft.notes.append(
            f"--{asked[0]} {values[asked[0]]}: nothing to evaluate on; add --split_dataset_ratio 0.01 or --val_dataset"
        )


def read_args_json(directory: Path) -> dict[str, Any]:
    """The parsed ``args.json`` of a run, checkpoint or exported directory; UserError if there is none."""
    path = directory / "args.json"
    if not path.is_file():
        raise usage_error(f"{path}: no such file; is {directory} the directory of a run?")
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
