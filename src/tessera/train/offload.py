"""Activations in host memory: what a layer saves for backward goes down a side stream and comes back just in time.

Autograd lets a program replace every tensor that it saves (``saved_tensors_hooks``). While a chosen layer runs, each
large saved tensor is copied to pinned host memory; backward meets a ticket instead and turns it into a tensor again.
Copies run beside the computation: a layer's way down overlaps the next layer's forward, and when backward reaches a
layer, the one before it is already on its way up::

    compute   f0  f1  f2  |  b2  b1  b0
    copies      d0  d1    |  u1  u0          (the last layer is needed at once and stays)

What is copied is the *storage*, once, however many views of it are saved. Small tensors and weights stay, whether the
parameter itself or autocast's 16-bit copy of it. Values are never changed, so training is bit for bit the same. On a
CPU the copies are made too, in order, and save nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**20
"""Bytes below which a storage stays: the copy's fixed cost would exceed what it frees."""

WASTE = 4
"""A view stays if its storage is more than this many times larger: the rest of it is not ours to move."""


class _Trip:
    """One storage on the host, and on the device again from its prefetch to its last use."""

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host = host
        self.device = device
        self.back: Tensor | None = None


class _Visit:
    """One pass through one layer: its storages, and the visit before it, whose return this one's backward starts."""

    def __init__(self, before: _Visit | None) -> None:
        self.trips: dict[int, _Trip] = {}
        self.kept: list[Tensor] = []  # while the layer runs: an address may not be reused under its key
        # Tickets in the graph keep a visit alive. A strong reference here would keep the whole chain.
        self.before = None if before is None else weakref.ref(before)
        self.weights: set[int] | None = None
        self.ready: Any = None
        self.fetched = False


class _Ticket:
    """What autograd holds in place of a saved tensor: a view of a storage on the host."""

    def __init__(self, visit: _Visit, trip: _Trip, saved: Tensor) -> None:
        self.visit = visit
        self.trip = trip
        self.dtype, self.offset = saved.dtype, saved.storage_offset()
        self.size, self.stride = saved.size(), saved.stride()


class HostStore:
    """Saved tensors of the first ``num_layers`` decoder layers on the host (None: all but the last).

    ``bytes_down`` and ``bytes_up`` count what was copied.
    """

    def __init__(self, num_layers: int | None = None, *, smallest: int = SMALLEST) -> None:
        self.num_layers = num_layers
        self.smallest = smallest
        self.bytes_down = 0
        self.bytes_up = 0
        self._last: weakref.ref[_Visit] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def visit(self, group: range, layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Run the layers of ``group`` in this; see :class:`~tessera.contract.memory.ActivationStore`."""
        chosen = len(layers) - 1 if self.num_layers is None else self.num_layers
        return self._moving(group, layers) if group.start < chosen else nullcontext()

    @contextmanager
    def _moving(self, group: range, layers: Sequence[nn.Module]) -> Iterator[None]:
        before = self._last() if self._last is not None and group.start > 0 else None
        visit = _Visit(before)
        self._last = weakref.ref(visit)

        def pack(saved: Tensor) -> Tensor | _Ticket:
            if visit.weights is None and self._large(saved):  # not earlier: sharded weights are gathered by now
                running = (p for position in group for p in layers[position].parameters())
                visit.weights = {p.untyped_storage().data_ptr() for p in running if type(p.data) is Tensor}
            return self._down(visit, saved) if self._moves(saved, visit) else saved

        def unpack(packed: Tensor | _Ticket) -> Tensor:
            return self._up(packed) if isinstance(packed, _Ticket) else packed

        with saved_tensors_hooks(pack, unpack):
            yield
        visit.kept.clear()

    def _large(self, saved: Tensor) -> bool:
        # A parameter stays, and so does a kind of tensor whose bytes are not all there is to it.
        plain = type(saved) is Tensor and saved.layout is torch.strided
        return plain and self.smallest <= saved.untyped_storage().nbytes() <= WASTE * saved.nbytes

    def _moves(self, saved: Tensor, visit: _Visit) -> bool:
        if visit.weights is None or not self._large(saved):
            return False
        return saved.untyped_storage().data_ptr() not in visit.weights and not _of_weight(saved)

    def _down(self, visit: _Visit, saved: Tensor) -> _Ticket:
        storage = saved.untyped_storage()
        key = storage.data_ptr()
        if key not in visit.trips:
            flat = torch.empty(0, dtype=torch.uint8, device=saved.device).set_(storage)
            visit.trips[key] = _Trip(self._copied_down(flat), saved.device)
            visit.kept.append(flat)
            self.bytes_down += flat.numel()
        return _Ticket(visit, visit.trips[key], saved)

    def _copied_down(self, flat: Tensor) -> Tensor:
        if flat.device.type != "cuda":
            return flat.clone()
        stream = self._stream(flat.device)
        stream.wait_stream(torch.cuda.current_stream(flat.device))
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(flat, non_blocking=True)
        flat.record_stream(stream)  # the device memory is free for others only after the copy
        return host

    def _up(self, ticket: _Ticket) -> Tensor:
        visit, trip = ticket.visit, ticket.trip
        self._fetch(visit)
        before = None if visit.before is None else visit.before()
        if before is not None:
            self._fetch(before)
        if visit.ready is not None:
            torch.cuda.current_stream(trip.device).wait_event(visit.ready)
        assert trip.back is not None
        view = torch.empty(0, dtype=ticket.dtype, device=trip.device)
        view.set_(trip.back.untyped_storage(), ticket.offset, ticket.size, ticket.stride)
        return view

    def _fetch(self, visit: _Visit) -> None:
        """Start the way up of everything ``visit`` holds, once."""
        if visit.fetched:
            return
        visit.fetched = True
        for trip in visit.trips.values():
            self.bytes_up += trip.host.numel()
            if trip.device.type != "cuda":
                trip.back = trip.host.clone()
                continue
            stream = self._stream(trip.device)
            trip.back = torch.empty(trip.host.shape, dtype=torch.uint8, device=trip.device)
            stream.wait_stream(torch.cuda.current_stream(trip.device))
            with torch.cuda.stream(stream):
                trip.back.copy_(trip.host, non_blocking=True)
                visit.ready = stream.record_event()
            trip.back.record_stream(stream)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _of_weight(saved: Tensor) -> bool:
    """Whether ``saved`` is a parameter seen through casts and views: its graph leads straight to a leaf."""
    node: Any = saved.grad_fn
    for _ in range(4):
        if node is None or len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
        if type(node).__name__ == "AccumulateGrad":
            return isinstance(node.variable, nn.Parameter)
    return False
