"""Saving while training goes on (``--async_save true``).

A save has two halves. *Staging* copies what the next step would change into host memory; only for that does training
stand still. *Writing* takes the copy to the disk in a thread, in the same order as a save that training waits for::

    train   step 200 | stage | step 201 | step 202 | step 203 ...
    thread                   | write on all ranks, flush, rename |

So a checkpoint saved this way is that of its step, bit for bit, and appears complete or not at all. One save is under
way at a time: the next one waits for it, and so do the end of training and a stop by signal. What goes wrong in the
thread (a full disk) is raised by the next :meth:`Publisher.poll`, in the thread that trains.

Host memory for the copy is allocated once (pinned, where there is a GPU) and used again by every save.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tessera.checkpoint.store import Store

Write = Callable[[Path], None]
"""Writes this rank's part of a checkpoint into a directory; every rank calls its own."""


@dataclass(slots=True)
class HostCopies:
    """Copies of this rank's tensors in host memory, by name; valid until :meth:`begin`."""

    _held: dict[str, Tensor] = field(default_factory=dict)
    _fresh: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """The copies may be overwritten from here on."""
        self._fresh.clear()

    @torch.no_grad()
    def copy(self, name: str, values: Tensor) -> Tensor:
        """The copy called ``name``, made of ``values`` unless it was made since :meth:`begin`."""
        held = self._held.get(name)
        if held is None or held.shape != values.shape or held.dtype != values.dtype:
            held = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._held[name] = held
            self._fresh.discard(name)
        if name not in self._fresh:
            held.copy_(values, non_blocking=values.is_cuda)
            self._fresh.add(name)
        return held

    def settle(self) -> None:
        """Wait until all copies are there."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


@dataclass(slots=True)
class Publisher:
    """Publishes checkpoints through ``store``: at once, or with ``aside`` in a thread; ``say`` announces them.

    With ``aside``, the store's barrier and what is published must use no group of ranks that training uses.
    """

    store: Store
    say: Callable[[str], None]
    aside: bool = False
    _pool: ThreadPoolExecutor | None = None
    _pending: Future[Path] | None = None

    def publish(self, step: int, stage: Callable[[], Write], *, metric: float | None = None) -> Path:
        """Save ``checkpoint-<step>``: ``stage`` now, then what it returns; the path, which may be yet to appear.

        UserError if the disk refused this save or, with ``aside``, the one before.
        """
        self.wait()
        write = stage()
        if not self.aside:
            path = self.store.publish(step, write, metric=metric)
            self.say(f"Saved checkpoint {path}")
            return path
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="tessera-save")
        self._pending = self._pool.submit(self.store.publish, step, write, metric=metric)
        return self.store.path_of(step)

    def poll(self) -> None:
        """If a save has ended, say so; UserError if it failed."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until no save is under way; UserError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self.say(f"Saved checkpoint {pending.result()}")
