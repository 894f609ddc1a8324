"""Packed reference batches as requests to a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from tessera.contract.batch import Batch
from tessera.data.render import Encoded
from tessera.data.sample import Message, Sample
from tessera.infer.features import Image
from tessera.infer.limits import Limits
from tessera.infer.prompt import Prompt, prompt_of
from tessera.infer.request import Event, Failed, Finished, Piece, Question, Request
from tessera.infer.sampling import Sampling
from tessera.infer.scheduler import Scheduler, Sizes
from tessera.infer.session import Answer
from tests.parity import reference as ref


def prompts_of(batch: Batch, config: Mapping[str, Any], adapter: str | None = None) -> list[Prompt]:
    """The segments of ``batch``; the content of an image is its patches."""
    geometry, media = ref.geometry_of(dict(config)), batch.media
    lengths, out, start = list(batch.segments.lengths), [], 0
    patches = [] if media is None else list(media.patches.split([t * h * w for t, h, w in media.sizes]))
    dest = [] if media is None else media.dest.tolist()
    for owner, length in enumerate(lengths):
        images = []
        for index, grid in enumerate(() if media is None else media.sizes):
            if media is not None and not media.minimal and media.owners[index] == owner:
                count = grid[0] * grid[1] * grid[2] // geometry.merge_size**2
                where, dest = np.array(dest[:count]) - start, dest[count:]
                key = blake2b(patches[index].numpy().tobytes() + repr(grid).encode()).digest()
                images.append(Image(key, grid, where, patches=patches[index]))
        tokens = batch.tokens[start : start + length].numpy()
        out.append(prompt_of(tokens, batch.positions[..., start : start + length], tuple(images), adapter))
        start += length
    return out


def request(sampling: Sampling | None = None, **settings: Any) -> Request:
    """A request about nothing in particular."""
    encoded = Encoded(np.zeros(1, np.int64), np.zeros(1, np.float32))
    question = Question({}, Sample((Message("user", "?"),)), None, encoded, 0)
    return Request(question, sampling or Sampling(), **settings)


def spell(ids: Sequence[int]) -> str:
    """A decoder for models without a tokenizer."""
    return "".join(f"<{token}>" for token in ids)


def scheduler_of(model: Any, config: Mapping[str, Any], limits: Limits, **settings: Any) -> Scheduler:
    """A scheduler around one model, or around several by adapter."""
    models = model if isinstance(model, dict) else {None: model}
    sizes = Sizes(**{"rows": 32, "cache_tokens": 1 << 16, "prefix_tokens": 1 << 12, **settings})
    return Scheduler(models, limits, ref.geometry_of(dict(config)), spell, sizes=sizes)


def run(scheduler: Scheduler, hear: Callable[[Event], None] | None = None) -> dict[tuple[str, int], Answer]:
    """Step until nothing is left; answers by request and choice."""
    tokens: dict[tuple[str, int], list[int]] = {}
    found: dict[tuple[str, int], Answer] = {}
    while not scheduler.idle:
        for event in scheduler.step():
            if hear is not None:
                hear(event)
            assert not isinstance(event, Failed), event.error
            key = (event.request, event.choice)
            if isinstance(event, Piece):
                tokens.setdefault(key, []).extend(event.tokens)
            elif isinstance(event, Finished):
                found[key] = Answer(tuple(tokens.get(key, ())), event.prompt_tokens, event.reason == "stop")
    return found


def answers(
    model: Any, config: Mapping[str, Any], batch: Batch, limits: Limits, sampling: Sampling, **settings: Any
) -> list[Answer]:
    """One answer per segment; segment ``s`` draws by seed 100 + s."""
    scheduler = scheduler_of(model, config, limits, **settings)
    asked = [request(sampling, seed=100 + index) for index in range(len(batch.segments.lengths))]
    for one, prompt in zip(asked, prompts_of(batch, config), strict=True):
        scheduler.add(one, prompt)
    found = run(scheduler)
    return [found[one.id, 0] for one in asked]
