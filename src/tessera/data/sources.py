"""What ``--dataset`` means: which rows, and how many of them.

    [hf::|ms::]<id or path>[:subset/subset][#N]

At every step the whole text is first tried as a path, so a file may contain ``#`` and ``:``; only then ``#N`` is cut
off from the right, then ``:subset`` from the left. A path is a file (jsonl, json, csv, parquet, txt) or a directory:
one that HF ``datasets`` saved (its splits are subsets), a folder of WebDataset shards, as it is or as Energon prepares
it (its split parts are subsets; ``train`` unless named, ``val`` for ``--val_dataset``), or any directory of such files.
A YAML file is a metadataset: several datasets with weights. Everything else is the id of a dataset on a hub, opened
through the library ``datasets``.

``#N`` draws N rows without replacement with the run's ``data_seed``; more than there are repeats the whole set.
``--split_dataset_ratio`` takes the validation rows from the full set first, so training rows never overlap them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tessera.config.errors import UserError
from tessera.data.shards.folder import SHARD, holds_shards, open_folder, open_plain, prepared, shards_below
from tessera.data.shards.metadataset import is_metadataset, open_blend
from tessera.data.tables import Joined, Rows, Table, open_file, open_saved

_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")
_MORE = (".tar", ".yaml", ".yml")
_SIDECARS = (
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "args.json",
    "README.txt",
    "skipped.jsonl",
)
_OCR = "Using LaTeX to perform OCR on the image."


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One ``--dataset`` argument, taken apart; ``hub`` is ``hf``, ``ms`` or None, ``sample`` the N of ``#N``."""

    text: str
    name: str
    subsets: tuple[str, ...] = ()
    sample: int | None = None
    hub: str | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """A hub dataset whose rows need one more word to be read: all its ``splits``, a question to put to every row."""

    hf_id: str
    splits: tuple[str, ...]
    query: str


KNOWN: Mapping[str, Known] = {
    "AI-ModelScope/LaTeX_OCR": Known("linxy/LaTeX_OCR", ("train", "validation", "test"), _OCR),
    "linxy/LaTeX_OCR": Known("linxy/LaTeX_OCR", ("train", "validation", "test"), _OCR),
}


def parse_dataset_spec(text: str) -> DatasetSpec:
    """``text`` taken apart; paths are tried before ``#`` and ``:`` get their meaning."""
    hub, rest = None, text
    for prefix in ("hf", "ms"):
        if text.startswith(f"{prefix}::"):
            hub, rest = prefix, text[len(prefix) + 2 :]
    sample: int | None = None
    if not os.path.exists(rest) and "#" in rest:
        rest, _, count = rest.rpartition("#")
        if not count.isdigit() or int(count) < 1:
            raise UserError(f"--dataset {text}: #{count} is not a number of rows (write #500 for 500 rows)")
        sample = int(count)
    subsets: tuple[str, ...] = ()
    if not os.path.exists(rest) and ":" in rest:
        rest, _, names = rest.partition(":")
        subsets = tuple(name for name in names.split("/") if name)
    if not rest:
        raise UserError(f"--dataset {text!r}: no dataset named")
    return DatasetSpec(text, rest, subsets, sample, hub)


def leaves(spec: DatasetSpec, part: str = "train") -> list[tuple[Rows, float | None]]:
    """The datasets a spec names, none of them empty, with the rows of each in an epoch where they are blended.

    ``part`` is the split part of prepared folders and metadatasets that is meant where the spec names none.
    """
    path = Path(spec.name).expanduser()
    found: list[tuple[Rows, float | None]] = []
    if spec.hub is None and path.is_file() and is_metadataset(path):
        if len(spec.subsets) > 1:
            raise UserError(f"--dataset {spec.text}: a metadataset is read one split at a time")
        blend = open_blend(path, spec.subsets[0] if spec.subsets else part, open_file)
        epoch = sum(leaf.share for leaf in blend)
        scale = spec.sample / epoch if spec.sample and epoch else 1.0
        found += [(leaf.rows, leaf.share * scale) for leaf in blend]
    else:
        found.append((open_rows(spec, part), None))
    if not found or not all(len(rows) for rows, _ in found):
        name = next((f" {rows.name}" for rows, _ in found if rows.name != spec.name), "")
        raise UserError(f"--dataset {spec.text}: the dataset{name} is empty")
    return found


def open_rows(spec: DatasetSpec, part: str = "train") -> Rows:
    """The rows a spec names, before sampling; ``part`` is the split part of a prepared folder if it names none."""
    path = Path(spec.name).expanduser()
    if spec.hub is None and path.is_file():
        if spec.subsets:
            raise UserError(f"--dataset {spec.text}: the file {path} has no subsets")
        return open_plain(path, f"--dataset {spec.text}") if path.suffix == SHARD else open_file(path)
    if spec.hub is None and path.is_dir() and holds_shards(path):
        if prepared(path) is not None or not spec.subsets:
            return open_folder(path, spec.subsets, f"--dataset {spec.text}", part)
    if spec.hub is None and path.is_dir():
        rows, known = _directory(path, spec), KNOWN.get("/".join(path.parts[-2:]))
        return Asked(rows, known.query) if known else rows
    if spec.hub is None and _meant_as_path(spec.name):
        raise UserError(f"--dataset {spec.text}: no such file or directory: {spec.name}")
    return _hub(spec)


def sample_rows(count: int, wanted: int | None, rng: np.random.RandomState, *, shuffle: bool) -> np.ndarray:
    """Indices ``[wanted] int64`` into ``count`` rows: all of them as often as they fit, then a random rest."""
    if wanted is None:
        return np.arange(count, dtype=np.int64)
    assert count > 0
    repeats, rest = divmod(wanted, count)
    parts = [np.tile(np.arange(count, dtype=np.int64), repeats)]
    if rest:
        parts.append((rng.permutation(count) if shuffle else np.arange(count))[:rest])
    return np.concatenate(parts).astype(np.int64)


def split_rows(
    count: int, wanted: int | None, ratio: float, rng: np.random.RandomState, *, shuffle: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) indices of one dataset of ``count`` rows under ``#wanted`` and ``--split_dataset_ratio``.

    The validation rows, ``max(int(min(count, wanted) * ratio), 1)`` of them, come from the full set; training then
    draws the rest of ``wanted`` from the other rows, repeating them if there are too few.
    """
    if ratio <= 0 or count < 2:
        return sample_rows(count, wanted, rng, shuffle=shuffle), np.empty(0, np.int64)
    whole = count if wanted is None else min(count, wanted)
    held = min(max(int(whole * ratio), 1), count - 1)
    order = rng.permutation(count) if shuffle else np.r_[count - held : count, : count - held]
    validation, others = np.sort(order[:held]).astype(np.int64), np.sort(order[held:]).astype(np.int64)
    left = None if wanted is None else max(wanted - held, 1)
    return others[sample_rows(len(others), left, rng, shuffle=shuffle)], validation


def _meant_as_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((*_FILES, *_MORE)) or name.count("/") > 1


def _directory(path: Path, spec: DatasetSpec) -> Rows:
    """A directory: saved by HF ``datasets``, with or without splits, or a folder of files."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        chosen = _chosen(spec, splits)
        return Joined(str(path), [open_saved(path / split) for split in chosen])
    if spec.subsets:
        chosen = _chosen(spec, sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        return Joined(str(path), [_directory(path / name, DatasetSpec(spec.text, str(path / name))) for name in chosen])
    if (path / "state.json").is_file():
        return open_saved(path)
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _FILES and f.name not in _SIDECARS)
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    structured = [file for file in files if file.suffix.lower() != ".txt"]
    if not structured and shards_below(path):
        return open_plain(path, f"--dataset {spec.text}")
    if not files:
        raise UserError(f"--dataset {spec.text}: no .tar, .jsonl, .json, .csv, .parquet or .txt file in {path}")
    parts = [open_file(file) for file in structured or files]
    return parts[0] if len(parts) == 1 else Joined(str(path), parts)


def _chosen(spec: DatasetSpec, known: list[str]) -> list[str]:
    """The subsets asked for; with none asked for the only one, else ``default``, else ``train``."""
    if spec.subsets == ("all",):
        return known
    if not spec.subsets:
        if len(known) == 1:
            return known
        for name in ("default", "train"):
            if name in known:
                return [name]
        raise UserError(f"--dataset {spec.text}: choose a subset, e.g. {spec.name}:{known[0]} (has {', '.join(known)})")
    unknown = [name for name in spec.subsets if name not in known]
    if unknown:
        raise UserError(f"--dataset {spec.text}: no subset {unknown[0]!r} (has {', '.join(known) or 'none'})")
    return list(spec.subsets)


class Asked:
    """Rows of a known dataset, from a hub or from a clone of it, with the fixed question put to each."""

    def __init__(self, rows: Rows, query: str) -> None:
        self.name, self.base, self._rows, self._query = rows.name, rows.base, rows, query

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        return row if "messages" in row else {"query": self._query, **row}


def _hub(spec: DatasetSpec) -> Rows:
    """A dataset from a hub, through ``datasets`` (its cache works without a network)."""
    if spec.hub == "ms":
        raise UserError(
            f"--dataset {spec.text}: ModelScope ids are not fetched; download it and give the path, or use hf::"
        )
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"--dataset {spec.text}: no such path, and hub ids need `pip install datasets`")
    import datasets

    known = KNOWN.get(spec.name)
    name = known.hf_id if known else spec.name
    splits = known.splits if known else ("train",)
    parts: list[Rows] = []
    for subset in spec.subsets or (None,):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = datasets.load_dataset(name, subset)
        except Exception as error:  # noqa: BLE001 - the library raises whatever its transport raises
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            raise UserError(
                f"--dataset {spec.text}: {name} is neither a local path nor could it be loaded from the hub ({reason})"
            ) from None
        found = [split for split in splits if split in loaded] or list(loaded)
        parts += [Table(spec.name, None, loaded[split].data.table) for split in found]
    rows = Joined(spec.name, parts)
    return Asked(rows, known.query) if known else rows
