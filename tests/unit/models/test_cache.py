"""Rows that come, grow, move and go: each keeps what it holds, within the budget."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from tessera.models.cache import Budget, KVCache, Row, size_class, token_bytes

LAYERS, HEADS, KV, WIDTH = 2, 6, 2, 8


def cache_of(limit: int) -> KVCache:
    return KVCache(LAYERS, KV, WIDTH, torch.zeros(1), Budget(limit))


class Model:
    """Attention over what it remembers of every row itself."""

    def __init__(self) -> None:
        self.held: dict[Row, list[list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def expected(self, row: Row, layer: int, q: torch.Tensor) -> torch.Tensor:
        keys = torch.stack([k for k, _ in self.held[row][layer]], 1)
        values = torch.stack([v for _, v in self.held[row][layer]], 1)
        out = F.scaled_dot_product_attention(q[:, None], keys, values, enable_gqa=True)
        return out[:, 0]

    def note(self, row: Row, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        layers = self.held.setdefault(row, [[] for _ in range(LAYERS)])
        layers[layer] += [(key, value) for key, value in zip(k, v, strict=True)]

    def fill(self, cache: KVCache, parts: list[tuple[Row, int]]) -> None:
        begun = all(row.length for row, _ in parts)
        through = cache.filling(parts)
        count = sum(n for _, n in parts)
        for layer in range(LAYERS):
            q, k, v = self.draw(count, HEADS, WIDTH), self.draw(count, KV, WIDTH), self.draw(count, KV, WIDTH)
            order = None if through.layout is None else through.layout.order
            through.write(str(layer), *(x if order is None else x[order] for x in (k, v)))
            first = 0
            mixed = through.attend(str(layer), q) if begun else None
            for row, n in parts:
                for at in range(first, first + n):
                    self.note(row, layer, k[at : at + 1], v[at : at + 1])
                    if mixed is not None:
                        torch.testing.assert_close(mixed[at], self.expected(row, layer, q[at]))
                first += n

    def step(self, cache: KVCache) -> None:
        through = cache.stepping()
        for layer in range(LAYERS):
            count = len(through.rows)
            q, k, v = self.draw(count, HEADS, WIDTH), self.draw(count, KV, WIDTH), self.draw(count, KV, WIDTH)
            through.write(str(layer), k, v)
            mixed = through.attend(str(layer), q)
            for at, row in enumerate(through.rows):
                self.note(row, layer, k[at : at + 1], v[at : at + 1])
                torch.testing.assert_close(mixed[at], self.expected(row, layer, q[at]))


def allocated(cache: KVCache) -> int:
    return sum(lane.data.shape[2] * lane.capacity for lane in cache._lanes.values())


@pytest.mark.parametrize("limit", [1200, 100_000])
def test_rows_hold_what_they_were_given(limit: int) -> None:
    """A random life of a cache, with hardly any room and with plenty."""
    rng, cache, model = random.Random(0), cache_of(limit), Model()
    live: list[tuple[Row, int]] = []
    promised = 0
    with torch.inference_mode():
        for _ in range(60):
            longest = rng.randrange(10, 150)
            if promised + size_class(longest) <= min(limit, 1200):
                prompt = rng.randrange(4, longest - 2)
                parts = rng.random() < 0.4
                row = cache.join(prompt, aside=parts)
                model.fill(cache, [(row, prompt // 2 if parts else prompt)])
                if parts:
                    model.fill(cache, [(row, prompt - prompt // 2)])
                    cache.bring(row)
                live.append((row, longest))
                promised += size_class(longest)
            for _ in range(rng.randrange(12)):
                for row, longest in [pair for pair in live if pair[0].length >= pair[1]]:
                    cache.leave(row)
                    live.remove((row, longest))
                    promised -= size_class(longest)
                if live:
                    model.step(cache)
            assert allocated(cache) == cache._budget.used <= limit
            if live and rng.random() < 0.3:
                row, longest = live.pop(rng.randrange(len(live)))
                cache.leave(row, wipe=rng.random() < 0.5)
                promised -= size_class(longest)
    assert len(model.held) > 20


def test_packed_prompts_of_several_lanes() -> None:
    cache, model = cache_of(10_000), Model()
    with torch.inference_mode():
        rows = [cache.join(n) for n in (100, 7, 30, 7, 200)]
        model.fill(cache, list(zip(rows, (100, 7, 30, 7, 200), strict=True)))
        model.step(cache)
        model.fill(cache, list(zip(rows, (3, 1, 90, 4, 2), strict=True)))
        model.step(cache)


def test_twins_hold_the_same_and_go_their_own_ways() -> None:
    cache, model = cache_of(10_000), Model()
    with torch.inference_mode():
        row = cache.join(10)
        model.fill(cache, [(row, 10)])
        twin = cache.fork(row)
        model.held[twin] = [list(layer) for layer in model.held[row]]
        for _ in range(3):
            model.step(cache)
        cache.leave(row)
        model.step(cache)


def test_a_row_that_moves_never_needs_its_room_twice() -> None:
    """With the budget promised to the last token, rows still reach the length they were promised."""
    cache, model = cache_of(size_class(100) + size_class(60)), Model()
    with torch.inference_mode():
        rows = [cache.join(20), cache.join(20)]
        model.fill(cache, [(row, 20) for row in rows])
        while rows[0].length < 100:
            model.step(cache)
            if len(rows) == 2 and rows[1].length == 60:
                cache.leave(rows.pop())
    assert allocated(cache) <= cache._budget.limit


def test_sizes() -> None:
    assert [size_class(n) for n in (1, 64, 65, 96, 97, 1000, 1025)] == [64, 64, 96, 96, 128, 1024, 1536]
    assert token_bytes(24, 2, 64, torch.bfloat16) == 24 * 2 * 2 * 64 * 2
