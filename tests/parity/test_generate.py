"""Greedy answers, token for token those of ``transformers.generate``, and independent of who shares the batch."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tessera.config.resolve import resolve
from tessera.contract.batch import Batch
from tessera.infer import run as infer
from tessera.infer.limits import Limits
from tessera.infer.results import read_results
from tessera.infer.sampling import Sampling
from tessera.recipes import export
from tests import prompts
from tests.disk import save_checkpoint
from tests.parity import reference as ref

IMAGES: list[ref.Sample] = [[5, (1, 4, 6), 7], [3, (1, 8, 8), 4, (1, 4, 4), 6], [9], [2, (1, 10, 12), 11], [4]]
TEXT: list[ref.Sample] = [[13], [5], [13], [21], [8], [1]]
CASES = [*((name, IMAGES) for name in ref.VLMS), *((name, TEXT) for name in ref.TEXTS)]
NEW = 24


def expected(theirs: nn.Module, config: dict[str, Any], batch: Batch, stops: set[int], **how: Any) -> list[list[int]]:
    """transformers' answers, one call per prompt, without the token that ended them."""
    out = []
    rows = zip(batch.tokens.split(list(batch.segments.lengths)), ref.media_arguments(config, batch), strict=True)
    for tokens, extra in rows:
        ids = tokens[None]
        new = theirs.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=sorted(stops),
            pad_token_id=0,
            **how,
            **extra,
        )[0, ids.shape[1] :].tolist()
        out.append(new[:-1] if new[-1] in stops else new)
    return out


@pytest.mark.parametrize(("name", "samples"), CASES)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers(name: str, samples: list[ref.Sample], penalty: float) -> None:
    config = ref.config_of(name)
    model = ref.ours(config)
    theirs = ref.theirs(config, model).eval()
    batch = ref.batch_of(config, samples)
    # Some frequent tokens end answers, so that rows leave the batch at different steps.
    first = expected(theirs, config, batch, {2})
    stops = {2, first[0][5], first[1][9]}
    how = {"repetition_penalty": penalty} if penalty != 1 else {}

    limits, sampling = Limits(frozenset(stops), NEW, 4096), Sampling(repetition_penalty=penalty)
    mine = prompts.answers(model.eval(), config, batch, limits, sampling)
    wanted = expected(theirs, config, batch, stops, **how)
    assert [list(answer.tokens) for answer in mine] == wanted
    assert [answer.stopped for answer in mine] == [len(tokens) < NEW for tokens in wanted]
    assert [answer.prompt_tokens for answer in mine] == list(batch.segments.lengths)
    assert len({len(tokens) for tokens in wanted}) > 1, "the test should see rows of different lengths"


def test_a_sampled_answer_does_not_depend_on_its_batch() -> None:
    config = ref.config_of("qwen3")
    model = ref.ours(config).eval()
    sampling = Sampling(1.2, top_k=40, top_p=0.95)
    limits = Limits(frozenset({2, 7, 30}), NEW, 4096)
    together = prompts.answers(model, config, ref.batch_of(config, TEXT), limits, sampling)
    for rows in range(1, len(TEXT)):
        fewer = prompts.answers(model, config, ref.batch_of(config, TEXT[:rows]), limits, sampling)
        assert fewer == together[:rows]


def test_limits() -> None:
    config = ref.config_of("qwen3")
    model = ref.ours(config).eval()
    batch = ref.batch_of(config, TEXT)
    short = prompts.answers(model, config, batch, Limits(frozenset(), 3, 4096), Sampling())
    assert [len(answer.tokens) for answer in short] == [3] * len(TEXT)
    tight = prompts.answers(model, config, batch, Limits(frozenset(), 100, 23), Sampling())
    assert [len(answer.tokens) for answer in tight] == [23 - length for length in batch.segments.lengths]
    assert not any(answer.stopped for answer in tight)


CONVERSATIONS: list[list[tuple[str, list[tuple[int, int]]]]] = [
    [("<image>what is written here?", [(70, 130)])],
    [("no picture", [])],
    [("<image> and <image> differ", [(64, 64), (100, 50)]), ("an answer", []), ("where? <image>", [(90, 200)])],
    [("first", []), ("then", []), ("a longer last question than before", [])],
]
"""Turns (user and assistant by turns) with the (height, width) of their images."""


def rows_on_disk(folder: Path) -> list[dict[str, Any]]:
    random, rows = np.random.default_rng(0), []
    for number, turns in enumerate(CONVERSATIONS):
        images = []
        for turn, (_, sizes) in enumerate(turns):
            for place, (height, width) in enumerate(sizes):
                path = folder / f"{number}-{turn}-{place}.png"
                Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
                images.append(str(path))
        roles = ("user", "assistant")
        messages = [{"role": roles[turn % 2], "content": text} for turn, (text, _) in enumerate(turns)]
        rows.append({"messages": messages, "images": images})
    return rows


def as_transformers_would(directory: Path, rows: list[dict[str, Any]], sees: bool) -> list[str]:
    """Answers of transformers alone: its tokenizer, chat template, image processor, model and generate."""
    from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(directory).eval()
    processor = AutoImageProcessor.from_pretrained(directory) if sees else None
    out = []
    for row in rows:
        messages = [dict(message) for message in row["messages"]]
        for message in messages:
            message["content"] = message["content"].replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        extra: dict[str, Any] = {}
        if row["images"] and processor is not None:
            extra = dict(processor(images=[Image.open(path) for path in row["images"]], return_tensors="pt"))
            before, *parts = text.split("<|image_pad|>")
            counts = [int(grid.prod()) // 4 for grid in extra["image_grid_thw"]]
            text = before + "".join("<|image_pad|>" * count + part for count, part in zip(counts, parts, strict=True))
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        if extra:
            extra["mm_token_type_ids"] = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **extra)
        out.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    return out


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "qwen3"])
def test_exported_directory(name: str, tmp_path: Path) -> None:
    """The whole way: an exported directory, rows with images and several turns, a batch; text for text the same."""
    made = save_checkpoint(tmp_path / "made", name)
    here = export.main(resolve(["export", "--model", str(made), "--output_dir", str(tmp_path / "exported")], {}))
    sees = name != "qwen3"
    rows = rows_on_disk(tmp_path)
    rows = rows if sees else [row for row in rows if not row["images"]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Without torchvision transformers resizes with PIL, so that is what has to be equalled.
    flags = ["--image_resize", "pil", "--max_new_tokens", str(NEW), "--temperature", "0"]
    asked = ["--model", str(here), "--val_dataset", str(tmp_path / "rows.jsonl"), *flags]
    path = infer.main(resolve(["infer", *asked], {}), sink=io.StringIO())
    assert path is not None
    responses = [row["response"] for row in read_results(path)]
    assert responses == as_transformers_would(here, rows, sees)
    assert len(set(responses)) == len(responses)
