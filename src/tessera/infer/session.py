"""An opened model that answers dataset rows: renderer, pixels, weights, adapter and generator in one place.

Every front end (a dataset, a conversation, the demo) asks the same way::

    session = Session.open(run)
    question = session.question({"messages": [...], "images": [...]}, seed=0)      text and image headers: cheap
    [reply] = session.answer([question])                                          pixels, prefill, tokens

A question goes through the renderer and the resize that training used, so the model sees at inference exactly what
it has seen before: same template, same system prompt, same pixel limits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tessera.adapt import lora, quant
from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.data.collate import Materialised, collate
from tessera.data.encode import Encoder
from tessera.data.render import Renderer
from tessera.data.sample import BadRow
from tessera.infer.detokenise import Detokeniser
from tessera.infer.generate import OPEN_ENDED, Answer, Generator, Limits, max_positions, stop_ids
from tessera.infer.request import Question
from tessera.infer.sampling import Sampling
from tessera.models.families import text_config
from tessera.models.vlm import VLM

DECODERS = 8
"""Threads that decode the images of one batch."""

END_OF_TURN = ("<|im_end|>", "<|eot_id|>")
"""Tokens that end a turn in common chat templates, whatever the configuration calls the end of a document."""


NOT_OFFERED: Mapping[str, Any] = {
    "num_beams": 1,
    "penalty_alpha": 0,
    "num_beam_groups": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0,
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
class Reply:
    """The text of an answer and what it was made of."""

    text: str
    answer: Answer


class Session:
    """A model that answers; see the module docstring. ``notes`` are what the user should be told once."""

    def __init__(self, source: door.Source, encoder: Encoder, generator: Generator, sampling: Sampling) -> None:
        self.source = source
        self.encoder = encoder
        self.generator = generator
        self.sampling = sampling
        self.notes: list[str] = []

    @classmethod
    def open(cls, run: Run) -> Session:
        """Load the model and adapter that ``run`` names, on the GPU if there is one."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = door.describe(run.model)
        module = load(run, source, device)
        defaults = door.read_json(source.path / "generation_config.json")
        encoder = encoder_of(run, source)
        limits = _limits(run, source, encoder.renderer, defaults)
        assert isinstance(module, VLM), f"{source.family.name} has no key-value cache"
        session = cls(source, encoder, Generator(module, limits, device), Sampling.of(run.infer, defaults))
        unused = [key for key, neutral in NOT_OFFERED.items() if defaults.get(key, neutral) not in (neutral, None)]
        if unused:
            session.notes.append(f"generation_config.json: {', '.join(unused)} not used; tessera does not offer it")
        if run.infer.max_new_tokens is None:
            session.notes.append(
                f"answers end after {limits.max_new_tokens} tokens at the latest; --max_new_tokens sets another limit"
            )
        return session

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

    def answer(
        self, questions: Sequence[Question], on_text: Callable[[int, str | None], None] | None = None
    ) -> list[Reply | BadRow]:
        """Answers in order; BadRow in the place of a question whose images cannot be decoded.

        ``on_text(index, piece)`` is called as text comes, and with None when the answer to that question has ended.
        """
        width = self.encoder.patch_width(question.encoded for question in questions)
        with ThreadPoolExecutor(min(len(questions), DECODERS) or 1) as pool:
            made = list(
                pool.map(lambda index: self._materialised(questions[index], index, width), range(len(questions)))
            )
        ready = [held for held in made if isinstance(held, Materialised)]
        replies = iter(self._generate(ready, questions, on_text) if ready else ())
        return [next(replies) if isinstance(held, Materialised) else held for held in made]

    def text(self, answer: Answer) -> str:
        """The answer's tokens as text, without special tokens."""
        return self.encoder.renderer.decode(answer.tokens, skip_special_tokens=True)

    def _materialised(self, question: Question, index: int, width: int) -> Materialised | BadRow:
        patches = np.empty((question.encoded.patches, width), dtype=np.uint8)
        try:
            self.encoder.pixels(question.encoded, patches)
        except BadRow as error:
            return error
        return Materialised(index, question.encoded, patches)

    def _generate(
        self,
        ready: Sequence[Materialised],
        questions: Sequence[Question],
        on_text: Callable[[int, str | None], None] | None,
    ) -> list[Reply]:
        """Replies to those ``questions`` that are ``ready``; a sample id is the place of its question."""
        geometry = self.encoder.geometry
        # The two image paths of transformers also round the normalisation differently.
        normalisation = replace(geometry.normalisation, fused=self.encoder.image_resize != "pil")
        decode = self.encoder.renderer.decode
        streams = [Detokeniser(lambda ids: decode(ids, skip_special_tokens=True)) for _ in ready]

        def hand_on(row: int, token: int | None) -> None:
            assert on_text is not None
            piece = streams[row].finish() if token is None else streams[row].push(token)
            if piece:
                on_text(ready[row].sample_id, piece)
            if token is None:
                on_text(ready[row].sample_id, None)

        answers = self.generator.generate(
            collate(ready, geometry, normalisation=normalisation),
            self.sampling,
            seeds=[questions[row.sample_id].seed for row in ready],
            on_token=None if on_text is None else hand_on,
        )
        return [Reply(self.text(answer), answer) for answer in answers]


def load(run: Run, source: door.Source, device: torch.device) -> nn.Module:
    """The model of ``source`` with ``run``'s adapter beside its weights, frozen, in the dtype it computes in."""
    if len(run.model.adapters) > 1:
        raise UserError(f"--adapters: one adapter at a time, got {len(run.model.adapters)}")
    # Weights are cast once, here, and not by autocast in every step; adapters keep their float32.
    dtype = door.compute_dtype(source, run.model.torch_dtype, device)
    module = door.load(source, dtype=dtype, device=device)
    for adapter in run.model.adapters:
        attach(source, module, adapter, quantisation=quant.requested(run.model, run.adapt))
    for parameter_name, parameter in module.named_parameters():
        # Modules that were trained whole come back in float32, which plain layers cannot mix with another dtype.
        if parameter.is_floating_point() and ".lora_" not in parameter_name:
            parameter.data = parameter.data.to(dtype)
    return module.requires_grad_(False).eval()


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


def _limits(run: Run, source: door.Source, renderer: Renderer, defaults: Mapping[str, Any]) -> Limits:
    ends = {renderer.eos_id, *(renderer.tokenizer.token_to_id(token) for token in END_OF_TURN)}
    stops = stop_ids(defaults, source.config, text_config(source.config))
    return Limits(
        stop_ids=stops | {end for end in ends if end is not None},
        max_new_tokens=run.infer.max_new_tokens or OPEN_ENDED,
        max_positions=max_positions(source.config),
    )
