"""Batches in an order that only the seed decides, made by threads ahead of time.

The order is index arithmetic: :func:`~tessera.data.pack.plan_epoch` lists the units of an epoch, ``units_per_batch *
accumulation * world`` of them make one global step, and rank ``r`` of ``w`` takes every ``w``-th of them from its
``r``-th. One process that accumulates ``2n`` batches therefore sees the very units that two ranks with ``n`` see. Where
training stands is three integers (epoch, step in it, step overall), the same on every rank; resuming is setting them.

A pool of threads makes microbatches ahead of time (decoding and resizing release the interpreter lock, and processes
would copy every pixel), at most a few at once, delivered in order. A row whose pixels turn out to be broken is left out
of its microbatch and reported; what is left does not depend on threads or timing.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from tessera.config.errors import UserError
from tessera.contract.batch import Batch
from tessera.data.buffers import Buffers
from tessera.data.collate import Materialised, collate, pinned
from tessera.data.corpus import Corpus
from tessera.data.encode import Files
from tessera.data.pack import Unit, plan_epoch
from tessera.data.render import Encoded
from tessera.data.sample import BadRow


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step of this rank: ``accumulation`` batches; ``epoch`` is how far training is behind this step.

    ``index`` counts steps from 0 over the whole run.
    """

    batches: list[Batch]
    epoch: float
    index: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a step lies: epoch, step in the epoch, step in the run; and how many steps the epoch has."""

    epoch: int
    step: int
    index: int
    steps: int = 0


class Loader:
    """Iterates over the steps of a run; see the module docstring for the order.

    ``epochs`` may be fractional; ``max_steps`` overrides it. ``capacity`` is the pack length. ``threads`` 0 makes
    batches in the calling thread, None picks by the machine. ``waited`` is how many seconds the caller has spent
    waiting for batches so far, ``efficiency`` the filled share of the current epoch's packs (1.0 without packing).
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        units_per_batch: int = 1,
        accumulation: int = 1,
        packing: bool = False,
        capacity: int | None = None,
        seed: int = 42,
        rank: int = 0,
        world: int = 1,
        threads: int | None = None,
        shuffle: bool = True,
        epochs: float = 1.0,
        max_steps: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        if packing:
            longest = int(corpus.lengths.max(initial=0))
            capacity = capacity or longest
            if longest > capacity:
                raise UserError(f"--packing_length {capacity} is shorter than the longest row ({longest} tokens)")
        self.corpus, self.packing, self.capacity, self.shuffle = corpus, packing, capacity, shuffle
        self.units_per_batch, self.accumulation, self.seed = units_per_batch, accumulation, seed
        self.rank, self.world, self.pin_memory = rank, world, pin_memory
        self.threads = _default_threads(world) if threads is None else threads
        self.waited, self.efficiency = 0.0, 1.0
        self._plan: tuple[int, list[Unit]] = (-1, [])
        self._next = _Place(0, 0, 0)
        self._buffers = Buffers(held=self.threads + 4)
        encoder = corpus.encoder
        self._normalisation = replace(encoder.geometry.normalisation, fused=encoder.image_resize == "torch")
        self.total_steps = self._total(epochs) if max_steps is None or max_steps <= 0 else max_steps

    @property
    def units_per_step(self) -> int:
        """Units of one global step, over all ranks."""
        return self.units_per_batch * self.accumulation * self.world

    def steps_in_epoch(self, epoch: int) -> int:
        """Steps that visit every row once; depends on the epoch where packs do."""
        count = len(self._units(epoch)) if self.packing else self.corpus.epoch_rows
        return math.ceil(count / self.units_per_step)

    @property
    def tokens_in_epoch(self) -> int:
        """Tokens of the rows that the first epoch shows."""
        return int(self.corpus.lengths[self.corpus.drawn(self.seed, 0, shuffle=self.shuffle)].sum())

    def state(self) -> dict[str, Any]:
        """Where the next step begins, as JSON; valid for any number of ranks and threads."""
        return {
            "epoch": self._next.epoch,
            "step": self._next.step,
            "index": self._next.index,
            "seed": self.seed,
            "units_per_step": self.units_per_step,
            "packing": self.capacity if self.packing else None,
            "fingerprint": self.corpus.fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; UserError if the data or the order would not be the same."""
        here = self.state()
        meaning = {
            "fingerprint": "the dataset, its template or --max_length has changed",
            "seed": "--data_seed has changed",
            "units_per_step": "batch size x accumulation x processes has changed",
            "packing": "--packing or --packing_length has changed",
        }
        for name, reason in meaning.items():
            if state.get(name) != here[name]:
                raise UserError(
                    f"cannot resume: {reason} since the checkpoint ({name} {state.get(name)} -> {here[name]}); "
                    "restore it, or start a new run"
                )
        self._next = _Place(int(state["epoch"]), int(state["step"]), int(state["index"]))

    def __iter__(self) -> Iterator[Step]:
        """The steps from the current place to the end of the run."""
        if self.threads == 0:
            for place, batches in self._coming():
                started = time.perf_counter()
                made = [self.batch(units) for units in batches]
                self.waited += time.perf_counter() - started
                yield self._step(place, made)
            return
        with ThreadPoolExecutor(self.threads, thread_name_prefix="tessera-data") as pool:
            try:
                yield from self._threaded(pool)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, units: list[Unit]) -> Batch:
        """The microbatch of ``units``; rows whose pixels cannot be decoded are reported and left out."""
        corpus, encoder = self.corpus, self.corpus.encoder
        found: list[tuple[int, Encoded, Files]] = []
        for index in (index for unit in units for index in unit):
            try:
                sample = corpus.sample(index)
                files = encoder.files(sample)
                found.append((index, corpus.encoded(index, sample, files), files))
            except BadRow as error:
                corpus.drop(index, str(error))
        count, width = sum(e.patches for _, e, _ in found), encoder.patch_width(e for _, e, _ in found)
        pixels = self._buffers.take(count * width).reshape(count, width)
        rows: list[Materialised] = []
        used = 0
        for index, encoded, files in found:
            patches = pixels[used : used + encoded.patches]
            try:
                encoder.pixels(encoded, patches, files)
            except BadRow as error:
                corpus.drop(index, str(error))
                continue
            rows.append(Materialised(index, encoded, patches))
            used += len(patches)
        made = collate(rows, encoder.geometry, normalisation=self._normalisation, patches=pixels[:used])
        return pinned(made) if self.pin_memory else made

    def _threaded(self, pool: ThreadPoolExecutor) -> Iterator[Step]:
        """Steps in order, while the pool works on the next one and at least ``threads + 2`` microbatches ahead."""
        steps = self._coming()
        queue: deque[tuple[_Place, list[Future[Batch]]]] = deque()

        def refill() -> None:
            while sum(len(futures) for _, futures in queue) < self.threads + 2:
                coming = next(steps, None)
                if coming is None:
                    return
                queue.append((coming[0], [pool.submit(self.batch, units) for units in coming[1]]))

        refill()
        while queue:
            place, futures = queue.popleft()
            started = time.perf_counter()
            made = [future.result() for future in futures]
            self.waited += time.perf_counter() - started
            refill()
            yield self._step(place, made)

    def _step(self, place: _Place, batches: list[Batch]) -> Step:
        """The step at ``place``, after moving the cursor behind it."""
        over = place.step + 1 == place.steps
        self._next = _Place(place.epoch + over, 0 if over else place.step + 1, place.index + 1)
        return Step(batches, place.epoch + (place.step + 1) / place.steps, place.index)

    def _coming(self) -> Iterator[tuple[_Place, list[list[Unit]]]]:
        """Places and this rank's units of every step to come, one list per microbatch."""
        epoch, step, index = self._next.epoch, self._next.step, self._next.index
        if not len(self.corpus):
            return
        while index < self.total_steps:
            units = self._units(epoch)
            steps = math.ceil(len(units) / self.units_per_step)
            for first in range(step * self.units_per_step, len(units), self.units_per_step):
                if index >= self.total_steps:
                    return
                mine = units[first : first + self.units_per_step][self.rank :: self.world]
                starts = range(0, self.units_per_batch * self.accumulation, self.units_per_batch)
                yield _Place(epoch, step, index, steps), [mine[at : at + self.units_per_batch] for at in starts]
                step, index = step + 1, index + 1
            epoch, step = epoch + 1, 0

    def _units(self, epoch: int) -> list[Unit]:
        """The plan of an epoch; the latest one is kept."""
        held, units = self._plan
        if held != epoch:
            drawn = self.corpus.drawn(self.seed, epoch, shuffle=self.shuffle)
            lengths = self.corpus.lengths[drawn]
            units = plan_epoch(
                lengths, self.seed, epoch, packing=self.packing, capacity=self.capacity, shuffle=self.shuffle
            )
            if self.corpus.shares:
                units = [tuple(drawn[list(unit)].tolist()) for unit in units]
            self._plan = (epoch, units)
            if self.packing and units and self.capacity:
                self.efficiency = float(lengths.sum()) / (len(units) * self.capacity)
        return units

    def _total(self, epochs: float) -> int:
        whole = int(epochs)
        if not self.packing:
            steps = self.steps_in_epoch(0)
            return whole * steps + math.ceil((epochs - whole) * steps)
        rest = math.ceil((epochs - whole) * self.steps_in_epoch(whole)) if epochs > whole else 0
        return rest + sum(self.steps_in_epoch(epoch) for epoch in reversed(range(whole)))


def eval_loader(
    corpus: Corpus,
    *,
    units_per_batch: int = 1,
    packing: bool = False,
    capacity: int | None = None,
    rank: int = 0,
    world: int = 1,
    threads: int | None = None,
) -> Loader:
    """Every row exactly once over all ranks, in order, one microbatch a step; every rank gets as many steps."""
    return Loader(
        corpus,
        units_per_batch=units_per_batch,
        packing=packing,
        capacity=capacity,
        rank=rank,
        world=world,
        threads=threads,
        shuffle=False,
    )


def _default_threads(world: int) -> int:
    """Up to 8 of this process's share of the cores."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every platform
        cores = os.cpu_count() or 1
    return max(1, min(8, cores // world))
