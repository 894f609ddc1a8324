"""A complete tiny checkpoint on disk, as transformers would have saved it: weights, tokenizer, processor, template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.parity import reference as ref

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
"""Ids 0 to 6, those of the families' tiny configs; one token per byte follows."""

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Tokenizer:
    """Byte level without merges, so that every text round-trips and characters span several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return made


def save_checkpoint(
    directory: Path, name: str = "qwen3_vl", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """Write the family's tiny model with random weights into ``directory``; loadable by transformers and by tessera."""
    text = {"vocab_size": 320, "max_position_embeddings": 2048}
    config = ref.config_of(name)
    nested = config.get("text_config")
    config |= {"text_config": nested | text} if nested else text
    config |= changes
    sees = "vision_config" in config
    theirs = ref.theirs(config, ref.ours(config, seed))
    theirs.to(dtype).save_pretrained(directory)
    save_tokenizer(directory)
    generation = {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    if sees:
        save_processor(directory, name)
    return directory


def save_tokenizer(directory: Path) -> None:
    tokenizer().save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def save_processor(directory: Path, name: str) -> None:
    """The image processor of a VLM: images between 1 and 64 tokens."""
    patch = 16 if name == "qwen3_vl" else 14
    area = (2 * patch) ** 2
    processor = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor" if name == "qwen3_vl" else "Qwen2_5_VLProcessor",
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": area, "longest_edge": 64 * area},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
