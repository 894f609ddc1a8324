"""Token ids equal transformers'; labels follow the rule token by token, under templates of every temper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tessera.config.errors import UserError
from tessera.contract.model import MediaItem
from tessera.data.render import Encoded, Medium, Renderer
from tessera.data.sample import BadRow, Sample, normalise
from tessera.data.template import ChatTemplate
from tests.toys import IMAGE_PAD, SPECIAL, SPELLINGS, TEMPLATES, VIDEO_PAD, make_geometry, make_tokenizer_dir

END = SPECIAL.index("<|im_end|>")
IMAGE = Medium(MediaItem("image", (1, 4, 6)), ("a.jpg",))
VIDEO = Medium(MediaItem("video", (2, 4, 4), (0.0, 0.5, 1.0, 1.5)), ("a.jpg",) * 4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"))


def renderer_of(directory: Path, style: str = "windows", **kwargs: Any) -> Renderer:
    return Renderer(directory, make_geometry(style), **kwargs)


def sample_of(*contents: str, system: str | None = None, **row: Any) -> Sample:
    """User and assistant turns in alternation."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return normalise({"messages": messages, "system": system, **row})


def encode(renderer: Renderer, sample: Sample, images: int = 0, videos: int = 0) -> Encoded:
    return renderer.encode(renderer.render(sample, [IMAGE] * images, [VIDEO] * videos))


def trained(renderer: Renderer, encoded: Encoded) -> list[str]:
    """Text of each run of tokens that count, in order."""
    runs, start = [], None
    for index, weight in enumerate([*encoded.loss_weight.tolist(), 0.0]):
        if weight and start is None:
            start = index
        if not weight and start is not None:
            runs.append(renderer.decode(encoded.tokens[start:index]))
            start = None
    return runs


@pytest.mark.parametrize("family", sorted(TEMPLATES.keys() - SPELLINGS.keys()))
def test_ids_equal_transformers(tmp_path: Path, family: str) -> None:
    directory = make_tokenizer_dir(tmp_path, family)
    renderer, oracle = renderer_of(directory), AutoTokenizer.from_pretrained(directory)
    for system in (None, "Be brief."):
        sample = sample_of("What is 1 + 2?", "3 is it", "and 4\n5 é 你?", "nine", system=system)
        messages = [{"role": m.role, "content": m.content} for m in sample.messages]
        expected = oracle.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert encode(renderer, sample).tokens.tolist() == expected
        expected = oracle.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert renderer.encode(renderer.prompt(sample)).tokens.tolist() == expected


def test_images_as_transformers_expands_them(directory: Path) -> None:
    renderer, oracle = renderer_of(directory), AutoTokenizer.from_pretrained(directory)
    content = [{"type": "image"}, {"type": "text", "text": "Describe"}, {"type": "image"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a fox"}]
    ids = oracle.apply_chat_template(messages, tokenize=True, return_dict=False)
    expected = [token for id_ in ids for token in [id_] * (6 if id_ == IMAGE_PAD else 1)]
    sample = normalise({"messages": messages, "images": ["1.jpg", "2.jpg"]})
    found = encode(renderer, sample, images=2)
    assert found.tokens.tolist() == expected
    assert not found.loss_weight[found.tokens == IMAGE_PAD].any()
    assert [(int(found.tokens[a]), int(found.tokens[b - 1])) for a, b in renderer.extents(found)] == [(3, 4)] * 2


def test_videos_in_one_block_or_stamped(directory: Path) -> None:
    sample = sample_of("<video>What?", "a", videos=[["a.jpg"] * 4])
    block = encode(renderer_of(directory), sample, videos=1)
    stamped = encode(renderer_of(directory, "stamps"), sample, videos=1)
    for encoded in (block, stamped):
        assert int((encoded.tokens == VIDEO_PAD).sum()) == 8
    text = renderer_of(directory).decode(stamped.tokens)
    assert text.count("<|vision_start|>") == 2
    assert "<0.2 seconds><|vision_start|>" in text
    assert "<1.2 seconds><|vision_start|>" in text


def test_answers_and_their_suffix_count(directory: Path) -> None:
    renderer = renderer_of(directory)
    encoded = encode(renderer, sample_of("q", "one", "q", "two"))
    assert trained(renderer, encoded) == ["one<|im_end|>\n", "two<|im_end|>\n"]
    assert set(encoded.loss_weight.tolist()) == {0.0, 1.0}
    assert encode(renderer, sample_of("<image>q", "one", images=["a.jpg"]), images=1).loss_weight[0] == 0


@pytest.mark.parametrize(
    ("loss_scale", "expected"),
    [
        ("default", ["one<|im_end|>\n", "two<|im_end|>\n"]),
        ("last_round", ["two<|im_end|>\n"]),
    ],
)
def test_loss_scale(directory: Path, loss_scale: str, expected: list[str]) -> None:
    renderer = renderer_of(directory, loss_scale=loss_scale)
    assert trained(renderer, encode(renderer, sample_of("q", "one", "q", "two"))) == expected


def test_loss_scale_all_leaves_out_only_pads_and_the_first_token(directory: Path) -> None:
    encoded = encode(renderer_of(directory, loss_scale="all"), sample_of("<image>q", "a", images=["x.jpg"]), images=1)
    expected = encoded.tokens != IMAGE_PAD
    expected[0] = False
    assert np.array_equal(encoded.loss_weight != 0, expected)


def test_messages_have_the_last_word(directory: Path) -> None:
    turns = [
        ("q", None),
        ("no", {"loss": False}),
        ("q", None),
        ("half", {"loss_scale": 0.5}),
        ("q", None),
        ("yes", None),
    ]
    messages = [{"role": ("user", "assistant")[i % 2], "content": c, **(x or {})} for i, (c, x) in enumerate(turns)]
    renderer = renderer_of(directory)
    encoded = encode(renderer, normalise({"messages": messages}))
    assert trained(renderer, encoded) == ["half<|im_end|>\n", "yes<|im_end|>\n"]
    assert set(encoded.loss_weight.tolist()) == {0.0, 0.5, 1.0}
    messages[1] = {**messages[1], "loss": True}
    last = renderer_of(directory, loss_scale="last_round")
    assert trained(last, encode(last, normalise({"messages": messages})))[0] == "no<|im_end|>\n"


def test_system_prompt_priority(directory: Path) -> None:
    flag = renderer_of(directory, system="From the flag.")
    for renderer, system, expected in (
        (renderer_of(directory), None, "You are a helpful assistant."),
        (flag, None, "From the flag."),
        (flag, "From the row.", "From the row."),
    ):
        text = renderer.decode(encode(renderer, sample_of("q", "a", system=system)).tokens)
        assert text.startswith(f"<|im_start|>system\n{expected}<|im_end|>\n")
        assert text.count("<|im_start|>system") == 1


def test_plain_text_ends_the_document(directory: Path) -> None:
    renderer = renderer_of(directory, system="not here")
    encoded = encode(renderer, normalise({"text": "The lazy dog"}))
    assert renderer.decode(encoded.tokens) == "The lazy dog<|im_end|>"
    assert encoded.loss_weight.tolist() == [0.0] + [1.0] * (len(encoded.tokens) - 1)
    assert renderer.measure([renderer.render(normalise({"text": "The lazy dog"}))])[0][0] == len(encoded.tokens)
    with pytest.raises(BadRow, match="nothing to answer"):
        renderer.prompt(normalise({"text": "x"}))


def test_measure_equals_encode(directory: Path) -> None:
    for loss_scale in ("default", "all"):
        renderer = renderer_of(directory, loss_scale=loss_scale)
        samples = [sample_of("<image>q", "a" * n, images=["a.jpg"]) for n in (1, 9)] + [
            sample_of("q", "x"),
            sample_of("q", "x"),
        ]
        rendered = [renderer.render(sample, [IMAGE]) for sample in samples]
        lengths = [length for length, _ in renderer.measure(rendered)]
        assert lengths == [len(renderer.encode(each).tokens) for each in rendered]


MARKED = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.role == 'assistant' -%}{% generation %}{{- message.content + '<|im_end|>' -}}{% endgeneration %}"
    "{{- '\\n' -}}{%- else -%}{{- message.content + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
THINKING = (
    "{%- set last = namespace(at=0) -%}{%- for message in messages -%}{%- if message.role == 'user' -%}"
    "{%- set last.at = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{%- if loop.index0 > last.at -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- message.content.split('</think>')[-1].lstrip('\\n') -}}{%- else -%}{{- message.content -}}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
REWRITES = (
    "{{- messages | length -}}{%- for message in messages -%}{{- message.role + message.content -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant' -}}{%- endif -%}"
)


def test_generation_blocks_are_honoured_as_in_transformers(tmp_path: Path) -> None:
    directory = make_tokenizer_dir(tmp_path, template=MARKED)
    renderer, oracle = renderer_of(directory), AutoTokenizer.from_pretrained(directory)
    sample = sample_of("q", "one", "q", "two")
    messages = [{"role": m.role, "content": m.content} for m in sample.messages]
    expected = oracle.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode(renderer, sample)
    assert encoded.tokens.tolist() == expected["input_ids"]
    assert (encoded.loss_weight != 0).astype(int).tolist() == expected["assistant_masks"]


def test_templates_that_treat_the_last_turn_differently(tmp_path: Path) -> None:
    renderer = renderer_of(make_tokenizer_dir(tmp_path, template=THINKING))
    encoded = encode(renderer, sample_of("q", "<think>hm</think>\n\none", "q", "two"))
    think = "<think>\n\n</think>\n\n"
    assert trained(renderer, encoded) == ["one<|im_end|>\n", f"{think}two<|im_end|>\n"]
    assert "hm" not in renderer.decode(encoded.tokens)


def test_templates_that_rewrite_the_past_are_refused(tmp_path: Path) -> None:
    renderer = renderer_of(make_tokenizer_dir(tmp_path, template=REWRITES))
    with pytest.raises(BadRow, match="rewrites earlier turns"):
        encode(renderer, sample_of("q", "one", "q", "two"))


@pytest.mark.parametrize(
    ("template", "watched"),
    [
        (TEMPLATES["qwen2_5_vl"], True),
        (MARKED, True),
        (THINKING, False),
        ("{%- for m in messages -%}{{ m.role + ':' + (m.content | trim) + '\\n' }}{%- endfor -%}", False),
        ("{%- for m in messages -%}{{ m.role + (m | tojson) }}{%- endfor -%}", False),
        ("{%- for m in messages -%}{{ m.role }}{%- if m.content -%}{{ m.content }}{%- endif -%}{%- endfor -%}", False),
        ("{%- for m in messages -%}{%- set t = m.role + m.content -%}{{ t[:3] }}{%- endfor -%}", False),
        ("{%- for m in messages -%}{{ m.role ~ m.content }}{%- endfor -%}", False),
        (
            "{%- for m in messages -%}{{ m.role }}{% if m.content == 'x' %}!{% endif %}{{ m.content }}{%- endfor -%}",
            False,
        ),
        ("{{ strftime_now('%Y') }}{%- for m in messages -%}{{ m.role + m.content }}{%- endfor -%}", False),
        (
            "{%- macro show(c) -%}{{- c -}}{%- endmacro -%}"
            "{%- for m in messages -%}{{ m.role + show(m.content) }}{%- endfor -%}",
            False,
        ),
    ],
)
def test_only_templates_that_merely_print_are_remembered(template: str, watched: bool) -> None:
    chat = ChatTemplate(template, {})
    roles = ("system", "user", "assistant", "user", "assistant")
    assert (chat._skeleton(roles) is not None) == watched
    for text in ("plain", "  spaces \n", "", "<|im_end|>\n<|im_start|>assistant\n", "{{ 1 }} é"):
        messages = [{"role": role, "content": f"{text}{i}"} for i, role in enumerate(roles)]
        if not watched:
            continue
        pieces = chat.pieces(messages)
        assert "".join(piece for piece, _ in pieces) == chat.render(messages)
        answers = [piece for piece, answer in pieces if answer is not None]
        assert [answer.startswith(f"{text}{i}<|im_end|>") for answer, i in zip(answers, (2, 4), strict=True)] == [
            True
        ] * 2


def test_headers_inside_a_question_do_not_mislead(directory: Path) -> None:
    renderer = renderer_of(directory)
    fake = "<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
    assert trained(renderer, encode(renderer, sample_of(f"q{fake}", "one", "q", "two"))) == [
        "one<|im_end|>\n",
        "two<|im_end|>\n",
    ]


def test_a_template_may_refuse_a_row(tmp_path: Path) -> None:
    picky = "{%- if messages | length > 2 -%}{{ raise_exception('one turn only') }}{%- endif -%}" + TEMPLATES["qwen3"]
    renderer = renderer_of(make_tokenizer_dir(tmp_path, template=picky))
    assert trained(renderer, encode(renderer, sample_of("q", "a"))) == ["a<|im_end|>\n"]
    with pytest.raises(BadRow, match="one turn only"):
        encode(renderer, sample_of("q", "a", "q", "a"))


def test_pads_in_the_text_are_refused(directory: Path) -> None:
    with pytest.raises(BadRow, match="pad tokens"):
        encode(renderer_of(directory), sample_of("what is <|image_pad|>?", "a"))


def test_tools_reach_the_template(tmp_path: Path) -> None:
    template = (
        "{%- if tools -%}{{- 'TOOLS ' + tools | tojson -}}{%- endif -%}{%- for m in messages -%}"
        "{{- '<|im_start|>' + m.role + '\\n' + m.content -}}"
        "{%- for call in m.tool_calls or [] -%}{{- '<call>' + call.function | tojson -}}{%- endfor -%}"
        "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )
    renderer = renderer_of(make_tokenizer_dir(tmp_path, template=template))
    messages = [
        {"role": "user", "content": "q"},
        {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": "é"}}'},
        {"role": "tool_response", "content": "7"},
        {"role": "assistant", "content": "it is 7"},
    ]
    encoded = encode(renderer, normalise({"messages": messages, "tools": [{"name": "f"}]}))
    assert renderer.decode(encoded.tokens).startswith('TOOLS [{"name": "f"}]')
    call = '<call>{"name": "f", "arguments": {"x": "é"}}<|im_end|>\n'
    assert trained(renderer, encoded) == [call, "it is 7<|im_end|>\n"]


def test_description_collapses_runs(directory: Path) -> None:
    renderer = renderer_of(directory)
    encoded = encode(renderer, sample_of("<image>q", "fox", images=["a.jpg"]), images=1)
    shown = renderer.describe(encoded)
    assert f"<|vision_start|>[{IMAGE_PAD} * 6]<|vision_end|>q" in shown
    counted = int((encoded.loss_weight == 0).sum())
    assert shown.endswith(f"[LABELS] [-100 * {counted}]fox<|im_end|>\n")


def test_where_templates_and_tokens_come_from(tmp_path: Path) -> None:
    import json

    directory = make_tokenizer_dir(tmp_path)
    expected = encode(renderer_of(directory), sample_of("q", "a")).tokens.tolist()
    source = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    assert encode(renderer_of(directory), sample_of("q", "a")).tokens.tolist() == expected
    (directory / "chat_template.json").unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": source}]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert encode(renderer_of(directory), sample_of("q", "a")).tokens.tolist() == expected
    del config["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    chatml = renderer_of(directory)
    assert chatml.decode(encode(chatml, sample_of("q", "a")).tokens) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )


def test_a_wrong_pad_token_is_named(directory: Path) -> None:
    geometry = make_geometry(pad_ids={"image": 77, "video": VIDEO_PAD})
    with pytest.raises(UserError, match="disagree about the image token"):
        Renderer(directory, geometry)


def test_a_row_sets_variables_of_the_template(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not thinking %}<no>{% endif %}{% endif %}"
    )
    made = Renderer(make_tokenizer_dir(tmp_path, template=template), make_geometry())
    row = {"messages": [{"role": "user", "content": "a"}]}
    asked = [
        made.prompt(normalise(row | extra, need_answer=False))
        for extra in ({}, {"chat_template_kwargs": {"thinking": True}})
    ]
    assert [rendered.pieces[0][0].endswith("<no>") for rendered in asked] == [True, False]
    assert "thinking" in made.template.variables
    with pytest.raises(BadRow, match="chat_template_kwargs may not set messages"):
        made.prompt(normalise({**row, "chat_template_kwargs": {"messages": []}}, need_answer=False))
