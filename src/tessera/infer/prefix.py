"""Keys and values of prompts that have been read before.

Prompts begin alike: the same system prompt, the same image, the conversation so far. What a prompt's first tokens left
in a cache is kept in blocks of :data:`BLOCK` tokens; the next prompt that begins with them starts behind them::

    prompt     s s s s | s i i i | i i i i | q q q        names   h1 = hash(adapter, block 1)
    stored        h1        h2        h3                          h2 = hash(h1, block 2, image), ...
    another    s s s s | s i i i | i i i i | w w w w w    h1 h2 h3 are known: five tokens are left to compute

A block's name covers everything before it: token ids, the content of images, and with them the positions. Blocks are
copied out of a row and into another, so nobody has to know who still reads them. The least recently used goes first;
a chain is touched from its end to its beginning, hence a block never outlives the one before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

BLOCK = 16
"""Tokens of a block."""

Span = tuple[int, int, bytes]
"""The tokens [start, end) stand for an image with this content."""


def names(tokens: np.ndarray, spans: Sequence[Span], root: bytes = b"") -> list[bytes]:
    """The names of all whole blocks of ``tokens [T] int64``."""
    raw, found, name = np.ascontiguousarray(tokens, dtype=np.int64).tobytes(), [], root
    waiting = list(spans)
    for start in range(0, len(tokens) - len(tokens) % BLOCK, BLOCK):
        hashed = blake2b(name, digest_size=16)
        hashed.update(raw[8 * start : 8 * (start + BLOCK)])
        while waiting and waiting[0][1] <= start:
            waiting.pop(0)
        for first, _, content in waiting:
            if first >= start + BLOCK:
                break
            hashed.update(content)
        name = hashed.digest()
        found.append(name)
    return found


class Prefixes:
    """Blocks of one model's keys and values, at most ``blocks`` of them."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._places: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(blocks))
        # [blocks, layers, 2, kv_heads, BLOCK, D]; made when it is first needed.
        self._store: Tensor | None = None

    def __len__(self) -> int:
        return len(self._places)

    def known(self, wanted: Sequence[bytes]) -> int:
        """How many of ``wanted``, from the first on, are stored."""
        return next((index for index, name in enumerate(wanted) if name not in self._places), len(wanted))

    def copy(self, wanted: Sequence[bytes], target: Tensor) -> None:
        """Copy the stored blocks ``wanted`` into ``target [layers, 2, kv_heads, tokens, D]``."""
        assert self._store is not None
        places = [self._places[name] for name in wanted]
        held = self._store.index_select(0, torch.tensor(places, device=self._store.device))
        layers, pair, heads, _, width = target.shape
        target.copy_(held.permute(1, 2, 3, 0, 4, 5).reshape(layers, pair, heads, len(places) * BLOCK, width))
        self._touch(wanted)

    def store(self, chain: Sequence[bytes], held: Tensor) -> None:
        """Keep the blocks ``chain`` of ``held [layers, 2, kv_heads, tokens, D]``, as far as they are new and fit."""
        chain = chain[: self.blocks]
        start = self.known(chain)
        self._touch(chain[:start])
        fresh = chain[start:]
        if not fresh:
            return
        while len(self._free) < len(fresh):
            _, place = self._places.popitem(last=False)
            self._free.append(place)
        if self.known(chain) < start:
            return  # the chain itself had to go: longer than everything that fits
        places = [self._free.pop() for _ in fresh]
        layers, pair, heads, _, width = held.shape
        if self._store is None:
            self._store = held.new_empty(self.blocks, layers, pair, heads, BLOCK, width)
        part = held[:, :, :, start * BLOCK : len(chain) * BLOCK]
        parts = part.unflatten(3, (len(fresh), BLOCK)).permute(3, 0, 1, 2, 4, 5)
        self._store.index_copy_(0, torch.tensor(places, device=held.device), parts.contiguous())
        self._places.update(zip(fresh, places, strict=True))
        self._touch(chain)

    def forget(self) -> None:
        """Drop everything."""
        self._free.extend(self._places.values())
        self._places.clear()

    def _touch(self, chain: Sequence[bytes]) -> None:
        for name in reversed(chain):
            self._places.move_to_end(name)
