"""A transformers image-text model as it is, for architectures that our decoder does not cover.

transformers' attention mixes neighbours of a packed row unless told otherwise in a model-dependent way, so here
nothing is packed inside: every segment of a batch becomes one row of a right-padded rectangle, the cache is off, and
rows cannot see each other. The price is padding; in return any model with this shape of its parts works::

    model.language_model   model.<tower, projector ...>   lm_head

Images enter as ``pixel_values [M, C, S, S]``, made from ``media.patches`` whose single patch per image is the whole
image. A minimal frame gets a row of its own, of image tokens only, which is computed and dropped: its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessera.config.errors import UserError
from tessera.contract.batch import Batch, Media
from tessera.contract.memory import Recompute
from tessera.contract.model import Head, LossSum, Objective
from tessera.contract.plan import Plan, matches
from tessera.models.tower import channel_major, normalise


class Whole(nn.Module):
    """``model`` and ``lm_head`` of a transformers image-text model under their own names."""

    def __init__(self, parts: nn.Module, image_token: int, image_slots: int) -> None:
        super().__init__()
        children = dict(parts.named_children())
        head = children.get("lm_head")
        if children.keys() != {"model", "lm_head"} or not isinstance(head, nn.Linear) or len(head.state_dict()) != 1:
            raise UserError(
                f"{type(parts).__name__} is not a transformers model of the form (model, lm_head without bias); "
                "it cannot be trained here"
            )
        self.model = children["model"]
        self.lm_head = head
        self._image_token = image_token
        self._image_slots = image_slots

    @property
    def head_weight(self) -> Tensor:
        """Weight ``[V, H]`` that turns hidden states into logits."""
        return self.lm_head.weight

    def forward(self, batch: Batch, objective: Objective | None = None) -> Tensor | LossSum:
        """``objective``'s sums over ``batch``; without one the hidden states ``[T, H]`` after the final norm."""
        hidden = self._hidden(batch)
        return hidden if objective is None else objective(hidden, Head(self.head_weight), batch)

    def set_recompute(self, plan: Plan, *, decoder: Recompute | bool, tower: bool) -> None:
        """Recompute activations at the plan's points: of the decoder as told (True: every layer), all of the tower's.

        UserError if the plan lacks a point that is asked for.
        """
        how = Recompute.of(decoder)
        how.check(plan)
        layers = [name for name, _ in self.named_modules() if any(matches(p, name) for p in plan.recompute_decoder)]
        chosen = {layers[i] for span in how.spans(len(layers)) for i in span}
        for name, module in self.named_modules():
            of_tower = any(matches(pattern, name) for pattern in plan.recompute_tower)
            if of_tower or name in layers:
                layer: Any = module  # a transformers layer; these two attributes are its own switch
                layer.gradient_checkpointing = tower if of_tower else name in chosen
                layer._gradient_checkpointing_func = _recomputed

    def _hidden(self, batch: Batch) -> Tensor:
        lengths, media = batch.segments.lengths, batch.media
        alone = media is not None and media.minimal
        longest = max(*lengths, self._image_slots) if alone else max(lengths)
        slots = torch.cat([torch.arange(n) + row * longest for row, n in enumerate(lengths)]).to(batch.tokens.device)
        rows = len(lengths) + alone
        ids = batch.tokens.new_zeros(rows * longest).index_copy_(0, slots, batch.tokens)
        mask = torch.zeros_like(ids).index_fill_(0, slots, 1)
        if alone:
            frame = slice((rows - 1) * longest, (rows - 1) * longest + self._image_slots)
            ids[frame], mask[frame] = self._image_token, 1
        out = self.model(
            input_ids=ids.view(rows, longest),
            attention_mask=mask.view(rows, longest),
            use_cache=False,
            **({} if media is None else _pixels(media)),
        )
        hidden: Tensor = out.last_hidden_state.flatten(0, 1).index_select(0, slots)
        return hidden


def _pixels(media: Media) -> dict[str, Tensor]:
    """The image arguments of a transformers model; ``media.extra`` wins where it is set."""
    if media.extra:
        return dict(media.extra)
    channels = len(media.normalisation.mean)
    side = int((media.patches.shape[1] / channels) ** 0.5)
    pixels = channel_major(normalise(media.patches, media.normalisation), channels)
    return {"pixel_values": pixels.unflatten(1, (channels, side, side))}


def _recomputed(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)
