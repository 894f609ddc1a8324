"""``tessera export``: a directory that any tool can load, from an adapter or a model, and its upload.

    --adapters CKPT --merge_lora true       base model + adapter -> CKPT-merged
    --model DIR --torch_dtype bfloat16      the same model in another dtype -> DIR-export
    --push_to_hub true ...                  the directory made here; an unmerged adapter or an unchanged model as it is

What is written is complete: weights under the names, shards and dtypes of the base model, config, tokenizer,
processor, chat template, and the ``args.json`` of the training, so that ``infer --load_data_args true`` works on it.
The pixel limits of training go into the processor's config, because whoever loads the model with another tool would
otherwise show it images of another size than it has learnt from.

The adapter is added in float32 and rounded once, to the dtype that is written; one tensor is held at a time, so the
model may be larger than the memory. Everything is written into a hidden directory that gets its name at the very end:
an export that is interrupted leaves nothing that looks like one.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.adapt.merging import Merged
from tessera.checkpoint import open as door
from tessera.checkpoint.store import write_json
from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.contract.model import Geometry, dtype_of
from tessera.contract.shards import Part, boxes
from tessera.infer.session import renaming
from tessera.weights import hf, hub
from tessera.weights.saving import Saving

ARGS_FILE = "args.json"
LIMITS = ("max_pixels", "min_pixels", "max_num", "use_tiling")
"""Flags that say how an image is shown."""
REGION = 2**20
"""Elements of a tensor that are merged at a time: few enough to stay in the processor's cache."""
PRODUCT = (*hf.SIDE_FILES, "*.safetensors", "*.safetensors.index.json", ARGS_FILE)
"""Name patterns of what an export writes."""


def main(run: Run, *, endpoint: str | None = None) -> Path:
    """Export as ``run`` says; the directory that was written, or the one pushed as it is.

    ``endpoint`` names another hub than the public one.
    """
    directory = converted(run) if run.convert.asked else _unchanged(run)
    if directory is None:
        directory = write(run)
        print(f"{'would write' if run.dry_run else 'exported to'} {directory}", flush=True)
    if run.export.push_to_hub and not run.dry_run:
        assert run.export.hub_model_id is not None, "checked by config.resolve"
        url = hub.push(
            directory,
            run.export.hub_model_id,
            token=run.export.hub_token,
            private=run.export.hub_private_repo,
            endpoint=endpoint,
        )
        print(f"pushed to {url}", flush=True)
    return directory


def converted(run: Run) -> Path:
    """The directory that a conversion from or to Megatron made."""
    from tessera.recipes import mcore

    return mcore.main(run)


def write(run: Run) -> Path:
    """Load, merge if asked to, and write the model; returns ``--output_dir``."""
    source = door.describe(run.model)
    out = Path(run.save.output_dir)
    inputs = {source.location.resolve(), *(Path(adapter).resolve() for adapter in run.model.adapters)}
    if out.resolve() in inputs:
        raise UserError(f"--output_dir {out}: is what is being exported; choose another directory")
    # Checked before any weight is read: merging may take minutes.
    check_free(out, exist_ok=run.export.exist_ok)
    if run.dry_run:
        return out
    with appearing(out) as aside:
        fill(run, source, aside)
        write_json(aside / ARGS_FILE, args_of(run, source.location))
    return out


def fill(run: Run, source: door.Source, folder: Path) -> None:
    """Write the model of ``source``, with the adapter added in if asked, and its side files into ``folder``."""
    dtype = asked_dtype(run)
    shapes, read = tensors_of(run, source)
    resharded = _asked(run, "max_shard_size") or source.origin is None
    entries, to_disk = source.checkpoint.entries, source.weightmap.to_disk
    tensors = {name: (entries[to_disk(name)].dtype, shape) for name, shape in shapes.items()}
    origin, limit = None if resharded else source.origin, run.save.max_shard_size
    saving = Saving.planned(tensors, source.disk_names, origin=origin, dtype=dtype, max_shard_size=limit)
    saving.write(folder, partial(_regions, shapes, read), at_once=True)
    if resharded:
        hf.copy_side_files(source.path, folder, dtype)
    limit_processor(folder, run, source.geometry)


def tensors_of(run: Run, source: door.Source) -> tuple[dict[str, tuple[int, ...]], Callable[[str, Part], Tensor]]:
    """The shapes of the model's tensors by our names, and what gives regions of them, the adapter added in if asked.

    Nothing is held: the model may be larger than the memory.
    """
    with torch.device("meta"):
        module = source.family.build(source.config)
    shapes = hf.shapes_of(module)
    read = hf.reader(source.checkpoint, source.weightmap, shapes)
    if not run.export.merge_lora:
        return shapes, read
    directory, rename = run.model.adapters[0], renaming(source, module)
    merged = Merged.of(module, directory, source.plan.groups, read, rename)
    print(f"merging {merged.adapted} adapted layers of {directory} into {source.location}", flush=True)
    return shapes, merged.region


def _regions(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str, Part], Tensor], name: str
) -> Iterator[tuple[Part, Tensor]]:
    """All of a tensor, some rows at a time."""
    for part in boxes(shapes[name], max(REGION, *shapes[name][-1:])):
        yield part, read(name, part)


def limit_processor(directory: Path, run: Run, geometry: Geometry) -> None:
    """Write the run's limits of images, if it has any, into the configs in ``directory``."""
    if all(getattr(run.model, name) is None for name in LIMITS):
        return
    for name, kind, inner in (
        ("config.json", "config.json", None),
        ("preprocessor_config.json", "preprocessor_config.json", None),
        ("processor_config.json", "preprocessor_config.json", "image_processor"),
    ):
        whole = door.read_json(directory / name)
        part = whole if inner is None else whole.get(inner)
        if part:
            stored = geometry.stored(kind, part)
            if stored != part:
                write_json(directory / name, stored if inner is None else {**whole, inner: stored})


@contextmanager
def appearing(final: Path, product: Sequence[str] = PRODUCT) -> Iterator[Path]:
    """A hidden directory to write into; renamed to ``final`` at the end, removed if anything goes wrong.

    What was there before steps aside for it; entries of the old one that are no ``product`` (name patterns) are kept.
    """
    aside = final.with_name(f".writing-{final.name}")
    old = final.with_name(f".writing-{final.name}-old")
    try:
        for left_over in (aside, old):
            shutil.rmtree(left_over, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        if final.exists():
            final.rename(old)
        aside.rename(final)
    except OSError as error:
        if old.exists() and not final.exists():
            old.rename(final)
        raise UserError(f"--output_dir {final}: writing failed: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        for entry in old.iterdir():
            if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in product):
                entry.rename(final / entry.name)
        shutil.rmtree(old)


def _unchanged(run: Run) -> Path | None:
    """The directory to push as it is, None if one has to be written."""
    if len(run.model.adapters) > 1:
        raise UserError(f"--adapters: one adapter is exported at a time, got {len(run.model.adapters)}")
    if run.export.merge_lora:
        return None
    if run.model.adapters:
        if not run.export.push_to_hub:
            raise UserError("tessera export --adapters: nothing to do; add --merge_lora true or --push_to_hub true")
        return Path(run.model.adapters[0])
    changed = any(_asked(run, name) for name in ("output_dir", "torch_dtype", "max_shard_size", *LIMITS))
    return None if changed or not run.export.push_to_hub else door.locate(run.model.model or "")


def _asked(run: Run, flag: str) -> bool:
    """Whether the user set ``flag`` for this export, rather than training, long ago."""
    return run.provenance[flag] in ("flag", "yaml", "env")


def asked_dtype(run: Run) -> torch.dtype | None:
    """The type that the user wants written; None: each tensor's own."""
    return dtype_of(run.model.torch_dtype) if _asked(run, "torch_dtype") and run.model.torch_dtype else None


def check_free(out: Path, *, exist_ok: bool) -> None:
    """UserError unless ``out`` may be written: new, empty, or a model directory that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not exist_ok:
        raise UserError(f"--output_dir {out}: exists already; choose another or add --exist_ok true")
    if not (out / "config.json").is_file():
        raise UserError(f"--output_dir {out}: exists and is no exported model (no config.json); choose another")


def args_of(run: Run, model: Path) -> Mapping[str, Any]:
    """The training's ``args.json``, without its adapters; that of this command if there was no training."""
    for directory in (*(Path(adapter) for adapter in run.model.adapters), model):
        if (directory / ARGS_FILE).is_file():
            stored: dict[str, Any] = json.loads((directory / ARGS_FILE).read_text(encoding="utf-8"))
            limits = {name: getattr(run.model, name) for name in LIMITS}
            return {**stored, **limits, "adapters": [], "hub_token": None}
    return run.to_json()


def _flush(root: Path) -> None:
    """fsync every file below ``root``, and the directories."""
    for directory, _, files in os.walk(root, topdown=False):
        for path in (*(Path(directory, name) for name in files), Path(directory)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
