"""LoRA between peft's files and Megatron's: pairs beside fused matrices, exactly.

Where we adapt queries, keys and values each for itself, Megatron-SWIFT adapts the one matrix that holds all three, so
its pair ``A [r, in]``, ``B [out, r]`` can be read as three pairs that share ``A``, with the rows of ``B`` dealt out::

    B_q = rows of the queries, B_k = rows of the keys, B_v = rows of the values;   A_q = A_k = A_v = A

The other direction is the same if the three do share ``A``. If they do not, they lie in blocks of a pair of three times
the rank, and since a job has one rank for all its pairs, the others are filled up with zeros::

    A = [A_q; A_k; A_v]      B = [B_q 0 0; 0 B_k 0; 0 0 B_v] (rows interleaved)      alpha grows with the rank

Both are exact: products get zeros added, no number changes. ``adapter_layout.json`` keeps what was there, so that the
way back restores it tensor by tensor. A matrix of gate and up is cut among tensor ranks as a plain one: rank by rank
first gate, then up. What Megatron's form has no place for (DoRA, biases, modules saved whole) is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from tessera.config.errors import UserError
from tessera.contract.model import Family, HFConfig
from tessera.contract.shards import Part, whole
from tessera.weights.files import DTYPES, Entry, Writer
from tessera.weights.hf import Checkpoint
from tessera.weights.megatron import torch_dist, torch_dist_writer
from tessera.weights.megatron.checkpoint import TORCH_DIST, locate
from tessera.weights.megatron.convert import stored_in
from tessera.weights.megatron.options import Options, stacks
from tessera.weights.megatron.publish import publishing
from tessera.weights.megatron.ranks import Ranks, shard
from tessera.weights.megatron.stored import Reader
from tessera.weights.megatron.table import GATED, Row, Split, Table
from tessera.weights.megatron.tiling import Shape, Tile, Tiling, extents, inverted
from tessera.weights.megatron.towers import make_table

CONFIG, WEIGHTS, LAYOUT = "adapter_config.json", "adapter_model.safetensors", "adapter_layout.json"
PREFIX = "base_model.model."
FILE_NAME = re.compile(r"(.+)\.lora_([AB])\.weight")
SIDES = ("A", "B")
COPIES = Split()
EXPERTS = {"gate_up_proj": ".base_layer", "down_proj": ""}
"""peft wraps a stack of experts once for each of its parameters; what it puts behind the module for each."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The pair beside one of our weights: tilings of ``A [.., r, in]`` and ``B [.., out, r]`` over a file's tensors."""

    a: Tiling
    b: Tiling

    @property
    def rank(self) -> int:
        """Its rank."""
        return self.a.shape[-2]


def to_megatron(directory: Path, family: Family, config: HFConfig, root: Path, options: Options) -> int:
    """Write the peft adapter in ``directory`` as a ``torch_dist`` checkpoint below ``root``; how many pairs.

    UserError for what Megatron's form cannot hold, or a format other than torch_dist.
    """
    if options.format != TORCH_DIST:
        raise UserError("--mcore_format torch: adapters are written as torch_dist only")
    fields = _fields(directory)
    checkpoint = Checkpoint(directory)
    stored = stored_in(checkpoint)
    table = make_table(family, config, options.dialect)
    pairs = _from_peft({name: entry.shape for name, entry in checkpoint.entries.items()}, table, directory)
    scale = _scale(fields, pairs, directory)
    with Reader(stored) as reader:
        shared = {name: _shared(row, pairs, reader) for name, row in _adapted(table, pairs).items()}
        widths = [sum(pairs[s].rank for s in _sources(table.rows[n], pairs)) for n, one in shared.items() if not one]
        rank = max([pair.rank for pair in pairs.values()] + widths)
        values: dict[str, Tiling] = {}
        for name, one in shared.items():
            values |= _fused(name, table.rows[name], pairs, rank, one, options.ranks)
        rows = {name: Row(tiling, COPIES, table.rows[_owner(name)].layer) for name, tiling in values.items()}
        dtypes = {name: reader.dtype(tiling) for name, tiling in values.items()}
        adapter = Table(table.dialect, {}, rows, table.language, table.decoder)
        plan = torch_dist_writer.plan(adapter, dtypes, Ranks(), stacked=stacks(table, options))
        common = {"checkpoint_version": 3.0, "iteration": options.iteration or 0, "content_metadata": {}}
        with publishing(root, options.iteration) as folder:
            torch_dist_writer.write(folder, plan, values, reader, common)
    changed = {**fields, "r": rank, "lora_alpha": scale * rank, "use_rslora": False}
    record = {
        "tensors": {
            name: [str(e.dtype).removeprefix("torch."), list(e.shape)] for name, e in checkpoint.entries.items()
        },
        "config": fields,
        "shared": sorted(name for name, one in shared.items() if one),
        "tensor_model_parallel_size": options.ranks.tp,
    }
    (root / CONFIG).write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n", "utf-8")
    (root / LAYOUT).write_text(json.dumps(record), "utf-8")
    return len(pairs)


def to_peft(
    path: Path, family: Family, config: HFConfig, out: Path, *, dialect: str = "swift", base_model: str | None = None
) -> int:
    """Write the Megatron adapter at ``path`` as peft's files into the existing directory ``out``; how many pairs.

    ``lora_alpha`` is taken from ``adapter_config.json`` or ``args.json`` beside it; UserError if neither is there.
    """
    found = locate(path)
    if found.format != TORCH_DIST:
        raise UserError(f"--mcore_adapters {path}: adapters of rank by rank checkpoints are not supported")
    held = torch_dist.read(found.path)
    table = make_table(family, config, dialect)
    record = _json(found.root / LAYOUT)
    tp = record.get("tensor_model_parallel_size") or _tensor_ranks(found.args)
    pairs = _unfused(held.tilings, table, tp, path)
    if record:
        fields: dict[str, Any] = record["config"]
        wanted = {name: tuple(shape) for name, (_, shape) in record["tensors"].items()}
        made = _narrowed(wanted, table, pairs, record, path)
        types = {name: vars(torch)[dtype] for name, (dtype, _) in record["tensors"].items()}
    else:
        made = _to_peft(pairs)
        rank = next(iter(pairs.values())).rank
        fields = _described(found.root, found.path, rank, pairs, base_model)
        types = {name: held.stored[tiling.tiles[0].source].dtype for name, tiling in made.items()}
    entries: dict[str, Entry] = {}
    at = 0
    for name in sorted(made):
        end = at + prod(made[name].shape) * types[name].itemsize
        entries[name] = Entry(WEIGHTS, types[name], made[name].shape, at, end)
        at = end
    _write(out, entries, made, held.stored)
    (out / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")
    return len(pairs)


def _write(out: Path, entries: Mapping[str, Entry], made: Mapping[str, Tiling], stored: Any) -> None:
    assert all(entry.dtype in DTYPES.values() for entry in entries.values())
    with ExitStack() as stack, Reader(stored) as reader:
        writer = Writer(out, entries, {}, stack)
        for name, entry in entries.items():
            writer.put(name, reader.read(made[name], dtype=entry.dtype))


def _fields(directory: Path) -> dict[str, Any]:
    """``adapter_config.json``; UserError if Megatron's form cannot hold such an adapter."""
    fields = _json(directory / CONFIG)
    if not fields:
        raise UserError(f"--adapters {directory}: no {CONFIG} there")
    if fields.get("peft_type") != "LORA" or fields.get("use_dora") or fields.get("modules_to_save"):
        what = "DoRA" if fields.get("use_dora") else "modules_to_save" if fields.get("modules_to_save") else "peft_type"
        raise UserError(f"--adapters {directory}: {what} has no place in a Megatron adapter; add --merge_lora true")
    return fields


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    return held if isinstance(held, dict) else {}


def _scale(fields: Mapping[str, Any], pairs: Mapping[str, Pair], directory: Path) -> float:
    """What products are multiplied by; UserError if pairs differ in it."""
    if fields.get("alpha_pattern") or len({pair.rank for pair in pairs.values()}) > 1:
        raise UserError(f"--adapters {directory}: pairs of different rank or alpha; add --merge_lora true")
    rank = next(iter(pairs.values())).rank
    return float(fields["lora_alpha"]) / (rank**0.5 if fields.get("use_rslora") else rank)


def _from_peft(shapes: Mapping[str, Shape], table: Table, directory: Path) -> dict[str, Pair]:
    """The pairs of an adapter by the weight of ours that they stand beside."""
    weights = {_file_stem(name): name for name in table.ours if name.endswith(".weight") or _leaf(name) in EXPERTS}
    sides: dict[str, dict[str, Tiling]] = {}
    for name, shape in shapes.items():
        found = FILE_NAME.fullmatch(name)
        stem = found[1].removeprefix(PREFIX) if found else ""
        if found is None or stem not in weights:
            raise UserError(f"--adapters {directory}: {name} has no place in a Megatron adapter; add --merge_lora true")
        weight = weights[stem]
        sides.setdefault(weight, {})[found[2]] = _unfolded(name, shape, found[2], _experts(table.ours[weight], weight))
    for weight, held in sides.items():
        if set(held) != set(SIDES):
            raise UserError(f"--adapters {directory}: {weight} has only one half of a pair")
    if not sides:
        raise UserError(f"--adapters {directory}: holds no adapter")
    return {weight: Pair(held["A"], held["B"]) for weight, held in sides.items()}


def _file_stem(weight: str) -> str:
    """What peft calls the module of one of our weights."""
    module, _, leaf = weight.rpartition(".")
    return f"{module}{EXPERTS[leaf]}" if leaf in EXPERTS and module.endswith(".experts") else module


def _experts(shape: Shape, weight: str) -> int:
    return shape[0] if _leaf(weight) in EXPERTS and len(shape) == 3 else 0


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _unfolded(name: str, shape: Shape, side: str, experts: int) -> Tiling:
    """A tensor of peft's file as ``[r, in]`` or ``[out, r]``; of experts, which it folds, with them in front."""
    if not experts:
        return Tiling(shape, (Tile(name, whole(shape), whole(shape)),))
    full, tiles = (experts, *_folded(shape, side, experts)), []
    for inside, where in _folds(full, side):
        tiles.append(Tile(name, where, inside))
    return Tiling(full, tuple(tiles))


def _folded(shape: Shape, side: str, experts: int) -> Shape:
    return (shape[0] // experts, shape[1]) if side == "A" else (shape[0], shape[1] // experts)


def _folds(full: Shape, side: str) -> Iterable[tuple[Part, Part]]:
    """Boxes of experts' ``full`` tensor and where peft's folded one has them: A one by one, B column by column."""
    experts, rows, columns = full
    for expert in range(experts):
        if side == "A":
            yield _box(expert, (0, rows), (0, columns)), (slice(expert * rows, (expert + 1) * rows), slice(0, columns))
            continue
        for at in range(columns):
            column = at * experts + expert
            yield _box(expert, (0, rows), (at, at + 1)), (slice(0, rows), slice(column, column + 1))


def _box(expert: int, rows: tuple[int, int], columns: tuple[int, int]) -> Part:
    return slice(expert, expert + 1), slice(*rows), slice(*columns)


def _adapted(table: Table, pairs: Mapping[str, Pair]) -> dict[str, Row]:
    """The rows of the table with a pair beside them; UserError if a pair's weight is in none as a matrix."""
    found = {n: row for n, row in table.rows.items() if n.endswith(".weight") and _sources(row, pairs)}
    placed = {source for row in found.values() for source in _sources(row, pairs)}
    lost = sorted(pairs.keys() - placed)
    if lost:
        raise UserError(f"{lost[0]}: an adapter beside it has no place in a Megatron adapter; add --merge_lora true")
    return found


def _sources(row: Row, pairs: Mapping[str, Pair]) -> list[str]:
    """The weights of ours in a row that have a pair, in order."""
    return list(dict.fromkeys(tile.source for tile in row.tiling.tiles if tile.source in pairs))


def _shared(row: Row, pairs: Mapping[str, Pair], reader: Reader) -> bool:
    """Whether the pairs of a row have the same A."""
    first, *others = (reader.read(pairs[source].a) for source in _sources(row, pairs))
    return all(torch.equal(first, other) for other in others)


def _fused(name: str, row: Row, pairs: Mapping[str, Pair], rank: int, shared: bool, ranks: Ranks) -> dict[str, Tiling]:
    """The pair of a row, of this rank, from those of what it consists of."""
    first = pairs[_sources(row, pairs)[0]]
    lead = first.a.shape[:-2]
    a_shape, b_shape = (*lead, rank, first.a.shape[-1]), (*row.shape[:-1], rank)
    a_tiles, b_tiles = [], []
    for at, source in enumerate(_sources(row, pairs)):
        pair = pairs[source]
        block = slice(0, pair.rank) if shared else slice(at * pair.rank, (at + 1) * pair.rank)
        if not shared or at == 0:
            a_tiles += [_shifted(tile, -2, block.start) for tile in pair.a.tiles]
        for tile in row.tiling.tiles:
            if tile.source == source:
                inside = (*tile.inside[:-1], slice(0, pair.rank))
                where = (*tile.where[:-1], block)
                b_tiles += [_carried(t, inside, where) for t in pair.b.within(inside)]
    module = name.removesuffix(".weight")
    b = Tiling(b_shape, tuple(b_tiles))
    if row.split.blocks > 1 and not row.split.experts:
        b = _dealt(b_shape, ranks.tp).through({"": b})
    return {f"{module}.lora_A.default.weight": Tiling(a_shape, tuple(a_tiles)), f"{module}.lora_B.default.weight": b}


def _shifted(tile: Tile, axis: int, by: int) -> Tile:
    """``tile`` with its place moved along a dimension."""
    where = list(tile.where)
    at = len(where) + axis
    where[at] = slice(where[at].start + by, where[at].stop + by)
    return Tile(tile.source, tile.inside, tuple(where))


def _carried(tile: Tile, start: Part, end: Part) -> Tile:
    """``tile``, which lies in the box ``start``, at the same place of the box ``end``."""
    offset = [two.start - one.start for one, two in zip(start, end, strict=True)]
    where = tuple(slice(cut.start + by, cut.stop + by) for cut, by in zip(tile.where, offset, strict=True))
    return Tile(tile.source, tile.inside, where)


def _dealt(shape: Shape, tp: int) -> Tiling:
    """Rows of gate and up as they lie if each tensor rank's are kept together."""
    row = Row(Tiling(shape, (Tile("", whole(shape), whole(shape)),)), GATED)
    tiles, at = [], 0
    for rank in range(tp):
        mine = shard("", row, Ranks(tp=tp), rank, 0)
        for tile in mine.tiles:
            where = (slice(tile.where[0].start + at, tile.where[0].stop + at), *tile.where[1:])
            tiles.append(Tile("", tile.inside, where))
        at += mine.shape[0]
    return Tiling(shape, tuple(tiles))


def _owner(name: str) -> str:
    return f"{name.partition('.lora_')[0]}.weight"


def _unfused(found: Mapping[str, Tiling], table: Table, tp: int, path: Path) -> dict[str, Pair]:
    """The pairs of a Megatron adapter, dealt out to the weights of ours that share them."""
    pairs: dict[str, Pair] = {}
    seen: set[str] = set()
    for name, row in table.rows.items():
        a, b = (f"{name.removesuffix('.weight')}.lora_{side}.default.weight" for side in SIDES)
        if a not in found or b not in found:
            continue
        seen |= {a, b}
        rank = found[a].shape[-2]
        if found[b].shape != (*row.shape[:-1], rank) or found[a].shape[-1] != row.shape[-1]:
            raise UserError(f"--mcore_adapters {path}: {a} and its partner do not fit config.json")
        rows = found[b]
        if row.split.blocks > 1 and not row.split.experts:
            back = inverted({"dealt": _dealt(rows.shape, tp)}, {"": rows.shape})[""]
            rows = back.through({"dealt": rows})
        for source in dict.fromkeys(tile.source for tile in row.tiling.tiles):
            pairs[source] = Pair(found[a], _share(source, row, rows, table.ours[source], rank))
    unknown = sorted(found.keys() - seen)
    if unknown or not pairs:
        what = f"{unknown[0]} is no LoRA pair of this model" if unknown else "holds no LoRA pair"
        raise UserError(f"--mcore_adapters {path}: {what}")
    return pairs


def _share(source: str, row: Row, rows: Tiling, shape: Shape, rank: int) -> Tiling:
    """B of one of the weights in a row: its rows of the row's B."""
    tiles = []
    for tile in row.tiling.tiles:
        if tile.source == source:
            inside, where = (*tile.inside[:-1], slice(0, rank)), (*tile.where[:-1], slice(0, rank))
            tiles += [_carried(t, where, inside) for t in rows.within(where)]
    return Tiling((*shape[:-1], rank), tuple(tiles))


def _to_peft(pairs: Mapping[str, Pair]) -> dict[str, Tiling]:
    """The pairs under peft's names, those of experts folded."""
    made = {}
    for weight, pair in pairs.items():
        for side, tiling in zip(SIDES, (pair.a, pair.b), strict=True):
            made[f"{PREFIX}{_file_stem(weight)}.lora_{side}.weight"] = _folded_up(tiling, side)
    return made


def _folded_up(tiling: Tiling, side: str) -> Tiling:
    if len(tiling.shape) == 2:
        return tiling
    experts, rows, columns = tiling.shape
    shape = (experts * rows, columns) if side == "A" else (rows, columns * experts)
    tiles = tuple(Tile("", inside, where) for inside, where in _folds(tiling.shape, side))
    return Tiling(shape, tiles).through({"": tiling})


def _narrowed(
    wanted: Mapping[str, Shape], table: Table, pairs: Mapping[str, Pair], record: Mapping[str, Any], path: Path
) -> dict[str, Tiling]:
    """The tensors that were there before they were fused: of each pair its block, of its own rank."""
    held = _from_peft(wanted, table, path)
    cut = {}
    for name, row in table.rows.items():
        shared = name in record["shared"]
        for at, source in enumerate(_sources(row, held)):
            rank, pair = held[source].rank, pairs.get(source)
            if pair is None:
                raise UserError(f"--mcore_adapters {path}: {LAYOUT} names {source}, which is not there")
            start = 0 if shared else at * rank
            cut[source] = Pair(_slice(pair.a, -2, start, rank), _slice(pair.b, -1, start, rank))
    return _to_peft(cut)


def _slice(tiling: Tiling, axis: int, start: int, count: int) -> Tiling:
    """Rows or columns of a tensor, as a tensor."""
    at = len(tiling.shape) + axis
    box = list(whole(tiling.shape))
    box[at] = slice(start, start + count)
    tiles = tuple(_shifted(tile, axis, -start) for tile in tiling.within(tuple(box)))
    return Tiling(extents(tuple(box)), tiles)


def _described(
    root: Path, folder: Path, rank: int, pairs: Mapping[str, Pair], base_model: str | None
) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter that another toolkit wrote."""
    for place in (root, folder):
        fields = _json(place / CONFIG)
        if fields:
            return {**fields, "r": rank, **_targets(pairs)}
        args = _json(place / "args.json")
        if "lora_alpha" in args:
            return {
                "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none", "r": rank,
                "lora_alpha": args["lora_alpha"], "lora_dropout": args.get("lora_dropout", 0.0),
                "use_rslora": bool(args.get("use_rslora", False)), **_targets(pairs),
                "base_model_name_or_path": base_model,
            }  # fmt: skip
    raise UserError(f"--mcore_adapters {root}: neither {CONFIG} nor args.json there says what lora_alpha is")


def _targets(pairs: Mapping[str, Pair]) -> dict[str, list[str]]:
    """What peft is told to adapt: linear layers by module, experts and routers by parameter."""
    parameters = {f"mlp.experts.{_leaf(weight)}" for weight in pairs if _leaf(weight) in EXPERTS}
    routers = [weight for weight in pairs if weight.endswith(".mlp.gate.weight")]
    parameters |= {"mlp.gate.weight" for _ in routers}
    linear = [_file_stem(weight) for weight in pairs if _leaf(weight) not in EXPERTS and weight not in routers]
    return {"target_modules": sorted(linear), "target_parameters": sorted(parameters)}


def _tensor_ranks(args: Any) -> int:
    return int(vars(args).get("tensor_model_parallel_size", 1)) if args is not None else 1
