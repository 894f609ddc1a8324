"""A new model from a description alone: random weights, a directory like any other.

A *blueprint* is a model directory without weights, or a ``config.json``. What lies in it is copied and every weight is
drawn from the seed, one tensor at a time. If it has no tokenizer, :func:`train_tokenizer` makes one: a byte-pair
tokenizer of given texts, in which the special tokens that the ``config.json`` counts on come first, so their ids are
known. The result opens like a downloaded checkpoint, here and in transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.checkpoint.open import read_json
from tessera.config.errors import UserError
from tessera.contract.model import HFConfig, dtype_of
from tessera.contract.shards import Part, whole
from tessera.models import init
from tessera.models.families import family_of
from tessera.models.families.pairing import built
from tessera.weights import hf
from tessera.weights.saving import Saving, bytes_of, copy_side_files

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

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def compose(blueprint: Path, texts: Iterable[str], folder: Path, seed: int) -> int:
    """Make the model of ``blueprint`` in the new directory ``folder``, with a tokenizer of ``texts``.

    Returns its number of parameters.
    """
    folder.mkdir(parents=True)
    config = read_json(blueprint / "config.json", required=True)
    for file in sorted(blueprint.iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    train_tokenizer(texts, config["text_config"]["vocab_size"]).save(str(folder / "tokenizer.json"))
    return draw(config, folder, seed, torch.float32, bytes_of("5GB"))


def described(blueprint: Path) -> tuple[HFConfig, Path | None]:
    """The config in the file or directory ``blueprint``, and the directory to copy from, if it is one."""
    if not blueprint.exists():
        raise UserError(f"--config {blueprint}: no such file or directory")
    folder = blueprint if blueprint.is_dir() else None
    return read_json(blueprint / "config.json" if folder else blueprint, required=True), folder


def tensors_of(config: HFConfig, dtype: torch.dtype | None) -> Tensors:
    """Types and shapes of the model of ``config``, in ``dtype`` or what the config says, float32 if it does not."""
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    model, wanted = built(config), dtype or dtype_of(named)
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    return {name: (buffers.get(name, wanted), shape) for name, shape in hf.shapes_of(model).items()}


def draw(config: HFConfig, folder: Path, seed: int, dtype: torch.dtype | None, max_shard_size: int) -> int:
    """Write random weights for ``config`` into ``folder``; returns their number."""
    tensors = tensors_of(config, dtype)
    parameters = dict(built(config).named_parameters())

    def values(name: str) -> Iterator[tuple[Part, Tensor]]:
        shape = tensors[name][1]
        drawn = init.drawn(name, shape, config, seed) if name in parameters else torch.zeros(shape)
        yield whole(shape), drawn

    weightmap = family_of(config).weightmap(config, ())
    Saving.planned(tensors, weightmap, max_shard_size=max_shard_size).write(folder, values)
    return sum(prod(shape) for name, (_, shape) in tensors.items() if name in parameters)


def copy_files(source: Path, folder: Path) -> None:
    """Copy everything beside weights and config that a model directory needs."""
    copy_side_files(source, folder)
    (folder / "config.json").unlink()


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
