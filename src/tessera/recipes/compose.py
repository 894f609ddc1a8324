"""A new vision-language model from a description: trained tokenizer, random weights, a directory like any other.

A *blueprint* is a model directory without a tokenizer and without weights. Composing copies it, trains a byte-pair
tokenizer on the given texts (the special tokens that the blueprint's ``config.json`` counts on come first, so their
ids are known), and draws every weight from the seed. The result opens like a downloaded checkpoint, here and in
transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tessera.models.families import family_of
from tessera.models.init import init_weights
from tessera.weights import hf

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Special tokens; the place of each is its id."""


def compose(blueprint: Path, texts: Iterable[str], folder: Path, seed: int) -> int:
    """Make the model of ``blueprint`` in the new directory ``folder``; returns its number of parameters."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = json.loads((blueprint / "config.json").read_text(encoding="utf-8"))
    for file in sorted(blueprint.iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    train_tokenizer(texts, config["text_config"]["vocab_size"]).save(str(folder / "tokenizer.json"))
    family = family_of(config)
    with torch.device("meta"):
        module = family.build(config)
    init_weights(module, config, seed)
    hf.save(module.state_dict(), folder, family.weightmap(config, ()))
    return sum(parameter.numel() for parameter in module.parameters())


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer (``tokenizers.Tokenizer``) of at most ``vocabulary`` tokens.

    Any text can be encoded, every digit is a token of its own, and :data:`SPECIAL` come first.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert tokenizer.get_vocab_size() <= vocabulary
    return tokenizer
