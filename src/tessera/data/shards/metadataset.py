"""Several datasets blended by weights: Energon's metadataset files.

    __module__: megatron.energon
    __class__: MetadatasetV2
    splits:
      train:
        blend:                                    proportions of what is seen
          - {weight: 3, path: ./captions}
          - {weight: 1, path: ./documents, subset: {range: [0%, 80%]}}
      val:
        path: ./captions

``blend_epochized`` with ``repetitions`` says how often each row is seen instead; the older form lists ``datasets``
where this one has ``blend``. A path is relative to the file and leads to a folder of shards, to a file of rows, or to
another metadataset, whose weights multiply. An epoch of a blend shows as many rows as its datasets hold together, an
epoch of ``blend_epochized`` exactly what its repetitions say. In validation every row is seen once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.data.shards.folder import open_folder, prepared, read_meta, read_yaml
from tessera.data.shards.rows import Samples
from tessera.data.tables import Rows, place_of

OpenFile = Callable[[Path], Rows]
"""How a file of rows is opened."""

_DEEPEST = 16
_KNOWN = ("path", "split_part", "subset", "weight", "repetitions", "blend", "blend_epochized", "datasets")
_HINTS = ("subflavor", "subflavors", "shuffle_over_epochs_multiplier", "dataset_config", "split_config")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A dataset of a blend and how many of its rows an epoch shows."""

    rows: Rows
    share: float


class Slab:
    """Consecutive rows [first, last) of others."""

    def __init__(self, rows: Rows, first: int, last: int) -> None:
        self.name, self.base = f"{rows.name}[{first}:{last}]", rows.base
        self._rows, self._first, self._last = rows, first, last

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[self._first + index]

    def place(self, index: int) -> str:
        """Where the row lies."""
        return place_of(self._rows, self._first + index)


def is_metadataset(path: Path) -> bool:
    """Whether ``path`` is a file that this module reads."""
    return path.suffix.lower() in (".yaml", ".yml")


def open_blend(path: Path, part: str, open_file: OpenFile) -> list[Leaf]:
    """The datasets that the metadataset file ``path`` blends for the split ``part`` (``all``: for each of them)."""
    splits = read_yaml(path).get("splits")
    parts = list(splits) if part == "all" and isinstance(splits, dict) else [part]
    leaves = [leaf for name in parts for leaf in _metadataset(path, name, open_file, ())]
    return [leaf for leaf in leaves if leaf.share > 0]


def _metadataset(path: Path, part: str, open_file: OpenFile, above: tuple[Path, ...]) -> list[Leaf]:
    if path.resolve() in above or len(above) > _DEEPEST:
        raise UserError(f"--dataset {path}: the metadataset refers to itself")
    splits = read_yaml(path).get("splits")
    if not isinstance(splits, dict) or not splits:
        raise UserError(f"--dataset {path}: no splits in it; a metadataset maps train and val to datasets")
    if part not in splits:
        raise UserError(f"--dataset {path}: no split {part!r} (has {', '.join(map(str, splits))})")
    return _node(splits[part], path, part, open_file, (*above, path.resolve()))


def _node(node: Any, file: Path, part: str, open_file: OpenFile, above: tuple[Path, ...]) -> list[Leaf]:
    """The leaves below one entry, with shares of their own epoch."""
    if not isinstance(node, dict):
        raise UserError(f"--dataset {file}: an entry must be a mapping with a path or a blend, not {node!r}")
    for name in node:
        if name not in (*_KNOWN, *_HINTS, "__module__", "__class__"):
            raise UserError(f"--dataset {file}: {name} is not supported (known: {', '.join(_KNOWN)})")
    kinds = [name for name in ("path", "blend", "blend_epochized", "datasets") if name in node]
    if len(kinds) != 1:
        raise UserError(f"--dataset {file}: an entry needs exactly one of path, blend and blend_epochized")
    if kinds[0] == "path":
        leaves = _reference(node, file, part, open_file, above)
    else:
        leaves = _blend(node[kinds[0]], kinds[0] == "blend_epochized", file, part, open_file, above)
    return _subset(leaves, node.get("subset"), file)


def _blend(
    entries: Any, epochized: bool, file: Path, part: str, open_file: OpenFile, above: tuple[Path, ...]
) -> list[Leaf]:
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--dataset {file}: a blend is a list of datasets")
    name = "repetitions" if epochized else "weight"
    weights = [_positive(entry.get(name, 1.0) if isinstance(entry, dict) else 1.0, name, file) for entry in entries]
    children = [_node(entry, file, part, open_file, above) for entry in entries]
    if epochized:
        return [_scaled(leaf, times) for leaves, times in zip(children, weights, strict=True) for leaf in leaves]
    if sum(weights) <= 0:
        raise UserError(f"--dataset {file}: the weights of a blend add up to nothing")
    epochs = [sum(leaf.share for leaf in leaves) for leaves in children]
    rows = sum(epochs)
    out: list[Leaf] = []
    for leaves, weight, epoch in zip(children, weights, epochs, strict=True):
        factor = rows * weight / sum(weights) / epoch if epoch else 0.0
        out += [_scaled(leaf, factor) for leaf in leaves]
    return out


def _reference(
    node: Mapping[str, Any], file: Path, part: str, open_file: OpenFile, above: tuple[Path, ...]
) -> list[Leaf]:
    """A dataset by its path, relative to the file that names it."""
    text, part = str(node["path"]), str(node.get("split_part") or part)
    text = text.removeprefix("filesystem://")
    if "://" in text:
        raise UserError(f"--dataset {file}: {text} is not on this machine; copy it and write the local path")
    path = file.parent / Path(text).expanduser()
    label = f"--dataset {file}: {text}"
    if is_metadataset(path) and path.is_file():
        return _metadataset(path, part, open_file, above)
    if path.is_file():
        rows = open_file(path)
    elif path.is_dir() and prepared(path) is not None and (node.get("dataset_config") or node.get("split_config")):
        rows = _configured(path, part, node, label)
    elif path.is_dir():
        rows = open_folder(path, (part,), label)
    else:
        raise UserError(f"{label}: no such file or directory ({path})")
    return [Leaf(rows, float(len(rows)))]


def _configured(path: Path, part: str, node: Mapping[str, Any], label: str) -> Rows:
    """A prepared folder read by other files than ``split.yaml`` and ``dataset.yaml``."""
    split = str(node.get("split_config") or "split.yaml")
    dataset = str(node.get("dataset_config") or "dataset.yaml")
    meta = read_meta(path, label, split_file=split, dataset_file=dataset)
    if part not in meta.splits:
        raise UserError(f"{label}: no split part {part!r} in {split}")
    names = [name for name in meta.splits[part] if name not in meta.exclude]
    return Samples(f"{path}:{part}", meta.shards(names), names, meta.form)


def _subset(leaves: list[Leaf], subset: Any, file: Path) -> list[Leaf]:
    """Only ``{range: [first, last]}`` of each leaf: percentages, or row numbers and ``end``."""
    if subset is None:
        return leaves
    bounds = subset.get("range") if isinstance(subset, dict) else None
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise UserError(f"--dataset {file}: subset must be {{range: [0%, 80%]}} or {{range: [100, end]}}")
    out = []
    for leaf in leaves:
        count = len(leaf.rows)
        first, last = (_bound(bound, count, file) for bound in bounds)
        if not 0 <= first <= last <= count:
            raise UserError(f"--dataset {file}: range {bounds} is not within the {count} rows of {leaf.rows.name}")
        share = leaf.share * (last - first) / count if count else 0.0
        out.append(replace(leaf, rows=Slab(leaf.rows, first, last), share=share))
    return out


def _bound(bound: Any, count: int, file: Path) -> int:
    if isinstance(bound, int):
        return bound
    text = str(bound).strip()
    if text == "end":
        return count
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not text.endswith("%") or not 0 <= share <= 1:
        raise UserError(f"--dataset {file}: {bound!r} is neither a row number nor a share such as 80%")
    return int(count * share)


def _positive(value: Any, name: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise UserError(f"--dataset {file}: {name} {value!r} is not a number of at least 0")
    return float(value)


def _scaled(leaf: Leaf, factor: float) -> Leaf:
    return replace(leaf, share=leaf.share * factor)
