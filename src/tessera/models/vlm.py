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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tessera.contract.batch import Batch, Media
from tessera.contract.memory import Recompute
from tessera.contract.model import Head, LossSum, Objective
from tessera.contract.plan import Plan, matches
from tessera.models.attention import permuted, plan
from tessera.models.cache import Pass
from tessera.models.decoder import Decoder, DecoderConfig
from tessera.models.layers import Recomputable, RMSNorm
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

    @property
    def levels(self) -> int:
        """How many deepstack levels come with the features."""
        return len(self.visual.config.deepstack)

    @property
    def seeing(self) -> list[nn.Module]:
        """Everything beside the decoder: the tower, and a projector if it stands apart."""
        return [module for name, module in self.named_children() if name != "language_model"]

    def blind(self) -> None:
        """Forget the tower: this process never encodes images."""
        for name in [name for name, _ in self.named_children() if name != "language_model"]:
            delattr(self, name)

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
        hidden = self.run(batch, routing=routing)
        return hidden if objective is None else self.loss(hidden, objective, batch)

    def loss(self, hidden: Tensor, objective: Objective, batch: Batch) -> LossSum:
        """``objective``'s sums over this rank's hidden states ``[T, H]`` of ``batch``."""
        seams = self.decoder.seams
        head = Head(seams.vocabulary.part(self.head_weight), seams.vocabulary)
        return objective(seams.gather(hidden), head, batch)

    def extend(
        self,
        tokens: Tensor,
        positions: Tensor,
        through: Pass,
        features: Features | None = None,
        dest: Tensor | None = None,
    ) -> Tensor:
        """``tokens [T]`` at ``positions`` ``[T]`` or ``[3, T]`` into the rows of a cache, to hidden states ``[S, H]``.

        ``through`` says which rows of which cache, and whose hidden states are wanted. ``features`` of images land on
        the tokens ``dest``.
        """
        decoder, layout = self.decoder, through.layout
        x = decoder.embed(tokens)
        deepstack: tuple[Tensor, ...] = ()
        if features is not None:
            assert dest is not None
            x, deepstack = x.index_copy(0, dest, features.final), features.deepstack
        if layout is not None and layout.order is not None:
            assert layout.inverse is not None
            x, positions = x.index_select(0, layout.order), positions.index_select(-1, layout.order)
            dest = None if dest is None else layout.inverse.index_select(0, dest)
        hidden = decoder.blocks(x, positions, layout, deepstack, dest, cache=through)
        out: Tensor = decoder.norm(hidden if through.last is None else hidden.index_select(0, through.last))
        return out

    def set_recompute(self, plan: Plan, *, decoder: Recompute | bool, tower: bool) -> None:
        """Recompute activations at the plan's points: of the decoder as told (True: every layer), all of the tower's.

        UserError if the plan lacks a point that is asked for.
        """
        how = Recompute.of(decoder)
        how.check(plan)
        layers = [name for name, _ in self.named_modules() if any(matches(p, name) for p in plan.recompute_decoder)]
        spans = how.spans(len(layers))
        self.decoder.recompute_group = how.num_layers if how.granularity == "full" and how.method == "uniform" else 1
        # A checkpoint inside a shared one would run its layer a third time.
        chosen = {layers[i] for span in spans for i in span if self.decoder.recompute_group == 1}
        parts = how.modules if how.granularity == "selective" else ()
        patterns = [pattern for part in parts for pattern in plan.recompute_modules[part]]
        patterns += plan.recompute_tower if tower else ()
        for name, module in self.named_modules():
            on = name in chosen or any(matches(pattern, name) for pattern in patterns)
            if isinstance(module, (Recomputable, RMSNorm)):
                module.recompute = on
            else:
                assert not on, f"{name} cannot be recomputed"

    def run(
        self,
        batch: Batch,
        carried: Tensor | None = None,
        keys: Sequence[str] | None = None,
        *,
        last: bool = True,
        routing: Routing | None = None,
    ) -> Tensor:
        """Hidden states ``[T, H]`` of ``batch``, normed if ``last``.

        A pipeline stage runs the layers ``keys`` on the rows ``carried`` from the one before it (None: from the start).
        """
        decoder = self.decoder
        x = decoder.embed(batch.tokens) if carried is None else carried
        shard = batch.shard
        if shard is None:
            layout = plan(batch.segments, causal=True, dtype=x.dtype)
        else:
            layout = plan(shard.queries, causal=True, dtype=x.dtype, keys=shard.keys, reorder=False)
        x, positions = permuted(x, layout.order, layout.inverse), batch.positions
        if layout.order is not None:
            positions = positions.index_select(-1, layout.order)
        dest: Tensor | None = None
        deepstack: tuple[Tensor, ...] = ()
        trunk, media = self.model, batch.media
        if carried is None and media is not None and isinstance(trunk, Trunk):
            dest = media.dest if layout.inverse is None else layout.inverse.index_select(0, media.dest)
            features = trunk.look(media, x.dtype)
            if media.route is None:
                features = features.landing(dest.shape[0])
            else:
                features = features.moved(decoder.seams, media.route)
            x, deepstack = x.index_copy(0, dest, features.final), features.deepstack
        hidden = decoder.blocks(x, positions, layout, deepstack, dest, shard=shard, keys=keys, routing=routing)
        return permuted(decoder.norm(hidden) if last else hidden, layout.inverse, layout.order)
