"""Batches in an order that only the seed decides, made by threads ahead of time.

The order is index arithmetic: :func:`~tessera.data.pack.plan_epoch` lists the units of an epoch, ``units_per_batch *
accumulation * world`` of them make one global step, and rank ``r`` of ``w`` takes every ``w``-th of them from its
``r``-th. One process that accumulates ``2n`` batches therefore sees the very units that two ranks with ``n`` see. Where
training stands is three integers (epoch, step in it, step overall), the same on every rank; resuming is setting them.

An epoch ends with a step that has what is left of it. With ``drop_last`` every step is whole: it goes on with the units
of the next epoch (the second integer then counts units), and what is left of the last one is dropped.

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

    """A cursor: ``step`` counts the steps of this epoch, or with ``drop_last`` its units, ``index`` all steps."""

    epoch: int
    step: int
    index: int


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
        drop_last: bool = False,
    ) -> None:
        if packing:
            longest = int(corpus.lengths.max(initial=0))
            capacity = capacity or longest
            if longest > capacity:
                raise UserError(f"--packing_length {capacity} is shorter than the longest row ({longest} tokens)")
        self.corpus, self.packing, self.capacity, self.shuffle = corpus, packing, capacity, shuffle
        self.units_per_batch, self.accumulation, self.seed = units_per_batch, accumulation, seed
        self.rank, self.world, self.pin_memory, self.drop_last = rank, world, pin_memory, drop_last
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
        steps = self._count(epoch) / self.units_per_step
        return max(1, int(steps)) if self.drop_last else math.ceil(steps)

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
            "drop_last": self.drop_last,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; UserError if the data or the order would not be the same."""
        here = self.state()
        meaning = {
            "fingerprint": "the dataset, its template or --max_length has changed",
            "seed": "--data_seed has changed",
            "units_per_step": "batch size x accumulation x processes has changed",
            "packing": "--packing or --packing_length has changed",
            "drop_last": "--dataloader_drop_last has changed",
        }
        state = {"drop_last": False, **state}
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
            for after, done, batches in self._coming():
                started = time.perf_counter()
                made = [self.batch(units) for units in batches]
                self.waited += time.perf_counter() - started
                yield self._step(after, done, made)
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
        queue: deque[tuple[_Place, float, list[Future[Batch]]]] = deque()

        def refill() -> None:
            while sum(len(futures) for _, _, futures in queue) < self.threads + 2:
                coming = next(steps, None)
                if coming is None:
                    return
                after, done, batches = coming
                queue.append((after, done, [pool.submit(self.batch, units) for units in batches]))

        refill()
        while queue:
            after, done, futures = queue.popleft()
            started = time.perf_counter()
            made = [future.result() for future in futures]
            self.waited += time.perf_counter() - started
            refill()
            yield self._step(after, done, made)

    def _step(self, after: _Place, done: float, batches: list[Batch]) -> Step:
        """The step before ``after``, which the cursor moves to; it ends after ``done`` epochs."""
        self._next = after
        return Step(batches, done, after.index - 1)

    def _coming(self) -> Iterator[tuple[_Place, float, list[list[Unit]]]]:
        """Of every step to come: the cursor and the epochs behind it, and this rank's units by microbatch."""
        if not len(self.corpus):
            return
        for after, done, units in self._whole() if self.drop_last else self._by_epoch():
            mine = units[self.rank :: self.world]
            starts = range(0, self.units_per_batch * self.accumulation, self.units_per_batch)
            yield after, done, [mine[at : at + self.units_per_batch] for at in starts]

    def _by_epoch(self) -> Iterator[tuple[_Place, float, list[Unit]]]:
        """Steps of which the last one of an epoch has what is left of it."""
        epoch, step, index = self._next.epoch, self._next.step, self._next.index
        while index < self.total_steps:
            units = self._units(epoch)
            steps = math.ceil(len(units) / self.units_per_step)
            for first in range(step * self.units_per_step, len(units), self.units_per_step):
                if index >= self.total_steps:
                    return
                step, index = step + 1, index + 1
                after = _Place(epoch + 1, 0, index) if step == steps else _Place(epoch, step, index)
                yield after, epoch + step / steps, units[first : first + self.units_per_step]
            epoch, step = epoch + 1, 0

    def _whole(self) -> Iterator[tuple[_Place, float, list[Unit]]]:
        """Whole steps, which may begin in one epoch and end in the next."""
        epoch, first, index = self._next.epoch, self._next.step, self._next.index
        while index < self.total_steps:
            taken: list[Unit] = []
            done = 0.0
            while len(taken) < self.units_per_step:
                units = self._units(epoch)
                part = units[first : first + self.units_per_step - len(taken)]
                taken, first = taken + part, first + len(part)
                done = epoch + first / len(units)
                if first == len(units):
                    epoch, first = epoch + 1, 0
            index += 1
            yield _Place(epoch, first, index), done, taken

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

    def _count(self, epoch: int) -> int:
        """Units of an epoch."""
        return len(self._units(epoch)) if self.packing else self.corpus.epoch_rows

    def _total(self, epochs: float) -> int:
        whole = int(epochs)
        if self.drop_last:
            return self._whole_total(whole, epochs - whole)
        if not self.packing:
            steps = self.steps_in_epoch(0)
            return whole * steps + math.ceil((epochs - whole) * steps)
        rest = math.ceil((epochs - whole) * self.steps_in_epoch(whole)) if epochs > whole else 0
        return rest + sum(self.steps_in_epoch(epoch) for epoch in reversed(range(whole)))

    def _whole_total(self, whole: int, part: float) -> int:
        """Megatron-SWIFT's count: of each epoch what all ranks get alike, cut into whole steps."""
        alike = self.units_per_batch * self.world
        counts = [self._count(epoch) // alike * alike for epoch in reversed(range(whole + (part > 0)))]
        if part > 0:
            counts[0] = int(counts[0] * part)
        steps = sum(counts) // self.units_per_step
        if not steps and len(self.corpus):
            unit = "packs" if self.packing else "rows"
            raise UserError(
                f"--global_batch_size {self.units_per_step}: {sum(counts)} training {unit} "
                "make no whole step; lower it, or add --dataloader_drop_last false"
            )
        return steps


def eval_loader(
    corpus: Corpus,
    *,
    units_per_batch: int = 1,
    packing: bool = False,
    capacity: int | None = None,
    rank: int = 0,
    world: int = 1,
    threads: int | None = None,
    most: int | None = None,
) -> Loader:
    """Every row exactly once over all ranks, in order, one microbatch a step; every rank gets as many steps.

    ``most`` ends it after so many rows (packs), rounded up to a microbatch on every rank.
    """
    loader = Loader(
        corpus,
        units_per_batch=units_per_batch,
        packing=packing,
        capacity=capacity,
        rank=rank,
        world=world,
        threads=threads,
        shuffle=False,
    )
    if most is not None:
        loader.total_steps = min(loader.total_steps, math.ceil(most / loader.units_per_step))
    return loader


def _default_threads(world: int) -> int:
    """Up to 8 of this process's share of the cores."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every platform
        cores = os.cpu_count() or 1
    return max(1, min(8, cores // world))
