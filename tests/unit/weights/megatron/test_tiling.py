"""The algebra of tiles: slices find their sources, tables invert, chains of them compose."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tessera.contract.shards import Part, whole
from tessera.weights.megatron.ranks import Ranks, shard
from tessera.weights.megatron.table import COPIED, Builder, Row, Split
from tessera.weights.megatron.tiling import Tile, Tiling, box, inverted, overlapping, same, uncovered


def made(tiling: Tiling, sources: dict[str, Tensor], part: Part | None = None) -> Tensor:
    """A tensor, or the ``part`` of one, by definition."""
    part = whole(tiling.shape) if part is None else part
    out = torch.zeros([cut.stop - cut.start for cut in part])
    for tile in tiling.within(part):
        where = tuple(slice(w.start - p.start, w.stop - p.start) for w, p in zip(tile.where, part, strict=True))
        value = sources[tile.source][tile.inside]
        value = value.transpose(-1, -2) if tile.turned else value
        out[where] = value.reshape(out[where].shape)
    return out


def parts_of(shape: tuple[int, ...], count: int) -> list[Part]:
    drawn = random.Random(0)
    ends = [[sorted(drawn.sample(range(size + 1), 2)) for size in shape] for _ in range(count)]
    return [tuple(slice(*pair) for pair in pairs) for pairs in ends]


def interleaved() -> tuple[Tiling, dict[str, Tensor]]:
    sources = {"q": torch.randn(32, 6), "k": torch.randn(16, 6), "v": torch.randn(16, 6)}
    builder = Builder({name: tuple(value.shape) for name, value in sources.items()})
    builder.interleave("qkv", [("q", 0, 16), ("k", 0, 8), ("v", 0, 8)], 2, COPIED)
    return builder.rows["qkv"].tiling, sources


def test_queries_keys_and_values_take_turns() -> None:
    """The layout as Megatron defines it: per group the queries, the key, the value."""
    tiling, sources = interleaved()
    q, k, v = sources["q"].view(2, 16, 6), sources["k"].view(2, 8, 6), sources["v"].view(2, 8, 6)
    assert torch.equal(made(tiling, sources), torch.cat([q, k, v], 1).reshape(-1, 6))


def test_any_slice_is_the_slice_of_the_whole() -> None:
    tiling, sources = interleaved()
    everything = made(tiling, sources)
    for part in parts_of(tiling.shape, 50):
        assert torch.equal(made(tiling, sources, part), everything[part])


def test_a_table_is_inverted() -> None:
    tiling, sources = interleaved()
    shapes = {name: tuple(value.shape) for name, value in sources.items()}
    back = inverted({"qkv": tiling}, shapes)
    assert not uncovered(back)
    for name, value in sources.items():
        assert torch.equal(made(back[name], {"qkv": made(tiling, sources)}), value)


@pytest.mark.parametrize("turned", [True, False])
def test_chains_compose(turned: bool) -> None:
    """An expert of a stack, transposed on disk, of which two ranks hold rows: one tiling says it all."""
    disk = {f"{e}": torch.randn(*((4, 6) if turned else (6, 4))) for e in range(3)}
    tiles = []
    for e in range(3):
        inside = whole(tuple(disk[f"{e}"].shape))
        tiles.append(Tile(f"{e}", inside, box((e, e + 1), (0, 6), (0, 4)), turned))
    stack = Tiling((3, 6, 4), tuple(tiles))
    full = made(stack, disk)
    row = Row(same("stack", (3, 6, 4)), Split(1, blocks=2, experts=True))
    for tp in range(3):
        mine = shard("stack", row, Ranks(tp=3, ep=3), tp, 1)
        direct = made(mine.through({"stack": stack}), disk)
        assert torch.equal(direct, made(mine, {"stack": full}))
        expected = torch.cat([full[1:2, tp : tp + 1], full[1:2, 3 + tp : 4 + tp]], 1)
        assert torch.equal(direct, expected)


def test_padding_is_what_no_tile_covers() -> None:
    wide = Tiling((5, 2), (Tile("x", box((0, 3), (0, 2)), box((0, 3), (0, 2))),))
    assert not wide.is_full and uncovered({"wide": wide}) == ["wide"]
    outer = Tiling((4, 2), (Tile("wide", box((1, 5), (0, 2)), box((0, 4), (0, 2))),))
    x = torch.randn(3, 2)
    assert torch.equal(made(outer.through({"wide": wide}), {"x": x}), torch.cat([x[1:], torch.zeros(2, 2)]))


def test_tiles_that_claim_the_same_element_are_found() -> None:
    one, two = Tile("a", box((0, 2), (0, 3)), box((0, 2), (0, 3))), Tile("a", box((0, 2), (0, 2)), box((1, 3), (2, 4)))
    assert overlapping([one, two])
    assert not overlapping([one, Tile("a", box((0, 1), (0, 1)), box((0, 1), (3, 4)))])


def test_boxes_of_different_extent_are_no_tile() -> None:
    with pytest.raises(AssertionError, match="boxes differ"):
        Tile("a", box((0, 2), (0, 3)), box((0, 3), (0, 2)))
    Tile("a", box((0, 2), (0, 3)), box((0, 3), (0, 2)), turned=True)


def test_a_table_with_a_tensor_left_out_is_refused() -> None:
    builder = Builder({"a": (4, 2), "b": (4, 2)})
    builder.keep("A", "a")
    with pytest.raises(AssertionError, match="without a place"):
        builder.table("lm", "", None)
    builder.keep("B", "b")
    builder.keep("C", "b")
    builder.table("lm", "", None)  # a copy is one place as far as reading goes
