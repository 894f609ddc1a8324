"""Memory for pixels that is used again.

Every microbatch needs megabytes of fresh patches, and fresh memory is not free: the kernel zeroes each page on first
touch, which can cost more than the work done on it. So a loader lends the same blocks over and over. A block comes back
by itself when the last array or tensor that looks at it is gone; nobody has to say so, and nobody can be surprised.
"""

from __future__ import annotations

import weakref

import numpy as np


class Buffers:
    """Lends ``[size] uint8`` arrays, uninitialised; keeps at most ``held`` blocks that are not in use. Thread-safe."""

    def __init__(self, held: int) -> None:
        self._held = held
        self._free: list[bytearray] = []

    def take(self, size: int) -> np.ndarray:
        """An array of ``size`` bytes whose memory returns here once nothing refers to it or to a part of it."""
        try:
            block = self._free.pop()  # one atomic operation: no lock, which a collection in mid-call could meet again
        except IndexError:
            block = bytearray()
        if len(block) < size:
            block = bytearray(size)
        # The block is no array, so every slice of this one refers to this one, and so does a tensor made from it.
        array = np.frombuffer(block, dtype=np.uint8)
        weakref.finalize(array, self._give, block).atexit = False
        return array[:size]

    def _give(self, block: bytearray) -> None:
        if len(self._free) < self._held:
            self._free.append(block)
