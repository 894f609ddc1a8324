"""How much is run and kept at a time: a share of the memory there is.

Three things live beside the weights: keys and values of running rows, those of earlier prompts, and what the tower made
of images. All have limits in bytes; nothing grows beyond them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from tessera.infer.limits import Limits
from tessera.infer.scheduler import Sizes
from tessera.models.cache import size_class, token_bytes
from tessera.models.vlm import VLM

ON_GPU, ON_CPU = 0.85, 0.25
"""Share of the memory that is free on a GPU, or of all that a machine has."""

ROWS, PREFIXES, TOWER = 0.75, 0.2, 0.05
"""How it is divided."""

READ_ON_GPU, READ_ON_CPU = 8192, 512
"""Tokens of prompts that are read per step: about as many as keep the device busy."""

KEPT_TOKENS = 1 << 19
"""More of earlier prompts is not kept, however much memory there is."""

KEPT_BYTES = 1 << 31
"""The same for what the tower made."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model asks of memory: bytes per token, its longest sequence, rows that should run together."""

    token_bytes: int
    longest: int
    rows: int
    device: torch.device

    @classmethod
    def of(cls, model: VLM, limits: Limits, device: torch.device, rows: int) -> Demand:
        """The demand of ``model``."""
        config, dtype = model.decoder.config, model.decoder.embed_tokens.weight.dtype
        size = token_bytes(config.layers, config.kv_heads, config.head_dim, dtype)
        return cls(size, limits.max_positions, rows, device)


def available(device: torch.device) -> int:
    """Bytes that may be used beside the weights."""
    if device.type == "cuda":
        return int(ON_GPU * torch.cuda.mem_get_info(device)[0])
    return int(ON_CPU * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def sizes_for(demand: Demand, room: int | None = None) -> Sizes:
    """Sizes that fit ``room`` bytes (None: what is available) and ``demand``."""
    room = available(demand.device) if room is None else room
    most = demand.rows * size_class(min(demand.longest, 1 << 20))
    return Sizes(
        rows=demand.rows,
        cache_tokens=max(min(int(ROWS * room) // demand.token_bytes, most), 64),
        prefix_tokens=min(int(PREFIXES * room) // demand.token_bytes, KEPT_TOKENS),
        tower_bytes=min(int(TOWER * room), KEPT_BYTES),
        prefill_tokens=READ_ON_GPU if demand.device.type == "cuda" else READ_ON_CPU,
    )
