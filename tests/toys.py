"""Small things that tests are made of: a tokenizer directory, rows, images. All built on the spot, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Special tokens of a toy tokenizer; their ids are 0 .. 6 in this order (the image pad is 5, the video pad 6)."""

IMAGE_PAD, VIDEO_PAD = SPECIAL.index("<|image_pad|>"), SPECIAL.index("<|video_pad|>")
VOCABULARY = 512

_TURNS = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'video' or 'video' in part -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
_DEFAULT_SYSTEM = (
    "{%- if messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}\n"
)
TEMPLATES: Mapping[str, str] = {
    "qwen2_5_vl": _DEFAULT_SYSTEM + _TURNS,
    "qwen3_vl": _TURNS,
    "qwen2": _DEFAULT_SYSTEM + _TURNS,
    "qwen3": _TURNS,
    "llama": _TURNS,
    "qwen3_moe": _TURNS,
    "qwen3_vl_moe": _TURNS,
    "glm4v_moe": _TURNS,
    "internvl": _TURNS,
    "internvl_chat": _TURNS,
    "NVLM_D": _TURNS,
    "composite": _DEFAULT_SYSTEM + _TURNS,
}
"""Chat templates shaped like the families': ChatML, with or without a default system turn."""

SPELLINGS: Mapping[str, Mapping[str, str]] = {
    "glm4v_moe": {
        "<|vision_start|>": "<|begin_of_image|>",
        "<|vision_end|>": "<|end_of_image|>",
        "<|image_pad|>": "<|image|>",
    },
    "internvl": {"<|vision_start|>": "<img>", "<|vision_end|>": "</img>", "<|image_pad|>": "<IMG_CONTEXT>"},
    "internvl_chat": {"<|vision_start|>": "<img>", "<|vision_end|>": "</img>", "<|image_pad|>": "<IMG_CONTEXT>"},
    "NVLM_D": {"<|image_pad|>": "<|vision_pad|>"},
}
"""What families call the same tokens."""

_TEXT = (
    "The quick brown fox jumps over the lazy dog. Describe the image. What is written here? You are a helpful",
    "user assistant system tool\n 0 1 2 3 4 5 6 7 8 9 + - = frac sum of two numbers is seconds",
)


def make_tokenizer_dir(path: str | Path, family: str = "qwen2_5_vl", *, template: str | None = None) -> Path:
    """Write tokenizer.json (byte-level BPE, at most ``VOCABULARY`` ids), tokenizer_config.json, chat_template.jinja."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    directory, names = Path(path), SPELLINGS.get(family, {})
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(names.get(token, token), special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    turns = template if template is not None else TEMPLATES[family]
    for token, name in names.items():
        turns = turns.replace(token, name)
    (directory / "chat_template.jinja").write_text(turns)
    return directory


def make_images(
    directory: str | Path, sizes: Iterable[tuple[int, int]], *, seed: int = 0, suffix: str = ".jpg"
) -> list[str]:
    """Write one smooth random picture per (width, height) and return their paths."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (width, height) in enumerate(sizes):
        coarse = rng.integers(0, 256, (max(height // 16, 1), max(width // 16, 1), 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        target = folder / f"{seed}-{index:04d}{suffix}"
        picture.save(target)
        paths.append(str(target))
    return paths


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``rows`` as a jsonl file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return target


def chat(question: str, answer: str, images: Sequence[str] = ()) -> dict[str, Any]:
    """One row of a question and an answer, with an ``<image>`` tag per image in front."""
    tags = "<image>" * len(images)
    messages = [{"role": "user", "content": tags + question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **({"images": list(images)} if images else {})}


def chats(count: int, images: Sequence[str] = (), *, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` rows of various lengths; every other one uses the next of ``images``, if there are any."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        words = " ".join(str(number) for number in rng.integers(0, 1000, int(rng.integers(1, 24))))
        held = [images[index // 2 % len(images)]] if images and index % 2 == 0 else []
        rows.append(chat(f"What is written here? row {index}", words, held))
    return rows


def make_geometry(style: str = "windows", **changes: Any) -> Any:
    """A small geometry for the toy tokenizer: ``windows`` (patch 14), ``stamps`` (patch 16) or ``text``."""
    from tessera.contract.batch import Normalisation
    from tessera.models.geometry import PatchGeometry, TextGeometry

    if style == "text":
        return TextGeometry()
    own: dict[str, Any] = {"patch_size": 14, "window_size": 112, "tokens_per_second": 2}
    if style == "stamps":
        own = {"patch_size": 16, "table_side": 8, "time_axis": "stamps"}
    common: dict[str, Any] = {
        "merge_size": 2,
        "temporal_patch_size": 2,
        "normalisation": Normalisation((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)),
        "pad_ids": {"image": IMAGE_PAD, "video": VIDEO_PAD},
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 64,
    }
    return PatchGeometry(**(common | own | changes))
