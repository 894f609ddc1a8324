"""Models and rows that every benchmark shares: made once under ``bench/.cache``, the same bytes for every tool.

The models are randomly initialised Qwen2.5-VL checkpoints written by transformers as ordinary directories (weights,
config, tokenizer trained here, chat template, processor config), so that tessera, TRL, ms-swift and the bare loop
all open the same folder. The rows are ordinary jsonl files in ``messages`` + ``images`` form:

    line      one short line of handwriting (scikit-learn's digits), about 45 tokens
    page448   one 448 x 448 page of handwriting, about 350 tokens, 256 of them vision tokens
    mixed     natural lengths: text-only dialogue, lines, crops and pages, answers with a long tail (log-normal)
    photo448, photo1mp   photograph-like JPEG files of 450 x 450 and 1000 x 1000 pixels (quality 90), which the model's
              processor resizes to 448 x 448 and 1008 x 1008, for the data benchmarks

Everything is drawn from a seed. Heavy imports stay inside the functions, so that ``--help`` is instant.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parent / ".cache"
VOCAB = 1024
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SYSTEM = "You are a helpful assistant."
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    + SYSTEM
    + "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# (text hidden, layers, heads, key/value heads, mlp) and (tower hidden, depth, heads, mlp)
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ((64, 2, 2, 1, 128), (64, 2, 2, 128)),
    "10m": ((256, 6, 4, 2, 1024), (192, 6, 6, 768)),
    "60m": ((640, 10, 10, 2, 1792), (384, 8, 8, 1024)),
}
Row = dict[str, Any]


def model_dir(size: str) -> Path:
    """The checkpoint directory of one of ``SHAPES``, written on first use."""
    target = CACHE / "models" / size
    if (target / "done").exists():
        return target
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    ids = write_tokenizer(target)
    (hidden, layers, heads, kv_heads, mlp), (v_hidden, depth, v_heads, v_mlp) = SHAPES[size]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": mlp, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "mrope_section": sections(hidden // heads), "rope_theta": 1e6},
            "tie_word_embeddings": True, "use_sliding_window": False,
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": depth, "hidden_size": v_hidden, "num_heads": v_heads, "intermediate_size": v_mlp,
            "out_hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 112, "fullatt_block_indexes": [depth // 2 - 1, depth - 1],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(target)
    (target / "done").write_text(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}))
    return target


def parameters(size: str) -> int:
    """Number of parameters of ``model_dir(size)``."""
    return int(json.loads((model_dir(size) / "done").read_text())["parameters"])


def sections(head_dim: int) -> list[int]:
    """Split of half a head's rotary pairs over time, height and width, in Qwen2.5-VL's proportion 16:24:24."""
    half = head_dim // 2
    time = half // 4
    height = (half - time) // 2
    return [time, height, half - time - height]


def write_tokenizer(target: Path) -> dict[str, int]:
    """Train a byte-level BPE of ``VOCAB`` entries on our own text; returns the ids of the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    rng = random.Random(7)
    texts = [words(rng, 60) for _ in range(2000)] + ["system\nuser\nassistant\n" + SYSTEM + " Read the line. "] * 50
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=32768,
        additional_special_tokens=SPECIAL[1:], image_token="<|image_pad|>", video_token="<|video_pad|>",
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    fast.save_pretrained(target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    common = {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "Qwen2_5_VLProcessor",
    }  # fmt: skip
    image = {**common, "image_processor_type": "Qwen2VLImageProcessor"}
    video = {
        **common,
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
    }
    (target / "preprocessor_config.json").write_text(json.dumps(image, indent=2))
    (target / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2))
    return {token: fast.convert_tokens_to_ids(token) for token in SPECIAL}


def words(rng: random.Random, count: int) -> str:
    """``count`` invented words with Zipf-like frequencies; compresses to about 1.5 tokens a word."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    out = []
    for _ in range(count):
        rank = int(math.exp(rng.random() * math.log(600)))
        local = random.Random(rank)
        out.append("".join(local.choice(syllables) for _ in range(local.randint(1, 3))))
    return " ".join(out)


def rows_file(name: str, count: int, seed: int = 0) -> Path:
    """The jsonl of ``count`` rows of a kind (see the module docstring), with its images; made on first use."""
    kind: Callable[[random.Random, Path, int], Row] = KINDS[name]
    folder = CACHE / "rows" / f"{name}-{count}-{seed}"
    path = folder / "rows.jsonl"
    if path.exists():
        return path
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    rng = random.Random(f"{name}-{seed}")
    lines = [json.dumps(kind(rng, folder / "images", index)) for index in range(count)]
    aside = folder / "rows.part"
    aside.write_text("\n".join(lines) + "\n")
    aside.rename(path)
    return path


def read(path: Path) -> list[Row]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(question: str, answer: str, images: list[Path]) -> Row:
    content = "<image>" * len(images) + question
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        "images": [str(image) for image in images],
    }


def handwriting(rng: random.Random, text: str, height: int, width: int, cell: int, gap: int = 0) -> Any:
    """A white page of ``height x width`` pixels with ``text`` (digits and blanks) in cells of ``cell`` pixels."""
    import numpy as np
    from PIL import Image

    scans = digit_scans()
    page = np.full((height, width), 255, np.uint8)
    x = y = 0
    for letter in text:
        if x + cell > width:
            x, y = 0, y + cell + gap
        if y + cell > height:
            break
        if letter.isdigit():
            scan = rng.choice(scans[int(letter)])
            glyph = Image.fromarray(scan).resize((cell, cell), Image.Resampling.BILINEAR)
            page[y : y + cell, x : x + cell] = 255 - np.asarray(glyph)
        x += cell
    return Image.fromarray(page).convert("RGB")


_SCANS: dict[int, list[Any]] = {}


def digit_scans() -> dict[int, list[Any]]:
    """scikit-learn's digit scans (8 x 8, 0..255) by digit."""
    if not _SCANS:
        from sklearn.datasets import load_digits

        data = load_digits()
        for image, label in zip(data.images, data.target, strict=True):
            _SCANS.setdefault(int(label), []).append((image * (255 / 16)).astype("uint8"))
    return _SCANS


def digits(rng: random.Random, count: int) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(count))


def line(rng: random.Random, folder: Path, index: int) -> Row:
    text = digits(rng, rng.randint(4, 6))
    path = folder / f"{index:05d}.png"
    handwriting(rng, text, 56, 28 * len(text), 28).save(path)
    return row("Read the line.", text, [path])


def page(rng: random.Random, folder: Path, index: int) -> Row:
    text = " ".join(digits(rng, rng.randint(2, 6)) for _ in range(60))
    path = folder / f"{index:05d}.jpg"
    handwriting(rng, text, 448, 448, 28, 4).save(path, quality=90)
    return row("Read the first lines.", text[:60], [path])


def mixed(rng: random.Random, folder: Path, index: int) -> Row:
    """One draw of the natural mixture: 25 % text only, 35 % lines, 30 % crops, 10 % pages; long-tailed answers."""
    draw = rng.random()
    length = min(700, max(4, int(rng.lognormvariate(math.log(40), 1.1))))
    if draw < 0.25:
        return row(words(rng, rng.randint(5, 40)), words(rng, length), [])
    if draw < 0.60:
        return line(rng, folder, index)
    height, width = (448, 448) if draw > 0.90 else (28 * rng.randint(3, 12), 28 * rng.randint(4, 14))
    path = folder / f"{index:05d}.jpg"
    handwriting(rng, " ".join(digits(rng, 5) for _ in range(60)), height, width, 28, 4).save(path, quality=90)
    return row(words(rng, rng.randint(3, 15)), words(rng, length), [path])


def photo(height: int, width: int) -> Callable[[random.Random, Path, int], Row]:
    """Photograph-like JPEG rows: smooth shapes plus film grain, so that files weigh what camera files weigh."""

    def draw(rng: random.Random, folder: Path, index: int) -> Row:
        import numpy as np
        from PIL import Image

        noise = np.random.default_rng(rng.randrange(2**32))
        total = np.zeros((height, width, 3), np.float32)
        for cells, strength in ((4, 80.0), (16, 50.0), (64, 30.0)):
            coarse = noise.normal(0, 1, (cells, cells, 3)).clip(-2, 2) * 63 + 128
            layer = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
            total += (np.asarray(layer, np.float32) - 128) * (strength / 63)
        total += noise.normal(0, 3.0, (height, width, 1))
        path = folder / f"{index:05d}.jpg"
        Image.fromarray((total + 128).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        return row("Describe the photograph.", words(rng, 30), [path])

    return draw


KINDS: dict[str, Callable[[random.Random, Path, int], Row]] = {
    "line": line, "page448": page, "mixed": mixed, "photo448": photo(450, 450), "photo1mp": photo(1000, 1000),
}  # fmt: skip


def linked(path: Path, count: int) -> Path:
    """A jsonl of ``count`` rows with one image file each: hard links to the few images of ``path``, under new names.

    For header-only work: every row opens a file of its own, and no pixels need to be made for it.
    """
    folder = path.parent / f"linked-{count}"
    target = folder / "rows.jsonl"
    if target.exists():
        return target
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    source = read(path)
    lines = []
    for index in range(count):
        copied = dict(source[index % len(source)])
        image = Path(copied["images"][0])
        name = folder / f"{index:06d}{image.suffix}"
        os.link(image, name)
        lines.append(json.dumps({**copied, "images": [str(name)]}))
    target.write_text("\n".join(lines) + "\n")
    return target
