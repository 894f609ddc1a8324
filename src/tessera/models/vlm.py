"""The model: embed tokens, put the tower's features on the image tokens, run the decoder, call the objective.

    tokens [T] --embed--> x [T, H] --------------> decoder --> hidden [T, H] --> objective --> LossSum
    patches [P, D] --tower--> features [V, H] --^ on rows ``dest``     (+ deepstack features between layers)

Submodules carry the names that transformers gives them in memory, so adapters and state dicts are interchangeable:
``model.language_model.layers.0...``, ``model.visual.blocks.0...``, ``lm_head``; without a tower ``model.layers.0...``

A model with a tower runs it on every batch. If no sample has an image the collator sends a minimal frame whose
``dest`` is empty: none of its rows land anywhere, and backward reaches the tower with zeros, so every rank of a
parallel run takes part in the same collectives. Nothing it computes, not even an infinity, can reach the loss.

For CPU attention the segments of a batch are laid out by length (``models/attention.py``); the model reorders the
row on entry and restores the order on exit, and nobody outside can tell.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tessera.contract.batch import Batch, Media
from tessera.contract.model import LossSum, Objective
from tessera.contract.plan import Plan, matches
from tessera.models.attention import permuted, plan
from tessera.models.decoder import Decoder, DecoderConfig, KVCache
from tessera.models.layers import Recomputable
from tessera.models.moe import Routing
from tessera.models.tower import Features, Tower


class Trunk(nn.Module):
    """Tower and decoder side by side; exists for the names ``model.visual`` and ``model.language_model``.

    A subclass may hold what it sees with under other names.
    """

    def __init__(self, visual: Tower, language_model: Decoder) -> None:
        super().__init__()
        self.visual = visual
        self.language_model = language_model

    @property
    def tower(self) -> nn.Module:
        """The vision tower, whatever its name."""
        return self.visual

    def look(self, media: Media, dtype: torch.dtype) -> Features:
        """Features of all items of ``media``, in order, as ``dtype``."""
        out: Features = self.visual(media, dtype)
        return out


class VLM(nn.Module):
    """A decoder, with or without a vision tower; see the module docstring.

    ``visual`` stands beside the decoder in a :class:`Trunk`; ``trunk`` makes another trunk around the decoder.
    """

    def __init__(
        self, config: DecoderConfig, visual: Tower | None = None, trunk: Callable[[Decoder], Trunk] | None = None
    ) -> None:
        super().__init__()
        decoder = Decoder(config)
        if visual is not None:
            self.model: Trunk | Decoder = Trunk(visual, decoder)
        else:
            self.model = decoder if trunk is None else trunk(decoder)
        # A tied head has no parameter of its own: transformers, too, stores only the embedding.
        self.lm_head = None if config.tied else nn.Linear(config.hidden, config.vocab, bias=False)

    @property
    def decoder(self) -> Decoder:
        return self.model.language_model if isinstance(self.model, Trunk) else self.model

    @property
    def visual(self) -> nn.Module | None:
        return self.model.tower if isinstance(self.model, Trunk) else None

    @property
    def head_weight(self) -> Tensor:
        """Weight ``[V, H]`` that turns hidden states into logits."""
        return self.decoder.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self, batch: Batch, objective: Objective | None = None, routing: Routing | None = None
    ) -> Tensor | LossSum:
        """``objective``'s sums over ``batch``; without one the hidden states ``[T, H]`` after the final norm.

        ``routing`` collects what the routers did, if the model has any.
        """
        hidden = self._hidden(batch, routing=routing)
        return hidden if objective is None else objective(hidden, self.head_weight, batch)

    def prefill(self, batch: Batch, cache: KVCache) -> Tensor:
        """Fill row ``s`` of ``cache`` with segment ``s``; hidden states ``[S, H]`` of each segment's last token."""
        ends = batch.segments.cu_seqlens[1:].long() - 1
        return self._hidden(batch, cache).index_select(0, ends)

    def step(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """One token ``[B]`` more in every row of ``cache``, at ``positions`` ``[B]`` or ``[3, B]``, to ``[B, H]``."""
        cache.extend(tokens.device)
        decoder = self.decoder
        out: Tensor = decoder(decoder.embed(tokens), positions, None, cache=cache)
        return out

    def set_recompute(self, plan: Plan, *, decoder: bool, tower: bool) -> None:
        """Switch activation recomputation on or off at the plan's points of the decoder and of the tower."""
        for patterns, on in ((plan.recompute_decoder, decoder), (plan.recompute_tower, tower)):
            for name, module in self.named_modules():
                if any(matches(pattern, name) for pattern in patterns):
                    assert isinstance(module, Recomputable), f"{name} cannot be recomputed"
                    module.recompute = on

    def _hidden(self, batch: Batch, cache: KVCache | None = None, routing: Routing | None = None) -> Tensor:
        decoder, media, trunk = self.decoder, batch.media, self.model
        x = decoder.embed(batch.tokens)
        layout = plan(batch.segments, causal=True, dtype=x.dtype)
        x, positions = permuted(x, layout.order, layout.inverse), batch.positions
        if layout.order is not None:
            positions = positions.index_select(-1, layout.order)
        if cache is not None:
            cache.fill(batch.segments, layout.order)
        dest: Tensor | None = None
        deepstack: tuple[Tensor, ...] = ()
        if media is not None and isinstance(trunk, Trunk):
            dest = media.dest if layout.inverse is None else layout.inverse.index_select(0, media.dest)
            features = trunk.look(media, x.dtype).landing(dest.shape[0])
            x, deepstack = x.index_copy(0, dest, features.final), features.deepstack
        hidden: Tensor = decoder(x, positions, layout, deepstack, dest, cache, routing)
        return permuted(hidden, layout.inverse, layout.order)
