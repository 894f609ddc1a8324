"""What a microbatch is: one packed, token-major row of sequences, with its images.

Padding is how most trainers turn ragged samples into tensors; it wastes compute and needs masks. Here the samples
("segments") of a microbatch are laid end to end in a single row of ``T`` tokens, and ``cu_seqlens`` says where one
ends and the next begins, so attention runs per segment and nothing leaks between them::

    tokens     a a a a b b c c c c c c          T = 12, S = 3 segments
    cu_seqlens 0       4   6           12
    dest           ^ ^       ^ ^ ^              rows of the vision tower land on these token slots

Targets are already shifted: ``targets[i]`` is the token that follows ``tokens[i]`` in its own segment, and
``loss_weight[i]`` how much predicting it counts (0 for prompts, images and the last token of a segment). Weights
replace the ``-100`` convention because preference, distillation and masked objectives all need them.

A batch is made on the CPU by loader threads and knows no model and no rank. Every integer a forward pass needs is
computed there too (``lengths``, ``max_seqlen``, the tower's window and interpolation indices), so a forward pass
never has to ask the device a question: no ``.item()``, no ``.tolist()``, no boolean indexing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Grid = tuple[int, int, int]
"""Patches of one media item as (temporal, height, width)."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Lengths of packed sequences, once on the host and once as ``cu_seqlens [S+1] int32`` on the device."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """Segments of these ``lengths`` (each >= 1), laid end to end."""
        host = tuple(int(n) for n in lengths)
        assert host and all(n > 0 for n in host), f"segment lengths must be positive, got {host}"
        cu = torch.zeros(len(host) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(host, dtype=torch.int32), 0, out=cu[1:])
        return cls(host, cu)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    def to(self, device: torch.device | str) -> Segments:
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class Normalisation:
    """How pixel levels 0..255 become the tower's input; ``mean`` and ``std`` per channel, on the 0..1 scale.

    ``fused`` selects between transformers' two roundings of the same formula: ``(x - 255 mean) / (255 std)`` in
    float32 (its default, torchvision processor), or rescale first, then normalise (its PIL processor).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float = 1 / 255
    fused: bool = True


@dataclass(frozen=True, slots=True)
class Route:
    """How tower features travel from the ranks that encoded them to those whose tokens they land on.

    Row ``picked[i]`` of this rank's features goes out ``i``-th; ``sent[r]`` rows go to rank ``r`` of the group and
    ``received[r]`` come from it, in the order of the batch's ``dest``. Host-side counts, device-side index.
    """

    picked: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]

    def to(self, device: torch.device | str) -> Route:
        return replace(self, picked=self.picked.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a packed row a context rank holds, and what its attention runs over.

    ``rows`` tokens lie on this rank, fillers included; all ranks of the group hold as many. ``own`` of those of this
    tensor rank are real ones, and they come first. ``queries`` are the runs of
    rows that attend together. With ``keys``, run ``i`` attends to its own key run, whose last row is its own last token
    (rows ``gathered`` of what all ranks hold, rank after rank). Without, ``queries`` are whole sequences in rows
    ``gathered``, and ``inverse`` is where each held row finds itself in them (-1: a filler).
    """

    rows: int
    queries: Segments
    own: int
    keys: Segments | None = None
    gathered: Tensor | None = None
    inverse: Tensor | None = None

    def to(self, device: torch.device | str) -> Shard:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            queries=self.queries.to(device),
            keys=None if self.keys is None else self.keys.to(device),
            gathered=move(self.gathered),
            inverse=move(self.inverse),
        )


@dataclass(frozen=True, slots=True)
class Media:
    """The images and videos of one microbatch, as the tower eats them.

    ``patches [P, D] uint8`` are pixel levels in the tower's patch order (``D = temporal_patch * patch * patch *
    channels``, as in an image; without ``temporal_patch`` if all items are single frames); ``grids [M, 3] int64`` are
    the items' (t, h, w) in patches and ``sizes`` the same on the host; row ``i`` of the tower's output goes to token
    slot ``dest[i]`` (``dest [V] int64``). ``owners[m]`` is the segment item ``m`` belongs to. ``tower`` holds the
    precomputed integer inputs of the tower under the names its forward takes, ``tower_segments`` the attention segments
    of the tower by the same name (e.g. ``cu_seqlens``).

    ``minimal`` marks the frame that a collator adds when no sample has media: it runs through the tower so that all
    ranks stay in step, lands on no token (``dest`` is empty) and enters the loss as ``0 * sum``.

    ``route`` is set where items are encoded by other ranks than those their tokens lie on.

    ``extra`` carries the model-specific tensors of the fallback family (whole transformers models) and is empty
    otherwise.
    """

    patches: Tensor
    grids: Tensor
    dest: Tensor
    sizes: tuple[Grid, ...]
    owners: tuple[int, ...]
    normalisation: Normalisation
    tower: Mapping[str, Tensor] = field(default_factory=dict)
    tower_segments: Mapping[str, Segments] = field(default_factory=dict)
    minimal: bool = False
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    route: Route | None = None

    def to(self, device: torch.device | str) -> Media:
        def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        return replace(
            self,
            patches=self.patches.to(device, non_blocking=True),
            grids=self.grids.to(device, non_blocking=True),
            dest=self.dest.to(device, non_blocking=True),
            tower=move(self.tower),
            tower_segments={name: segments.to(device) for name, segments in self.tower_segments.items()},
            extra=move(self.extra),
            route=None if self.route is None else self.route.to(device),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed microbatch of ``T`` tokens in ``S`` segments; see the module docstring for the picture.

    ``positions`` is ``[T]`` (RoPE) or ``[3, T]`` (m-RoPE: time, height, width), restarting in every segment.
    ``supervised [L] int64`` lists the slots whose ``loss_weight`` is not 0, so that the head and the loss touch only
    those. ``weight`` is the host-side sum of ``loss_weight``, ``sample_ids[s]`` the corpus row of segment ``s``
    (-1 for the filler segment of an empty microbatch).

    With a ``shard`` the row is one rank's part of a longer one (``parallel/context.py``): segments are then stretches
    of samples, and under tensor parallelism ``media.dest`` counts from the rank's own first row.
    """

    tokens: Tensor
    targets: Tensor
    loss_weight: Tensor
    positions: Tensor
    segments: Segments
    supervised: Tensor
    weight: float
    sample_ids: tuple[int, ...]
    media: Media | None = None
    shard: Shard | None = None

    def __post_init__(self) -> None:
        total = self.segments.total
        assert self.tokens.shape == self.targets.shape == self.loss_weight.shape == (total,)
        assert self.positions.shape[-1] == total
        assert len(self.sample_ids) == len(self.segments.lengths)

    @property
    def num_tokens(self) -> int:
        return self.segments.total

    @property
    def real_rows(self) -> int:
        """Rows on this rank that are tokens of samples: none of an empty microbatch, no fillers."""
        if all(index < 0 for index in self.sample_ids):
            return 0
        return self.num_tokens if self.shard is None else self.shard.own

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``; host-side integers are shared."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            loss_weight=self.loss_weight.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            segments=self.segments.to(device),
            supervised=self.supervised.to(device, non_blocking=True),
            media=None if self.media is None else self.media.to(device),
            shard=None if self.shard is None else self.shard.to(device),
        )
