"""A model that lives in a scheduler, with its cache and what it remembers: it reads prompts and steps rows.

A prompt is read in one pass or, if it is long, in several. A pass that starts at the first token needs nothing from the
cache and attends within itself; one that goes on behind tokens that are there already, from an earlier pass or from an
earlier prompt, attends to the row. The tower sees only images that some token of the pass stands for, and of those
only the ones nobody asked about before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tessera.contract.batch import Normalisation
from tessera.contract.model import Geometry
from tessera.infer.choice import Choice
from tessera.infer.features import Image, Sights, encode
from tessera.infer.prefix import BLOCK, Prefixes
from tessera.infer.prompt import Prompt, prompt_of
from tessera.models.cache import Budget, KVCache, Row
from tessera.models.tower import Features
from tessera.models.vlm import VLM

AHEAD = 64
"""Tokens of its answer that a row gets room for when it starts; it moves to a longer lane when it needs more."""


@dataclass(eq=False, slots=True)
class Running:
    """An answer with its row of the cache; several answers while their common prompt is read.

    Of its prompt, ``cached`` tokens were copied. ``price`` tokens of cache are promised to each answer.
    """

    choices: list[Choice]
    prompt: Prompt
    row: Row
    cached: int
    price: int

    @property
    def choice(self) -> Choice:
        return self.choices[0]

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return len(self.prompt) - self.row.length

    @property
    def position(self) -> int:
        """Where the newest token stands."""
        return self.prompt.following + self.choice.count - 1


Parts = Sequence[tuple[Running, int]]
"""So many more tokens of these prompts."""


@dataclass(frozen=True, slots=True)
class Sight:
    """How images reach the tower."""

    geometry: Geometry
    normalisation: Normalisation
    device: torch.device


class Resident:
    """See the module docstring. ``adapter`` is the model's name; ``reading`` and ``running`` are its rows."""

    def __init__(
        self, adapter: str | None, model: VLM, budget: Budget, sight: Sight, *, blocks: int, tower_bytes: int
    ) -> None:
        decoder = model.decoder.config
        self.adapter, self.model = adapter, model
        self.cache = KVCache(
            decoder.layers, decoder.kv_heads, decoder.head_dim, model.decoder.embed_tokens.weight, budget
        )
        self.prefixes, self.sights = Prefixes(blocks), Sights(tower_bytes)
        self.reading: list[Running] = []
        self.running: dict[Row, Running] = {}
        self.encoded = self.reused = 0
        # How many prompts that are being read have a block of this name.
        self._coming: Counter[bytes] = Counter()
        self._sight = sight

    def known(self, prompt: Prompt) -> int:
        """Tokens of ``prompt`` that need not be read; its last one always is, for what follows it."""
        return BLOCK * self.prefixes.known(prompt.blocks[: (len(prompt) - 1) // BLOCK])

    def coming(self, prompt: Prompt, known: int) -> int:
        """Tokens of ``prompt`` behind the ``known`` ones that somebody is reading right now."""
        if len(prompt.blocks) > self.prefixes.blocks:
            return 0
        blocks = prompt.blocks[known // BLOCK : (len(prompt) - 1) // BLOCK]
        return BLOCK * next((index for index, name in enumerate(blocks) if not self._coming[name]), len(blocks))

    def start(self, choices: list[Choice], prompt: Prompt, known: int, price: int, *, aside: bool) -> Running:
        """Begin to read ``prompt`` for ``choices``; ``aside`` if that takes more than one pass."""
        row = self.cache.join(len(prompt) + min(AHEAD, choices[0].room), aside=aside)
        if known:
            self.prefixes.copy(prompt.blocks[: known // BLOCK], self.cache.read(row, 0, known))
            row.length = known
        held = Running(choices, prompt, row, known, price)
        self.reading.append(held)
        self._coming.update(prompt.blocks)
        self.reused += sum(image.features is not None for image in prompt.images)
        return held

    def end(self, held: Running, *, wipe: bool = False, remember: bool = False) -> None:
        """Let go of a row; ``remember`` what was said, for a conversation that goes on."""
        if remember and held.choice.tokens:
            tokens = np.concatenate([held.prompt.tokens, np.array(held.choice.tokens, dtype=np.int64)])
            whole = prompt_of(tokens[: held.row.length], held.prompt.positions, held.prompt.images, self.adapter)
            self.prefixes.store(whole.blocks, self.cache.read(held.row, 0, held.row.length))
        self.cache.leave(held.row, wipe=wipe)
        if self.running.pop(held.row, None) is None:
            self._been_read(held)

    def forget(self) -> None:
        """Drop what is remembered of prompts and images."""
        self.prefixes.forget()
        self.sights.forget()

    def step(self) -> tuple[list[Running], Tensor]:
        """One token on in every running row: the rows in some order, and hidden states ``[B, H]``."""
        through = self.cache.stepping()
        rows = [self.running[row] for row in through.rows]
        fed = torch.tensor([[held.choice.last for held in rows], [held.position for held in rows]])
        tokens, positions = fed.to(self.cache.device)
        return rows, self.model.extend(tokens, positions, through)

    def read(self, parts: Parts) -> tuple[list[Running], Tensor]:
        """Read on, in prompts that are all new or all begun: those that are done, and hidden states ``[S, H]``."""
        features, dest = self._seen(parts)
        spans = [(held, held.row.length, held.row.length + count) for held, count in parts]
        tokens = np.concatenate([held.prompt.tokens[start:end] for held, start, end in spans])
        positions = torch.cat([held.prompt.positions[..., start:end] for held, start, end in spans], dim=-1)
        through = self.cache.filling([(held.row, count) for held, count in parts])
        device = self.cache.device
        hidden = self.model.extend(
            torch.from_numpy(tokens).to(device),
            positions.to(device),
            through,
            features,
            None if dest is None else dest.to(device),
        )
        done = [index for index, (held, _) in enumerate(parts) if not held.unread]
        rows: list[Running] = []
        owners: list[int] = []
        for index in done:
            answers = self._answers(parts[index][0])
            rows += answers
            owners += [index] * len(answers)
        return rows, hidden[torch.tensor(owners, dtype=torch.int64, device=device)]

    def _answers(self, held: Running) -> list[Running]:
        """The rows of a prompt that has been read, one per choice; from now on they run."""
        prompt = held.prompt
        self.prefixes.store(prompt.blocks, self.cache.read(held.row, 0, len(prompt)))
        # Pixels and features have done their work.
        held.prompt = replace(prompt, images=tuple(Image(image.key, image.grid, image.dest) for image in prompt.images))
        self._been_read(held)
        self.cache.bring(held.row)
        answers, others = [held], held.choices[1:]
        held.choices = held.choices[:1]
        for choice in others:
            answers.append(replace(held, choices=[choice], row=self.cache.fork(held.row)))
        self.running.update((answer.row, answer) for answer in answers)
        return answers

    def _been_read(self, held: Running) -> None:
        """Nobody needs to wait for the prompt of ``held`` any more."""
        self.reading.remove(held)
        self._coming -= Counter(held.prompt.blocks)

    def _seen(self, parts: Parts) -> tuple[Features | None, Tensor | None]:
        """The features that land on tokens of a pass over ``parts``, and where."""
        pieces: list[tuple[Image, slice]] = []
        dest: list[np.ndarray] = []
        offset = 0
        for held, count in parts:
            start = held.row.length
            for image in held.prompt.images:
                first, behind = np.searchsorted(image.dest, (start, start + count))
                if behind > first:
                    pieces.append((image, slice(int(first), int(behind))))
                    dest.append(image.dest[first:behind] - start + offset)
            offset += count
        if not pieces:
            return None, None
        self._encode([image for image, _ in pieces])
        found = [(image.features, part) for image, part in pieces]
        levels = [
            torch.cat([(f.final, *f.deepstack)[level][part] for f, part in found if f is not None])
            for level in range(1 + len(found[0][0].deepstack if found[0][0] is not None else ()))
        ]
        return Features(levels[0], tuple(levels[1:])), torch.from_numpy(np.concatenate(dest))

    def _encode(self, images: Sequence[Image]) -> None:
        """Give every image its features, from memory or from the tower."""
        new: dict[bytes, Image] = {}
        for image in images:
            if image.features is None:
                image.features = self.sights.find(image.key)
                self.reused += image.features is not None
            if image.features is None:
                self.reused += image.key in new
                new.setdefault(image.key, image)
        # Stills and frames are patches of different widths.
        for width in sorted({image.patches.shape[1] for image in new.values() if image.patches is not None}):
            group = [image for image in new.values() if image.patches is not None and image.patches.shape[1] == width]
            sight = self._sight
            made = encode(self.model, group, sight.geometry, sight.normalisation, sight.device)
            self.encoded += len(group)
            for image, features in zip(group, made, strict=True):
                image.features = features
                self.sights.keep(image.key, features)
        for image in images:
            if image.features is None:
                image.features = new[image.key].features
            assert image.features is not None
