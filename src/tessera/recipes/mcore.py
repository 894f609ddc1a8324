"""Megatron's checkpoints in the workflow: conversions one asks for, and runs that keep theirs in that format.

Nothing has to be converted to train: a Megatron directory is read as it is, each rank its own slices. Conversion is for
the other tools of a workflow::

    export --model HF --to_mcore true               written for any number of tensor, pipeline and expert ranks
    export --mcore_model DIR --to_hf true           with the names, shards and types of the directory it once came from
    export --mcore_model DIR --to_mcore true        other ranks, another format, another dialect of names
    megatron sft --load DIR --save OUT              each checkpoint-N of the run is kept as OUT/iter_N, too

Weights stream from file to file (``weights/megatron``), so memory does not grow with the model. With
``--test_convert_precision true`` both sides run on one sample (``recipes/precision.py``) before the result gets its
name. Whatever goes wrong, nothing lies under that name.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tessera.checkpoint import open as door
from tessera.checkpoint.store import write_json
from tessera.config.errors import UserError
from tessera.config.run import ConvertArgs, Run
from tessera.contract.model import dtype_of
from tessera.parallel.mesh import Mesh
from tessera.recipes import export, precision
from tessera.weights import hf
from tessera.weights.megatron import convert
from tessera.weights.megatron.checkpoint import LEGACY, TRACKER, locate
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
    with source_of(run) as source:
        if asked.to_mcore:
            options_of(run, source)  # asked for before anything is written
        if run.dry_run:
            print(f"would convert {asked.describe()} -> {out}", flush=True)
            return out
        with export.appearing(out, PRODUCT) as aside:
            account = _to_mcore(run, source, aside) if asked.to_mcore else _to_hf(run, source, aside)
            write_json(aside / export.ARGS_FILE, export.args_of(run, source.location))
            _tell(account)
            if asked.test_convert_precision:
                _compare(run, source, aside)
    print(f"converted to {out}", flush=True)
    return out


@contextmanager
def source_of(run: Run) -> Iterator[door.Source]:
    """What is converted; an adapter is merged into a directory of its own first, which goes away afterwards."""
    asked = run.convert
    if asked.mcore_model is not None:
        yield door.read_mcore(Path(asked.mcore_model), run.model.hf_dir)
    elif run.model.adapters:
        with TemporaryDirectory(prefix=".merging-", dir=Path(run.save.output_dir).resolve().parent) as folder:
            merged = Path(folder) / "merged"
            kept = replace(asked, to_mcore=False, to_hf=False)
            ours = replace(run.export, merge_lora=True), replace(run.save, output_dir=str(merged))
            export.write(replace(run, convert=kept, export=ours[0], save=ours[1]))
            yield door.read(merged)
    else:
        yield door.describe(run.model)


def options_of(run: Run, source: door.Source) -> convert.Options:
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
    options = convert.Options(
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
    table = table.for_ranks(ranks.tp, convert.vocabulary(table, options))
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
    if asked.mcore_model is not None:
        return locate(Path(asked.mcore_model)).assembled(source.family, source.config).table.dialect
    return "swift" if "swift" in known else known[0]


def _dtype(run: Run) -> torch.dtype | None:
    name = run.model.torch_dtype
    return dtype_of(name) if name and run.provenance["torch_dtype"] in ("flag", "yaml", "env") else None


def _to_mcore(run: Run, source: door.Source, out: Path) -> convert.Account:
    options, asked = options_of(run, source), run.convert
    if asked.mcore_model is not None:
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

    run_dir: Path
    options: convert.Options

    def write(self, checkpoint: Path, step: int) -> None:
        """Convert the model in ``checkpoint``; an iteration of that number from before goes."""
        self.retire(step)
        source = door.read(checkpoint)
        held = convert.from_hf(source.checkpoint, source.family, source.config)
        convert.write_side_files(source.checkpoint, self.run_dir)
        options = replace(self.options, iteration=step)
        convert.to_megatron(held, source.family, source.config, self.run_dir, options)

    def retire(self, step: int) -> None:
        """Delete ``iter_N``."""
        shutil.rmtree(self.run_dir / f"iter_{step:07d}", ignore_errors=True)


def mirror_of(run: Run, source: door.Source, run_dir: Path, mesh: Mesh) -> RunMirror | None:
    """What keeps this run's checkpoints in Megatron's format too; None if nobody asked for it.

    Adapters stay in PEFT's format, which ``export --mcore_adapters`` reads. UserError if the model cannot be divided
    as the files by rank of ``--mcore_format torch`` would be, which is as the run's own ranks divide it.
    """
    if run.save.save_format != "mcore" or run.adapt.train_type != "full":
        return None
    asked, layout = run.convert, mesh.layout
    dialect = dialect_of(replace(asked, mcore_model=None), source)
    if asked.mcore_dialect is None and source.origin is None:
        dialect = locate(source.location).assembled(source.family, source.config).table.dialect
    ranks = Ranks(layout.tp, layout.pp, layout.ep) if asked.mcore_format == LEGACY else Ranks()
    stacked = None if asked.mcore_layer_layout is None else asked.mcore_layer_layout == "stacked"
    options = convert.Options(dialect=dialect, format=asked.mcore_format, stacked=stacked, ranks=ranks)
    ranks.check(make_table(source.family, source.config, dialect).for_ranks(ranks.tp, None))
    return RunMirror(run_dir, options)
