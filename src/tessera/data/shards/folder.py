"""A folder of shards, as Energon prepares it or as it is.

    wds/pretrain-0.tar ...           the shards, and beside each its pretrain-0.tar.idx
    wds/.nv-meta/split.yaml          which shards are train, val and test; what to leave out
    wds/.nv-meta/dataset.yaml        what the samples are: a type and which part is which field
    wds/.nv-meta/.info.json          how many samples each shard has, in the order of the index
    wds/.nv-meta/index.sqlite        where every sample and every part lies

Shard names in ``split.yaml`` are brace expressions: ``pretrain-{0..49}.tar``. A folder without ``.nv-meta`` is all of
its shards, in natural order; a folder inside a prepared one, or one tar file, is those shards of it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.data.shards.forms import Form, form_of, guessed
from tessera.data.shards.index import Database, Listed, Shard, cache_directory, walked
from tessera.data.shards.rows import Samples

META, SHARD = ".nv-meta", ".tar"
_RANGE = re.compile(r"^(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?$")


def prepared(path: Path) -> Path | None:
    """The prepared folder that ``path`` is, is the ``.nv-meta`` of, or lies in; None if there is none."""
    if path.name == META and path.is_dir():
        return path.parent
    return next((folder for folder in (path, path.parent) if (folder / META).is_dir()), None)


def holds_shards(path: Path) -> bool:
    """Whether ``path`` is a folder that should be read as shards."""
    return prepared(path) == path or path.name == META or any(path.glob(f"*{SHARD}"))


def open_folder(path: Path, parts: Sequence[str], label: str, default: str = "train") -> Samples:
    """The rows of the split ``parts`` (none: ``default``) of the folder ``path``, which the user called ``label``."""
    folder = prepared(path)
    if folder is None:
        return open_plain(path, label)
    meta = read_meta(folder, label)
    inside = path.relative_to(folder).as_posix() if path != folder and path.name != META else ""
    chosen = list(parts) or ["all" if inside else default]
    if chosen == ["all"]:
        chosen = list(meta.splits)
    for name in chosen:
        if name not in meta.splits:
            raise UserError(f"{label}: no split part {name!r} (has {_sizes(meta.splits)})")
    names = [shard for name in chosen for shard in meta.splits[name] if shard not in meta.exclude]
    if inside:
        names = [name for name in names if name.startswith(f"{inside}/")]
    if not names:
        raise UserError(
            f"{label}: split part {'/'.join(chosen)} holds no shards (has {_sizes(meta.splits)}); "
            "name another part, e.g. DIR:train"
        )
    name = str(path) if inside else str(folder) + ("" if chosen == ["train"] else f":{'/'.join(chosen)}")
    without = {(names.index(shard), key) for shard, key in _sample_excludes(meta.exclude, names)}
    return Samples(name, meta.shards(names), names, meta.form, without)


def open_plain(path: Path, label: str) -> Samples:
    """The rows of all shards below ``path``, or of the one shard it is."""
    files = [path] if path.is_file() else sorted(shards_below(path), key=natural)
    if not files:
        raise UserError(f"{label}: no {SHARD} file in {path}")
    names = [file.name if path.is_file() else file.relative_to(path).as_posix() for file in files]
    return Samples(str(path), [walked(file, cache_directory()) for file in files], names, guessed)


def shards_below(path: Path) -> list[Path]:
    """The shards in a directory and below it, but for hidden ones."""
    found = path.rglob(f"*{SHARD}")
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]


class Meta:
    """What ``.nv-meta`` of ``folder`` says: ``splits`` (part -> shard names), ``exclude``, the samples' ``form``."""

    def __init__(self, folder: Path, splits: Mapping[str, list[str]], exclude: set[str], form: Form) -> None:
        self.folder, self.splits, self.exclude, self.form = folder, splits, exclude, form

    def shards(self, names: Sequence[str]) -> list[Shard]:
        """The shards called ``names``, from the index if there is a complete one."""
        counts = shard_counts(self.folder)
        path = self.folder / META / "index.sqlite"
        database = Database(path) if path.is_file() else None
        if database is None or not database.complete:
            return [walked(self.folder / name, cache_directory()) for name in names]
        numbers = {name: number for number, name in enumerate(counts)}
        return [
            Listed(self.folder / name, database, numbers[name], counts[name])
            if name in numbers
            else walked(self.folder / name, cache_directory())
            for name in names
        ]


def read_meta(folder: Path, label: str, *, split_file: str = "", dataset_file: str = "dataset.yaml") -> Meta:
    """The parsed ``.nv-meta`` of ``folder``; UserError names the file that cannot be used."""
    meta = folder / META
    found = next((meta / name for name in (split_file or "split.yaml", "split.json") if (meta / name).is_file()), None)
    if found is None:
        raise UserError(f"{label}: {meta} holds no {split_file or 'split.yaml'}; run tessera data prepare {folder}")
    split = read_yaml(found)
    parts = split.get("split_parts")
    if not isinstance(parts, dict) or not all(isinstance(names, list) for names in parts.values()):
        raise UserError(f"{found}: split_parts must map train, val and test to lists of shards")
    splits = {str(part): [name for text in names for name in expanded(str(text))] for part, names in parts.items()}
    exclude = {name for text in split.get("exclude") or [] for name in expanded(str(text))}
    dataset = meta / dataset_file
    form = form_of(read_yaml(dataset) if dataset.is_file() else None, str(dataset))
    return Meta(folder, splits, exclude, form)


def shard_counts(folder: Path) -> dict[str, int]:
    """Samples of each shard, in the order in which ``index.sqlite`` numbers them; empty if nothing says so."""
    info = folder / META / ".info.json"
    if info.is_file():
        try:
            found = json.loads(info.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{info}: not valid JSON ({error})") from None
    else:
        older = folder / META / ".info.yaml"
        found = read_yaml(older) if older.is_file() else {}
    counts = found.get("shard_counts", {}) if isinstance(found, dict) else None
    if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
        raise UserError(f"{info}: shard_counts must map shards to numbers of samples")
    return {str(name): count for name, count in counts.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file; UserError names the file if there is none."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a mapping")
    return found


def expanded(text: str) -> Iterator[str]:
    """Brace expressions spelled out, as a shell does: ``a-{08..10}.tar``, ``{train,val}/x.tar``."""
    start = text.find("{")
    depth = 0
    for at in range(max(start, 0), len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if start >= 0 and depth == 0:
            options = list(_options(text[start + 1 : at]))
            for option, rest in itertools.product(options, list(expanded(text[at + 1 :]))):
                yield f"{text[:start]}{option}{rest}"
            return
    yield text


def collapsed(names: Sequence[str]) -> list[str]:
    """The opposite, in order: neighbours that count up in one number become one expression."""
    out: list[str] = []
    at = 0
    while at < len(names):
        end, slot = at + 1, -1
        cut = _pieces(names[at])
        while end < len(names):
            before, after = _pieces(names[end - 1]), _pieces(names[end])
            changed = _counts_up(before, after)
            if changed is None or slot not in (-1, changed):
                break
            slot, end = changed, end + 1
        if slot >= 0:
            cut[slot] = f"{{{cut[slot]}..{_pieces(names[end - 1])[slot]}}}"
        out.append("".join(cut))
        at = end
    return out


def natural(path: Path | str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in names by their value."""
    return [(1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in _pieces(str(path))]


def _options(inner: str) -> Iterator[str]:
    """What stands between two braces: a range, or alternatives that may hold braces themselves."""
    found = _RANGE.match(inner)
    if found:
        first, last = int(found[1]), int(found[2])
        step = abs(int(found[3] or 1)) or 1
        padded = any(len(n.lstrip("-")) > 1 and n.lstrip("-")[0] == "0" for n in (found[1], found[2]))
        width = max(len(found[1]), len(found[2])) if padded else 0
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        yield from (f"{number:0{width}d}" for number in numbers)
        return
    depth, piece, pieces = 0, "", []
    for letter in inner:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            pieces.append(piece)
            piece = ""
        else:
            piece += letter
    if not pieces:  # {x} is no list of alternatives: a shell leaves it alone
        yield f"{{{inner}}}"
        return
    for option in [*pieces, piece]:
        yield from expanded(option)


def _pieces(name: str) -> list[str]:
    """``name`` cut into text and numbers, alternating, text first."""
    return re.split(r"(\d+)", name)


def _counts_up(before: Sequence[str], after: Sequence[str]) -> int | None:
    """Which piece, a number, is one more in ``after`` and as many digits long; None if anything else differs."""
    if len(before) != len(after):
        return None
    different = [at for at, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if len(different) != 1 or different[0] % 2 == 0:
        return None
    a, b = before[different[0]], after[different[0]]
    return different[0] if len(a) == len(b) and int(b) == int(a) + 1 else None


def _sample_excludes(exclude: set[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """(shard, key) of the entries ``shard.tar/key`` that leave out single samples of these shards."""
    cut = [entry.partition(f"{SHARD}/") for entry in exclude if f"{SHARD}/" in entry]
    return [(shard + SHARD, key) for shard, _, key in cut if shard + SHARD in names]


def _sizes(splits: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{part}: {len(names)} shards" for part, names in splits.items()) or "none"
