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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

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
    base = door.describe(run.model if asked.mcore_model is None else replace(run.model, model=asked.mcore_model))
    options = options_of(run, base) if asked.to_mcore else None
    if run.dry_run:
        return _planned(run, out)
    with export.appearing(out, PRODUCT) as aside:
        if not (run.model.adapters or asked.mcore_adapters):
            _convert(run, base, aside, options)
        else:
            with TemporaryDirectory(prefix=".adapter-", dir=aside) as folder:
                (_convert_adapter if _kept(run) else _merge)(run, base, aside, options, Path(folder))
        write_json(aside / export.ARGS_FILE, export.args_of(run, base.location))
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
    options = Options(dialect="lm", format=asked.mcore_format, ranks=ranks, dtype=export.asked_dtype(run))
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


def _convert(run: Run, source: door.Source, out: Path, options: Options | None) -> None:
    """Write a model: for Megatron as ``options`` say, or for everybody else (None)."""
    account = _to_hf(run, source, out) if options is None else _to_mcore(source, out, options)
    _tell(account)
    export.limit_processor(out, run, source.geometry)
    if run.convert.test_convert_precision:
        types = {entry.dtype for entry in source.checkpoint.entries.values()}
        asked = export.asked_dtype(run)
        exact = not account.rounded and (asked is None or types == {asked})
        _compare(run, source, out, precision.EXACT if exact else precision.ROUNDED)


def _merge(run: Run, base: door.Source, out: Path, options: Options | None, folder: Path) -> None:
    """Write ``base`` with the adapter added in; the empty ``folder`` takes what is needed on the way."""
    adapter = _as_peft(run, base, folder / "adapter")
    model = replace(run.model, adapters=(str(adapter),))
    merging = replace(run, model=model, export=replace(run.export, merge_lora=True))
    if options is None:
        export.fill(merging, base, out)
    else:
        (folder / "merged").mkdir()
        export.fill(merging, base, folder / "merged")
        _tell(_to_mcore(door.read(folder / "merged"), out, options))
    if run.convert.test_convert_precision:
        _compare(run, base, out, precision.ROUNDED, adapter)


def _convert_adapter(run: Run, base: door.Source, out: Path, options: Options | None, folder: Path) -> None:
    """Write an adapter as one: for Megatron as ``options`` say, or in peft's format (None)."""
    if options is not None:
        adapter = _as_peft(run, base, folder / "adapter")
        pairs = adapters.to_megatron(adapter, base.family, base.config, out, options)
    elif run.model.adapters:
        raise UserError(f"--adapters {run.model.adapters[0]}: is in peft's format already; drop --merge_lora false")
    else:
        pairs = _to_peft(run, base, out)
    print(f"wrote an adapter of {pairs} layers", flush=True)
    if run.convert.test_convert_precision:
        print("not compared: the precision of a model is tested, which an adapter is not", flush=True)


def _as_peft(run: Run, base: door.Source, folder: Path) -> Path:
    """The adapter in peft's format: where it is, or in the new directory ``folder`` if it is a Megatron one."""
    if run.model.adapters:
        return Path(run.model.adapters[0])
    folder.mkdir()
    _to_peft(run, base, folder)
    return folder


def _to_peft(run: Run, base: door.Source, out: Path) -> int:
    path, dialect = Path(run.convert.mcore_adapters[0]), run.convert.mcore_dialect or "swift"
    return adapters.to_peft(path, base.family, base.config, out, dialect=dialect, base_model=str(base.location))


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
        dtype=export.asked_dtype(run),
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


def _to_mcore(source: door.Source, out: Path, options: Options) -> convert.Account:
    family, config = source.family, source.config
    if isinstance(source.checkpoint, OurNames):
        account = convert.reshard(source.checkpoint.assembled, family, config, out, options)
        hf.copy_side_files(source.path, out, options.dtype)
        layout = source.location / convert.LAYOUT
        if layout.is_file():
            shutil.copyfile(layout, out / convert.LAYOUT)
        return account
    held = convert.from_hf(source.checkpoint, family, config)
    account = convert.to_megatron(held, family, config, out, options)
    convert.write_side_files(source.checkpoint, out, options.dtype)
    return account


def _to_hf(run: Run, source: door.Source, out: Path) -> convert.Account:
    assert isinstance(source.checkpoint, OurNames), "config.convert lets --to_hf have a Megatron source only"
    held, dtype = convert.from_megatron(source.checkpoint.assembled), export.asked_dtype(run)
    layout = source.location if (source.location / convert.LAYOUT).is_file() else source.path
    shards = run.save.max_shard_size
    account = convert.to_hf(held, source.family, source.config, out, layout=layout, dtype=dtype, max_shard_size=shards)
    hf.copy_side_files(source.path, out, dtype)
    return account


def _tell(account: convert.Account) -> None:
    names = f" ({account.dialect})" if account.dialect else ""
    print(f"wrote {account.tensors} tensors{names}, {account.parameters:,} parameters", flush=True)
    if account.rounded:
        print(f"rounded to the type they are written in: {', '.join(account.rounded)}", flush=True)
    if account.left_out:
        print(f"left out, as the model has no use for them: {', '.join(account.left_out)}", flush=True)


def _compare(run: Run, source: door.Source, made: Path, limit: float, adapter: Path | None = None) -> None:
    """Both sides on one sample, ``adapter`` beside the weights of ``source``; UserError if they differ by more."""
    other = door.read_mcore(made) if run.convert.to_mcore else door.read(made)
    precision.check(source, other, dtype=dtype_of(run.convert.test_convert_dtype), limit=limit, adapter=adapter)


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
