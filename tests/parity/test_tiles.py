"""``tessera infer`` on images of many shapes: text for text what the model's own recipe gives, done by hand here.

By hand means: PIL cuts the tiles, the tags are written and tokenised one by one, and a plain model answers.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from tessera.checkpoint import open as door
from tessera.config.resolve import resolve, run_of
from tessera.data.encode import Encoder
from tessera.data.render import Renderer
from tessera.infer import run as infer
from tessera.infer.results import read_results
from tests.models import make_model_dir
from tests.parity import reference as ref
from tests.toys import make_images, write_rows
from tests.unit.models.test_tagged import nearest

SIDE, FEATURES, NEW = 56, 4, 12
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiles_of(image: Image.Image, most: int) -> Tensor:
    """``[n, 3, SIDE, SIDE]``: the tiles row by row and, if there are several, the whole image once more."""
    rows, columns = nearest(image.height, image.width, most, SIDE)
    large = image.resize((columns * SIDE, rows * SIDE))
    corners = [(x * SIDE, y * SIDE) for y in range(rows) for x in range(columns)]
    shown = [large.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]
    shown += [image.resize((SIDE, SIDE))] if len(shown) > 1 else []
    pixels = torch.from_numpy(np.stack([np.array(tile) for tile in shown])).float() / 255
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def texts_of(config: dict[str, Any], tiles: int) -> list[str]:
    """An image as texts that are tokenised one by one; ``*`` are the features of a tile."""
    if config["model_type"] == "internvl_chat":
        return ["<img>", *"*" * tiles, "</img>"]
    last = "<tile_global>" if config["llm_config"]["model_type"] == "llama" else "<tile_global_thumbnail>"
    tags = [*(f"<tile_{number}>" for number in range(1, tiles)), last]
    return ["<Image>", *(text for tag in tags for text in (tag, "*")), "</Image>"]


def by_hand(directory: Path, rows: list[dict[str, Any]], most: int) -> list[str]:
    source = door.describe(run_of("infer", model=str(directory)).model)
    module = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    config = dict(source.config)
    model = ref.theirs(config, module).eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    answers = []
    for row in rows:
        images = iter(row["images"])
        texts, pixels = ["<|im_start|>user\n"], []
        before, *parts = row["messages"][0]["content"].split("<image>")
        texts.append(before)
        for part in parts:
            pixels.append(tiles_of(Image.open(next(images)).convert("RGB"), most))
            *inner, last = texts_of(config, len(pixels[-1]))
            texts += [texts.pop() + inner[0], *inner[1:], last + "\n" + part.removeprefix("\n")]
        texts.append(texts.pop() + "<|im_end|>\n<|im_start|>assistant\n")
        texts = [texts[0] + texts[1], *texts[2:]]
        ids = [token for text in texts for token in ([5] * FEATURES if text == "*" else tokenizer.encode(text).ids)]
        extra = {"pixel_values": torch.cat(pixels)} if pixels else {}
        tokens = torch.tensor([ids])
        new = model.generate(  # type: ignore[operator]
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=[0, 2],
            pad_token_id=0,
            **extra,
        )
        answers.append(tokenizer.decode(new[0, len(ids) :].tolist(), skip_special_tokens=True))
    return answers


@pytest.mark.parametrize(
    ("name", "decoder", "flags", "most"),
    [
        ("NVLM_D", "qwen2", [], 6),
        ("NVLM_D", "qwen2", ["--use_tiling", "false"], 1),
        ("NVLM_D", "llama", ["--use_tiling", "true", "--max_num", "2"], 2),
        ("internvl_chat", "qwen3", [], 4),
    ],
)
def test_infer_is_the_recipe_by_hand(tmp_path: Path, name: str, decoder: str, flags: list[str], most: int) -> None:
    sizes = [(56, 56), (200, 60), (60, 200), (130, 90), (300, 310)]
    paths = make_images(tmp_path / "images", sizes, suffix=".png")
    asked = ["<image>\nWhat is it?", "<image>Is it a fox?", "one <image> two <image>three", "no image"]
    counts, rows = [1, 1, 2, 0], []
    for text, count in zip(asked, counts, strict=True):
        rows.append({"messages": [{"role": "user", "content": text}], "images": [paths.pop() for _ in range(count)]})
    llm = ref.config_of(decoder, tie_word_embeddings=False)
    del llm["vocab_size"]
    directory = make_model_dir(tmp_path / "model", name, **llm)
    write_rows(tmp_path / "rows.jsonl", rows)
    words = ["infer", "--model", str(directory), "--val_dataset", str(tmp_path / "rows.jsonl"), *flags]
    words += ["--max_new_tokens", str(NEW), "--temperature", "0"]
    path = infer.main(resolve(words, {}), sink=io.StringIO())
    assert path is not None
    responses = [row["response"] for row in read_results(path)]
    assert json.loads((directory / "config.json").read_text())["llm_config"]["model_type"] == decoder
    assert responses == by_hand(directory, rows, most)
    assert len(set(responses)) == len(responses)


@pytest.mark.parametrize("name", ref.REMOTE)
def test_pixels_are_pil_s(tmp_path: Path, name: str) -> None:
    """Unless told otherwise images of these families are resized by PIL, to the last bit."""
    directory = make_model_dir(tmp_path / "model", name)
    source = door.describe(run_of("infer", model=str(directory)).model)
    encoder = Encoder(Renderer(directory, source.geometry), source.geometry)
    for path in make_images(tmp_path / "images", [(200, 60), (61, 203), (56, 56)], suffix=".png"):
        turns = [{"role": "user", "content": "<image>x"}]
        encoded = encoder.encoded(encoder.sample({"messages": turns, "images": [path]}, need_answer=False), prompt=True)
        patches = np.zeros((encoded.patches, encoder.patch_width([encoded])), dtype=np.uint8)
        encoder.pixels(encoded, patches)
        grid = encoded.items[0].grid
        shown = ref.tile_pixels(torch.from_numpy(patches), grid, source.geometry).float() / 255
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        most = source.config["max_dynamic_patch"]
        assert torch.equal((shown - mean) / std, tiles_of(Image.open(path), most))
