"""An image whose tiles have tags, as tokens: tags are texts of their own, and images are never cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.contract.model import SEAM, MediaItem
from tessera.data.encode import Encoder
from tessera.data.render import Medium, Renderer
from tessera.data.sample import Sample, normalise
from tests.parity import reference as ref
from tests.toys import IMAGE_PAD, make_tokenizer_dir

WIDE, SQUARE = (56, 168), (56, 56)


def medium(size: tuple[int, int]) -> Medium:
    return Medium(MediaItem("image", ref.geometry_of(ref.config_of("NVLM_D")).grid(*size)), ("a.jpg",))


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    directory = make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"), "NVLM_D")
    held = json.loads((directory / "tokenizer.json").read_text())
    held["model"]["vocab"]["><"] = 1 + max(held["model"]["vocab"].values())
    held["model"]["merges"].append([">", "<"])
    (directory / "tokenizer.json").write_text(json.dumps(held))
    renderer = Renderer(directory, ref.geometry_of(ref.config_of("NVLM_D")))
    joined, apart = ids(renderer, "<Image><tile_1>"), ids(renderer, "<Image>", "<tile_1>")
    assert len(joined) < len(apart), "in one text, the end of one tag and the begin of the next are one token"
    return renderer


def sample_of(*contents: str) -> Sample:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return normalise({"messages": turns, "images": ["a.jpg"] * sum(text.count("<image>") for text in contents)})


def ids(renderer: Renderer, *texts: str) -> list[int]:
    """The texts tokenised one by one; ``4*`` is four features."""
    found: list[int] = []
    for text in texts:
        found += [IMAGE_PAD] * int(text[:-1]) if text.endswith("*") else renderer.tokenizer.encode(text).ids
    return found


def test_tags_are_tokenised_apart_and_features_between_them(renderer: Renderer) -> None:
    encoded = renderer.encode(renderer.render(sample_of("<image>\nWhat is it?", "a fox"), [medium(WIDE)]))
    tiles = ["<tile_1>", "4*", "<tile_2>", "4*", "<tile_3>", "4*", "<tile_global_thumbnail>", "4*"]
    head, tail = "<|im_start|>user\n<Image>", "</Image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert encoded.tokens.tolist() == ids(renderer, head, *tiles, tail, "a fox<|im_end|>\n")
    assert renderer.decode(encoded.tokens[encoded.loss_weight > 0]) == "a fox<|im_end|>\n"
    assert encoded.patches == 4 * 16
    assert not any(SEAM in renderer.decode([token]) for token in encoded.tokens)


def test_several_images_in_several_turns(renderer: Renderer) -> None:
    sample = sample_of("<image><image>one", "two", "and <image>", "three")
    rendered = renderer.render(sample, [medium(SQUARE), medium(WIDE), medium(SQUARE)])
    encoded = renderer.encode(rendered)
    assert rendered.slots == (4,) * 6
    assert (encoded.tokens == IMAGE_PAD).sum() == 24 and len(encoded.media) == 3
    assert renderer.measure([rendered]) == [(len(encoded.tokens), int((encoded.loss_weight > 0).sum()))]
    spans = renderer.extents(encoded)
    texts = [renderer.decode(encoded.tokens[a:b]).replace("<|vision_pad|>", "") for a, b in spans]
    assert texts[0] == texts[2] == "<Image><tile_global_thumbnail></Image>"
    assert texts[1] == "<Image><tile_1><tile_2><tile_3><tile_global_thumbnail></Image>"


@pytest.mark.parametrize("content", ["<image>What?", "<image>\nWhat?"])
def test_one_newline_behind_an_image(renderer: Renderer, content: str) -> None:
    """Rows of some tools write it, rows of others leave it to the template."""
    encoded = renderer.encode(renderer.render(sample_of(content, "x"), [medium(SQUARE)]))
    assert "</Image>\nWhat?" in renderer.decode(encoded.tokens)


def test_prompts_and_plain_text(renderer: Renderer) -> None:
    sample = sample_of("<image>What?", "x")
    whole, prompt = (renderer.encode(how(sample, [medium(WIDE)])) for how in (renderer.render, renderer.prompt))
    assert prompt.tokens.tolist() == whole.tokens[: len(prompt.tokens)].tolist()
    plain = normalise({"messages": [{"role": "assistant", "content": "<image>a fox"}], "images": ["a.jpg"]})
    rendered = renderer.render(plain, [medium(WIDE)])
    encoded = renderer.encode(rendered)
    assert rendered.plain and (encoded.tokens == IMAGE_PAD).sum() == 16
    assert renderer.measure([rendered])[0][0] == len(encoded.tokens)


@pytest.mark.parametrize("strategy", ["left", "right"])
def test_truncation_keeps_an_image_with_its_tags(renderer: Renderer, strategy: str) -> None:
    long = sample_of("0 1 2 3 4 5 6 7 8 9 " * 8 + "<image>" + "9 8 7 6 5 4 3 2 1 0 " * 8, "a fox")
    encoded = renderer.encode(renderer.render(long, [medium(WIDE)]))
    (span,) = renderer.extents(encoded)
    limit = span[1] - span[0] + 5
    encoder = Encoder(renderer, renderer.geometry, max_length=limit, truncation_strategy=strategy)
    (cut,) = encoder.shortened(encoded)
    assert len(cut.tokens) == limit
    ((first, behind),) = renderer.extents(cut)
    assert cut.tokens[first:behind].tolist() == encoded.tokens[span[0] : span[1]].tolist()


def test_a_template_with_bos_and_another_decoder(tmp_path: Path) -> None:
    """ChatML behind a first token, ``<image>`` for a feature, and another name for the thumbnail."""
    turns: Any = (
        "{{ bos_token }}{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )
    directory = make_tokenizer_dir(tmp_path, "NVLM_D", template=turns)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (directory / name).read_text().replace("<|vision_pad|>", "<image>")
        (directory / name).write_text(text.replace('"eos_token"', '"bos_token": "<|endoftext|>", "eos_token"'))
    llama = ref.config_of("llama")
    config = ref.config_of("NVLM_D", llm_config=llama, image_token="<image>")
    renderer = Renderer(directory, ref.geometry_of(config))
    encoded = renderer.encode(renderer.render(sample_of("<image>What?", "x"), [medium(WIDE)]))
    text = renderer.decode(encoded.tokens)
    assert text.startswith("<|endoftext|><|im_start|>user\n<Image><tile_1><image><image><image><image><tile_2>")
    assert "<tile_global><image>" in text and encoded.loss_weight[0] == 0
    assert renderer.decode(encoded.tokens[encoded.loss_weight > 0]) == "x<|im_end|>\n"
