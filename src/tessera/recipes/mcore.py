"""Megatron's checkpoints in the workflow: conversions one asks for, and runs that keep theirs in that format.

Nothing has to be converted to train: a Megatron directory is read as it is, each rank its own slices. Conversion is for
the other tools of a workflow::

    export --model HF --to_mcore true               written for any number of tensor, pipeline and expert ranks
    export --mcore_model DIR --to_hf true           with the names, shards and types of the directory it once came from
    export --mcore_model DIR --to_mcore true        other ranks, another format, another dialect of names
    export --mcore_model LM --mcore_vision_model V  two checkpoints by rank become one, as Megatron-LM's example does
    export --mcore_adapters DIR --to_hf true        with the adapter added in, or as peft's files (--merge_lora false)
    megatron sft --load DIR --save OUT              each checkpoint-N of the run is kept as OUT/iter_N, too

Weights stream from file to file (``weights/megatron``), so memory does not grow with the model. With
``--test_convert_precision true`` both sides run on one sample (``recipes/precision.py``) before the result gets its
name. Whatever goes wrong, nothing lies under that name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tessera.checkpoint import open as door
from tessera.checkpoint.store import write_json
from tessera.config.errors import UserError
from tessera.config.run import ConvertArgs, Run
from tessera.config.sources import TRACKER
from tessera.contract.layout import ParallelLayout
from tessera.contract.model import dtype_of
from tessera.models.families import FAMILIES
from tessera.recipes import export, precision
from tessera.weights import hf
from tessera.weights.megatron import adapters, convert, parts
from tessera.weights.megatron.checkpoint import LEGACY, OurNames, locate
from tessera.weights.megatron.options import Options, vocabulary
from tessera.weights.megatron.ranks import Ranks
from tessera.weights.megatron.towers import dialects_of, make_table

PRODUCT = (*export.PRODUCT, convert.LAYOUT, TRACKER, "iter_*", "release")
"""Name patterns of what a conversion to Megatron writes."""


def main(run: Run) -> Path:
    """Convert as ``run.convert`` says; the directory that was written (that would be, in a dry run)."""
    out, asked = Path(run.save.output_dir), run.convert
    inputs = [run.model.model, asked.mcore_model, asked.mcore_vision_model, *asked.mcore_adapters, *run.model.adapters]
    if out.resolve() in {Path(name).resolve() for name in inputs if name}:
        raise UserError(f"--output_dir {out}: is what is being converted; choose another directory")
    export.check_free(out, exist_ok=run.export.exist_ok)
    for by_name in (_combined, _tower, _repipelined):
        write = by_name(run)
        if write is not None:
            return _by_name(run, out, write)
    with source_of(run) as source:
        if asked.to_mcore:
            options_of(run, source)  # asked for before anything is written
        if run.dry_run:
            return _planned(run, out)
        with export.appearing(out, PRODUCT) as aside:
            if _kept(run):
                _convert_adapter(run, source, aside)
            else:
                _tell(_to_mcore(run, source, aside) if asked.to_mcore else _to_hf(run, source, aside))
                if asked.test_convert_precision:
                    _compare(run, source, aside)
            write_json(aside / export.ARGS_FILE, export.args_of(run, source.location))
    print(f"converted to {out}", flush=True)
    return out


def _planned(run: Run, out: Path) -> Path:
    print(f"would convert {run.convert.describe()} -> {out}", flush=True)
    return out


def _by_name(run: Run, out: Path, write: Callable[[Path], str]) -> Path:
    """Conversions that need no model's configuration: ``write`` does it and says what."""
    if run.convert.test_convert_precision:
        raise UserError("--test_convert_precision true: needs a whole model with its config.json; leave it out here")
    if run.dry_run:
        return _planned(run, out)
    with export.appearing(out, PRODUCT) as aside:
        print(write(aside), flush=True)
        if run.model.hf_dir is not None:
            hf.copy_side_files(door.locate(run.model.hf_dir, "--hf_dir"), aside)
    print(f"converted to {out}", flush=True)
    return out


def _combined(run: Run) -> Callable[[Path], str] | None:
    """A language model and a tower, each converted for itself, as one checkpoint; the projection is yet to be made."""
    asked = run.convert
    if asked.mcore_vision_model is None:
        return None
    if not asked.to_mcore or asked.mcore_format != LEGACY:
        raise UserError("--mcore_vision_model: two checkpoints are combined by --to_mcore true --mcore_format torch")
    language, vision = Path(asked.mcore_model or ""), Path(asked.mcore_vision_model)

    def write(out: Path) -> str:
        text, seeing = parts.combine(language, vision, out)
        return f"combined {text} tensors of the language model and {seeing} of the tower on the first stage"

    return write


def _tower(run: Run) -> Callable[[Path], str] | None:
    """A tower alone, in its own repository's names."""
    asked = run.convert
    if not asked.to_mcore or asked.mcore_dialect != "lm" or run.model.model is None or asked.mcore_model is not None:
        return None
    path = door.locate(run.model.model)
    config = door.read_json(path / "config.json", required=True)
    if config.get("model_type") in FAMILIES or "vision_config" in config:
        return None
    checkpoint = hf.Checkpoint(path)
    ranks = Ranks(asked.target_tensor_parallel_size or 1, asked.target_pipeline_parallel_size or 1)
    options = Options(dialect="lm", format=asked.mcore_format, ranks=ranks, dtype=_dtype(run))
    return lambda out: f"wrote {parts.tower_to_megatron(checkpoint, config, out, options)} tensors of a tower"


def _repipelined(run: Run) -> Callable[[Path], str] | None:
    """Files by rank for other pipeline stages, by their names, where no config.json says what model it is."""
    asked = run.convert
    if not asked.to_mcore or asked.mcore_model is None or run.model.hf_dir is not None:
        return None
    found = locate(Path(asked.mcore_model))
    if (found.root / "config.json").is_file():
        return None
    tensor = len({place.name.split("_")[2] for place in found.path.glob("mp_rank_*")})
    same = asked.target_tensor_parallel_size in (None, tensor) and asked.target_expert_parallel_size is None
    if (
        found.format != LEGACY
        or asked.mcore_format != LEGACY
        or not same
        or asked.target_pipeline_parallel_size is None
    ):
        raise UserError(
            f"--mcore_model {asked.mcore_model}: has no config.json; without one only --target_pipeline_parallel_size "
            "of files by rank (--mcore_format torch) can be changed; add --hf_dir DIR, a directory with config.json"
        )
    stages = asked.target_pipeline_parallel_size
    return lambda out: f"wrote {parts.repipeline(found.root, out, stages)} layers for {stages} pipeline stages"


def _kept(run: Run) -> bool:
    """Whether an adapter is converted as one instead of being merged: ``--merge_lora false`` says so."""
    adapted = bool(run.model.adapters or run.convert.mcore_adapters)
    return adapted and not run.export.merge_lora and run.provenance["merge_lora"] != "default"


def _convert_adapter(run: Run, source: door.Source, out: Path) -> None:
    asked = run.convert
    if asked.to_mcore:
        directory = Path(run.model.adapters[0])
        pairs = adapters.to_megatron(directory, source.family, source.config, out, options_of(run, source))
    else:
        path, base = Path(asked.mcore_adapters[0]), str(source.location)
        dialect = asked.mcore_dialect or "swift"
        pairs = adapters.to_peft(path, source.family, source.config, out, dialect=dialect, base_model=base)
    print(f"wrote an adapter of {pairs} layers", flush=True)


@contextmanager
def source_of(run: Run) -> Iterator[door.Source]:
    """What is converted; an adapter is merged into a directory of its own first, which goes away afterwards."""
    asked = run.convert
    base = run.model if asked.mcore_model is None else replace(run.model, model=asked.mcore_model)
    adapted = run.model.adapters or asked.mcore_adapters
    if not adapted or _kept(run):
        yield door.describe(replace(base, max_pixels=None, min_pixels=None, max_num=None, use_tiling=None))
        return
    with TemporaryDirectory(prefix=".merging-", dir=Path(run.save.output_dir).resolve().parent) as folder:
        adapter, merged = Path(adapted[0]), Path(folder) / "merged"
        if asked.mcore_adapters:
            adapter = Path(folder) / "adapter"
            adapter.mkdir()
            held = door.describe(base)
            dialect = asked.mcore_dialect or "swift"
            adapters.to_peft(Path(adapted[0]), held.family, held.config, adapter, dialect=dialect)
        ours = replace(run.export, merge_lora=True), replace(run.save, output_dir=str(merged))
        plain = replace(asked, to_mcore=False, to_hf=False)
        models = replace(base, adapters=(str(adapter),))
        export.write(replace(run, model=models, convert=plain, export=ours[0], save=ours[1], dry_run=False))
        yield door.read(merged)


def options_of(run: Run, source: door.Source) -> Options:
    """How the Megatron side is written; UserError if the model cannot be divided so."""
    asked = run.convert
    found = locate(Path(asked.mcore_model)) if asked.mcore_model else None
    before = vars(found.args) if found is not None and found.args is not None else {}

    def size(given: int | None, name: str) -> int:
        return given or int(before.get(f"{name}_model_parallel_size") or 1)

    ranks = Ranks(
        size(asked.target_tensor_parallel_size, "tensor"),
        size(asked.target_pipeline_parallel_size, "pipeline"),
        size(asked.target_expert_parallel_size, "expert"),
    )
    dialect = dialect_of(asked, source)
    options = Options(
        dialect=dialect,
        format=asked.mcore_format,
        stacked=None if asked.mcore_layer_layout is None else asked.mcore_layer_layout == "stacked",
        ranks=ranks,
        padded_vocab_size=asked.padded_vocab_size,
        vocab_divisor=asked.make_vocab_size_divisible_by,
        # The toolkit behind this dialect publishes its conversions as releases, the others as iteration 1.
        iteration=None if dialect == "pai" else 1,
        dtype=_dtype(run),
    )
    table = make_table(source.family, source.config, dialect)
    table = table.for_ranks(ranks.tp, vocabulary(table, options))
    ranks.check(table)
    return options


def dialect_of(asked: ConvertArgs, source: door.Source) -> str:
    """The dialect asked for, else that of a Megatron source, else the model's first."""
    known = dialects_of(source.family)
    if not known:
        raise UserError(f"--to_mcore true: no Megatron toolkit has a layout for model_type {source.family.name!r}")
    if asked.mcore_dialect is not None:
        if asked.mcore_dialect not in known:
            raise UserError(
                f"--mcore_dialect {asked.mcore_dialect}: has no layout for {source.family.name}; "
                f"there are {', '.join(known)}"
            )
        return asked.mcore_dialect
    if isinstance(source.checkpoint, OurNames):
        return source.checkpoint.assembled.table.dialect
    return "swift" if "swift" in known else known[0]


def _dtype(run: Run) -> torch.dtype | None:
    name = run.model.torch_dtype
    return dtype_of(name) if name and run.provenance["torch_dtype"] in ("flag", "yaml", "env") else None


def _to_mcore(run: Run, source: door.Source, out: Path) -> convert.Account:
    options, asked = options_of(run, source), run.convert
    if source.origin is None:
        assert asked.mcore_model is not None
        account = convert.reshard(Path(asked.mcore_model), source.family, source.config, out, options)
        hf.copy_side_files(source.path, out, options.dtype)
        layout = locate(Path(asked.mcore_model)).root / convert.LAYOUT
        if layout.is_file():
            shutil.copyfile(layout, out / convert.LAYOUT)
        return account
    held = convert.from_hf(source.checkpoint, source.family, source.config)
    account = convert.to_megatron(held, source.family, source.config, out, options)
    convert.write_side_files(source.checkpoint, out, options.dtype)
    return account


def _to_hf(run: Run, source: door.Source, out: Path) -> convert.Account:
    """Write ``source`` as a Hugging Face directory: a Megatron checkpoint, or what an adapter was merged into."""
    if source.origin is not None:
        held = convert.from_hf(source.checkpoint, source.family, source.config)
        shards = run.save.max_shard_size
        account = convert.to_hf(held, source.family, source.config, out, layout=source.path, max_shard_size=shards)
        hf.copy_side_files(source.path, out, _dtype(run))
        return account
    path = Path(run.convert.mcore_model or "")
    held = convert.from_megatron(locate(path).assembled(source.family, source.config))
    root = locate(path).root
    layout = root if (root / convert.LAYOUT).is_file() else source.path
    shards = run.save.max_shard_size
    account = convert.to_hf(
        held, source.family, source.config, out, layout=layout, dtype=_dtype(run), max_shard_size=shards
    )
    hf.copy_side_files(source.path, out, _dtype(run))
    export.limit_processor(out, run, source.geometry)
    return account


def _tell(account: convert.Account) -> None:
    names = f" ({account.dialect})" if account.dialect else ""
    print(f"wrote {account.tensors} tensors{names}, {account.parameters:,} parameters", flush=True)
    if account.rounded:
        print(f"rounded to the type they are written in: {', '.join(account.rounded)}", flush=True)
    if account.left_out:
        print(f"left out, as the model has no use for them: {', '.join(account.left_out)}", flush=True)


def _compare(run: Run, source: door.Source, made: Path) -> None:
    """Both sides on one sample; UserError if they differ by more than a change of types explains."""
    other = door.read_mcore(made) if run.convert.to_mcore else door.read(made)
    changed = _dtype(run) not in (None, *{entry.dtype for entry in source.checkpoint.entries.values()})
    mixed = len({entry.dtype for entry in source.checkpoint.entries.values()}) > 1
    limit = precision.ROUNDED if changed or (mixed and _dtype(run) is not None) else precision.EXACT
    precision.check(source, other, dtype=dtype_of(run.convert.test_convert_dtype), limit=limit)


@dataclass(frozen=True, slots=True)
class RunMirror:
    """Keeps the checkpoints of a run as iterations beside them: ``iter_N``, and the tracker that names the newest."""

    options: Options

    @classmethod
    def of(cls, run: Run, source: door.Source, layout: ParallelLayout) -> RunMirror:
        """The one for a run that trains ``source`` on ranks of ``layout``.

        UserError if the model cannot be divided as the files by rank of ``--mcore_format torch`` would be, which is as
        the run's own ranks divide it.
        """
        asked = run.convert
        dialect = dialect_of(asked, source)
        ranks = Ranks(layout.tp, layout.pp, layout.ep) if asked.mcore_format == LEGACY else Ranks()
        stacked = None if asked.mcore_layer_layout is None else asked.mcore_layer_layout == "stacked"
        ranks.check(make_table(source.family, source.config, dialect).for_ranks(ranks.tp, None))
        return cls(Options(dialect=dialect, format=asked.mcore_format, stacked=stacked, ranks=ranks))

    def write(self, checkpoint: Path, step: int) -> None:
        """Convert the model in ``checkpoint``; an iteration of that number from before goes."""
        self.retire(checkpoint, step)
        source, run_dir = door.read(checkpoint), checkpoint.parent
        held = convert.from_hf(source.checkpoint, source.family, source.config)
        convert.write_side_files(source.checkpoint, run_dir)
        convert.to_megatron(held, source.family, source.config, run_dir, replace(self.options, iteration=step))

    def retire(self, checkpoint: Path, step: int) -> None:
        """Delete ``iter_N``, which lies beside ``checkpoint``."""
        shutil.rmtree(checkpoint.parent / f"iter_{step:07d}", ignore_errors=True)
