"""An opened model that answers dataset rows: renderer, pixels, weights, adapter and scheduler in one place.

Every front end (a dataset, a conversation, the demo) asks the same way::

    session = Session.open(run)
    question = session.question({"messages": [...], "images": [...]}, seed=0)      text and image headers: cheap
    [reply] = session.answer([question])                                          pixels, prompts, tokens

A question goes through the renderer and the resize that training used, so the model sees at inference exactly what
it has seen before: same template, same system prompt, same pixel limits.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tessera.adapt import lora, quant
from tessera.adapt.sharing import attach_shared, share
from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.data.encode import Encoder
from tessera.data.render import Renderer
from tessera.data.sample import BadRow
from tessera.infer.constrain import Grammars
from tessera.infer.detokenise import streams
from tessera.infer.limits import OPEN_ENDED, Limits, max_positions, stop_ids
from tessera.infer.memory import Demand, sizes_for
from tessera.infer.prompt import Prompt, prompt_from
from tessera.infer.request import Event, Failed, Finished, Question, Request
from tessera.infer.sampling import Allows, Sampling
from tessera.infer.scheduler import Scheduler, Sizes
from tessera.models.families import text_config
from tessera.models.vlm import VLM

DECODERS = 8
"""Threads that make questions ready: their images are decoded and resized."""

END_OF_TURN = ("<|im_end|>", "<|eot_id|>")
"""Tokens that end a turn in common chat templates, whatever the configuration calls the end of a document."""


NOT_OFFERED: Mapping[str, Any] = {
    "num_beams": 1,
    "penalty_alpha": 0,
    "num_beam_groups": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
}
"""Settings of a ``generation_config.json`` that would change answers but are not implemented, with what is neutral."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The new ``tokens`` of a question, without the one that ended it; ``stopped`` is false if the limit cut it off."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    stopped: bool


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of an answer and what it was made of."""

    text: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with everything that can be done without the model."""

    request: Request
    prompt: Prompt
    grammar: Allows | None


class Session:
    """A model that answers; see the module docstring. ``notes`` are what the user should be told once."""

    def __init__(self, source: door.Source, encoder: Encoder, scheduler: Scheduler, sampling: Sampling) -> None:
        self.source = source
        self.encoder = encoder
        self.scheduler = scheduler
        self.sampling = sampling
        self.notes: list[str] = []
        self._grammars = Grammars(encoder.renderer.tokenizer, scheduler.vocabulary, scheduler.limits.stop_ids)

    @classmethod
    def open(
        cls, run: Run, adapters: Mapping[str, str] | None = None, *, sizes: Callable[[Demand], Sizes] = sizes_for
    ) -> Session:
        """Load the model and adapter that ``run`` names, on the GPU if there is one.

        Further ``adapters`` (name to directory) can be chosen per request. ``sizes`` decides how much runs at a time
        and how much is kept.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = door.describe(run.model)
        module = load(run, source, device)
        if not isinstance(module, VLM):
            raise UserError(
                f"{source.family.name} runs as transformers' own model, which cannot generate here: "
                "load the exported directory with transformers instead"
            )
        models: dict[str | None, VLM] = {None: module}
        models |= {name: beside(run, source, module, directory) for name, directory in (adapters or {}).items()}
        defaults = door.read_json(source.path / "generation_config.json")
        encoder = encoder_of(run, source)
        limits = _limits(run, source, encoder.renderer, defaults)
        # The two image paths of transformers also round the normalisation differently.
        normalisation = replace(encoder.geometry.normalisation, fused=encoder.image_resize != "pil")
        decode = partial(encoder.renderer.decode, skip_special_tokens=True)
        scheduler = Scheduler(
            models,
            limits,
            encoder.geometry,
            decode,
            streams(encoder.renderer.tokenizer, decode),
            device=device,
            sizes=sizes(Demand.of(module, limits, device, run.infer.max_batch_size)),
            normalisation=normalisation,
        )
        session = cls(source, encoder, scheduler, Sampling.of(run.infer, defaults))
        session.notes.extend(_notes(run, limits, defaults))
        return session

    @property
    def limits(self) -> Limits:
        """Where answers end."""
        return self.scheduler.limits

    def question(self, row: Mapping[str, Any], *, base: Path | None = None, seed: int = 0) -> Question:
        """``row`` (of any dataset format, with or without an answer) as a question; BadRow says why it is none."""
        sample = self.encoder.sample(row, base, need_answer=False)
        if sample.plain:
            raise BadRow("nothing to answer: the row holds no question")
        encoded = self.encoder.encoded(sample, prompt=True)
        [encoded] = self.encoder.shortened(encoded)
        labels = sample.answer
        prompt = sample if labels is None else replace(sample, messages=sample.messages[:-1])
        return Question(row, prompt, labels, encoded, seed)

    def prepare(self, request: Request) -> Prepared:
        """Everything about ``request`` that needs no model; may be called from any thread.

        BadRow if an image cannot be read, Refused if the request can never be answered.
        """
        encoded = request.question.encoded
        self.scheduler.room(request, len(encoded.tokens))
        known = self.scheduler.residents[request.adapter].sights.find
        prompt = prompt_from(encoded, self.encoder, known, request.adapter)
        grammar = None if request.constraint is None else self._grammars.of(request.constraint)
        return Prepared(request, prompt, grammar)

    def answer(
        self,
        questions: Sequence[Question],
        on_text: Callable[[int, str | None], None] | None = None,
        on_reply: Callable[[int, Reply | BadRow], None] | None = None,
    ) -> list[Reply | BadRow]:
        """Answers in order; BadRow in the place of a question whose images cannot be decoded.

        ``on_text(index, piece)`` is called as text comes, and with None when the answer to that question has ended;
        ``on_reply(index, reply)`` when it has, in whatever order that is.
        """
        asked = [Request(q, self.sampling, seed=q.seed, stream=on_text is not None) for q in questions]
        replies = Replies({request.id: index for index, request in enumerate(asked)}, self.text, on_text, on_reply)
        # A few more than run at a time are made ready in advance.
        ahead = 2 * self.scheduler.sizes.rows
        coming: deque[tuple[Request, Future[Prepared]]] = deque()
        line = iter(asked)
        with ThreadPoolExecutor(min(len(asked), DECODERS) or 1) as pool:
            try:
                while True:
                    for request in islice(line, ahead - len(coming)):
                        coming.append((request, pool.submit(self.prepare, request)))
                    self._enter(coming, replies)
                    if not coming and self.scheduler.idle:
                        break
                    replies.hear(self.scheduler.step())
            finally:
                for _, future in coming:
                    future.cancel()
                for request in asked:  # whatever is left where something was raised
                    self.scheduler.cancel(request.id)
                self.scheduler.flush()
        return replies.all()

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens of an answer as text, without special tokens."""
        return self.encoder.renderer.decode(tokens, skip_special_tokens=True)

    def _enter(self, coming: deque[tuple[Request, Future[Prepared]]], replies: Replies) -> None:
        """Hand what is ready, in order, to the scheduler; wait for the first if it has nothing else to do."""
        scheduler = self.scheduler
        while coming and scheduler.waiting < scheduler.sizes.rows and (coming[0][1].done() or scheduler.idle):
            request, future = coming.popleft()
            try:
                made = future.result()
            except BadRow as error:
                replies.refused(request.id, error)
                continue
            scheduler.add(made.request, made.prompt, made.grammar)


class Replies:
    """Gathers the answers to requests with one choice each; ``places`` are their indices by id."""

    def __init__(
        self,
        places: Mapping[str, int],
        text: Callable[[Sequence[int]], str],
        on_text: Callable[[int, str | None], None] | None,
        on_reply: Callable[[int, Reply | BadRow], None] | None,
    ) -> None:
        self._places, self._text = places, text
        self._on_text, self._on_reply = on_text, on_reply
        self._tokens: list[list[int]] = [[] for _ in places]
        self._found: dict[int, Reply | BadRow] = {}

    def hear(self, events: Sequence[Event]) -> None:
        """Note what has happened; RuntimeError if a request failed, which is nobody's wish."""
        for event in events:
            place = self._places[event.request]
            if isinstance(event, Failed):
                raise RuntimeError(event.error)
            if isinstance(event, Finished):
                tokens = tuple(self._tokens[place])
                answer = Answer(tokens, event.prompt_tokens, event.reason == "stop")
                self._end(place, Reply(self._text(tokens), answer))
            else:
                self._tokens[place].extend(event.tokens)
                if self._on_text is not None and event.text:
                    self._on_text(place, event.text)

    def refused(self, request: str, error: BadRow) -> None:
        """Note that a question cannot be asked."""
        self._end(self._places[request], error)

    def all(self) -> list[Reply | BadRow]:
        """All answers in order."""
        return [self._found[place] for place in range(len(self._places))]

    def _end(self, place: int, reply: Reply | BadRow) -> None:
        self._found[place] = reply
        if self._on_text is not None and isinstance(reply, Reply):
            self._on_text(place, None)
        if self._on_reply is not None:
            self._on_reply(place, reply)


def load(run: Run, source: door.Source, device: torch.device) -> nn.Module:
    """The model of ``source`` with ``run``'s adapter beside its weights, frozen, in the dtype it computes in."""
    if len(run.model.adapters) > 1:
        raise UserError(f"--adapters: one adapter at a time, got {len(run.model.adapters)}")
    # Weights are cast once, here, and not by autocast in every step; adapters keep their float32.
    dtype = door.compute_dtype(source, run.model.torch_dtype, device)
    module = door.load(source, dtype=dtype, device=device)
    for adapter in run.model.adapters:
        attach(source, module, adapter, quantisation=quant.requested(run.model, run.adapt))
    _cast(module, dtype)
    return module.requires_grad_(False).eval()


def beside(run: Run, source: door.Source, module: VLM, directory: str) -> VLM:
    """Another model around the weights of ``module``, with the adapter in ``directory``; neither notices the other."""
    other = share(module)
    rename = renaming(source, other)
    attach_shared(other, directory, source.plan.groups, rename=rename)
    _cast(other, door.compute_dtype(source, run.model.torch_dtype, other.head_weight.device))
    return other.requires_grad_(False).eval()


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in module.named_parameters():
        # Modules that were trained whole come back in float32, which plain layers cannot mix with another dtype.
        if parameter.is_floating_point() and ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)


def attach(
    source: door.Source, module: nn.Module, directory: str, *, quantisation: quant.Quantisation | None = None
) -> None:
    """Put the adapter in ``directory`` beside ``module``'s weights, over a quantised base if it was trained on one."""
    quantised: tuple[str, ...] = ()
    if quantisation is not None:
        kept = door.read_json(Path(directory) / lora.CONFIG_FILE).get("modules_to_save") or ()
        keep = lora.modules_to_save(module, kept, str.endswith)  # as peft reads its own file
        quantised = quant.quantise(module, source.plan.groups, quantisation, keep=keep)
    rename = renaming(source, module)
    lora.load_adapter(module, directory, source.plan.groups, trainable=False, quantised=quantised, rename=rename)


def renaming(source: door.Source, module: nn.Module) -> Callable[[str], str]:
    """What a tensor of an adapter, named as some file names it, is called in ``module``."""
    known = {name for name, _ in module.named_modules()}

    def rename(name: str) -> str:
        owner = re.split(r"\.lora_", name)[0] if ".lora_" in name else name.rpartition(".")[0]
        return name if owner in known else source.disk_names.to_ours(name)

    return rename


def encoder_of(run: Run, source: door.Source) -> Encoder:
    """What turns rows into prompts: as in training, but a prompt must leave room for an answer."""
    longest = max_positions(source.config) - 1
    return Encoder(
        Renderer(source.path, source.geometry, run.data.system),
        source.geometry,
        image_resize=run.data.image_resize,
        root_image_dir=run.data.root_image_dir,
        max_length=min(run.data.max_length or longest, longest),
        truncation_strategy=run.data.truncation_strategy,
        columns=run.data.columns,
    )


def _notes(run: Run, limits: Limits, defaults: Mapping[str, Any]) -> list[str]:
    notes = []
    unused = [key for key, neutral in NOT_OFFERED.items() if defaults.get(key, neutral) not in (neutral, None)]
    if unused:
        notes.append(f"generation_config.json: {', '.join(unused)} not used; tessera does not offer it")
    if run.infer.max_new_tokens is None:
        notes.append(
            f"answers end after {limits.max_new_tokens} tokens at the latest; --max_new_tokens sets another limit"
        )
    return notes


def _limits(run: Run, source: door.Source, renderer: Renderer, defaults: Mapping[str, Any]) -> Limits:
    ends = {renderer.eos_id, *(renderer.tokenizer.token_to_id(token) for token in END_OF_TURN)}
    stops = stop_ids(defaults, source.config, text_config(source.config))
    return Limits(
        stop_ids=stops | {end for end in ends if end is not None},
        max_new_tokens=run.infer.max_new_tokens or OPEN_ENDED,
        max_positions=max_positions(source.config),
    )
