"""The routes without a model: what is asked of the engine, and what its events become."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("prometheus_client", reason="tessera deploy needs the extra `deploy`")

from tessera.infer.engine import Constraint, Event, Finished, Piece, Request, Sampling, TokenLogprob
from tests.serving import (
    CHAT,
    TEXT,
    Server,
    ask,
    call,
    image_part,
    make_encoder,
    make_gate,
    make_service,
    picture,
    says,
    uri,
)


def decoded(server: Server) -> str:
    """The prompt that the engine was asked."""
    return str(server.engine.session.encoder.renderer.decode(server.asked.question.encoded.tokens))


def test_an_answer(server: Server) -> None:
    reply = server.post(ask(model="tiny"))
    assert reply.status == 200
    found = reply.json
    assert found["object"] == "chat.completion" and found["model"] == "tiny" and found["id"].startswith("chatcmpl-")
    [choice] = found["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hello"},
        "logprobs": None,
        "finish_reason": "stop",
    }
    prompt = len(server.asked.question.encoded.tokens)
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 2,
        "total_tokens": prompt + 2,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert decoded(server).endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_says_the_same(server: Server, usage: bool) -> None:
    whole = server.post(ask(n=2)).json
    options = {"stream_options": {"include_usage": True}} if usage else {}
    reply = server.post(ask(n=2, stream=True, **options))
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.events
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    texts, ends = {0: "", 1: ""}, {}
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
            ends[choice["index"]] = choice["finish_reason"] or ends.get(choice["index"])
    assert texts == {choice["index"]: choice["message"]["content"] for choice in whole["choices"]}
    assert ends == {0: "stop", 1: "stop"}
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    if usage:
        assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
        assert all(event["usage"] is None for event in events[:-1])
    else:
        assert all("usage" not in event for event in events)


def test_fields_reach_the_engine(server: Server) -> None:
    server.post(
        ask(
            model="other", max_tokens=9, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, seed=4, n=2, stop=["a", "b"],
            presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.2, logprobs=True, top_logprobs=2,
        )
    )  # fmt: skip
    asked = server.asked
    assert (asked.adapter, asked.max_new_tokens, asked.seed, asked.n, asked.stop) == ("other", 9, 4, 2, ("a", "b"))
    assert asked.sampling == Sampling(0.5, 3, 0.9, 1.2, 0.1, 1.0, -1.0)
    assert asked.logprobs == 2 and not asked.stream
    server.post(ask(max_completion_tokens=7, stop="x", temperature=0, logprobs=True))
    asked = server.asked
    assert (asked.adapter, asked.max_new_tokens, asked.stop, asked.logprobs) == (None, 7, ("x",), 0)
    assert server.post(ask(logprobs=False, top_p=None, stop=None, tools=None)).status == 200
    assert server.asked.logprobs is None


def test_seeds_differ_where_none_is_given(server: Server) -> None:
    seeds = set()
    for _ in range(3):
        server.post(ask())
        seeds.add(server.asked.seed)
    assert len(seeds) == 3


def test_an_answer_may_fill_what_is_left(server: Server) -> None:
    server.post(ask())
    assert server.asked.max_new_tokens == 2048
    tight = make_service(server.engine, context=60)
    call(make_gate(tight), "POST", CHAT, ask())
    assert server.asked.max_new_tokens == 60 - len(server.asked.question.encoded.tokens)


def test_roles_and_parts(server: Server) -> None:
    content = [{"type": "text", "text": "a "}, image_part(), {"type": "text", "text": " b"}]
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "yes"},
        {
            "role": "user",
            "content": [{"type": "image", "image": uri(picture(size=(28, 28)))}, {"type": "text", "text": "?"}],
        },
    ]
    assert server.post({"messages": messages}).status == 200
    text = decoded(server)
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\na <|vision_start|><|image_pad|>")
    assert (
        "<|vision_end|> b<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\n<|vision_start|>" in text
    )
    media = server.asked.question.encoded.media
    assert [medium.item.kind for medium in media] == ["image", "image"]
    assert media[0].sources == (picture(size=(56, 56)),)


def test_a_video_is_its_frames(server: Server) -> None:
    frames = [uri(picture("JPEG", (56, 56)), "image/jpeg")] * 4
    part: dict[str, Any] = {"type": "video", "video": frames, "fps": 2}
    assert server.post(ask([part, {"type": "text", "text": "?"}])).status == 200
    joined = "data:video/jpeg;base64," + ",".join([base64.b64encode(picture("JPEG", (56, 56))).decode()] * 4)
    assert server.post(ask([{"type": "video_url", "video_url": {"url": joined}}])).status == 200
    [medium] = server.asked.question.encoded.media
    assert medium.item.kind == "video" and len(medium.sources) == 4
    assert "fps" in server.post(ask([part, part | {"fps": None}])).error["message"]


@pytest.mark.parametrize("word", ["<image>", "<video>", "<audio>", "<img>/etc/passwd</img>", "a <image> <img>x</img>"])
def test_words_of_datasets_are_only_words(server: Server, word: str) -> None:
    for content in (word, [{"type": "text", "text": word}]):
        assert server.post(ask(content)).status == 200
        assert f"user\n{word}<|im_end|>" in decoded(server)
        assert not server.asked.question.encoded.media
    both = [image_part(), {"type": "text", "text": word}]
    assert server.post(ask(both)).status == 200
    assert len(server.asked.question.encoded.media) == 1 and word in decoded(server)


def test_log_probabilities(server: Server) -> None:
    renderer = server.engine.session.encoder.renderer
    [yes], [no] = renderer.tokenizer.encode("Y").ids, renderer.tokenizer.encode("N").ids
    half = renderer.tokenizer.encode("é").ids[0]

    def behave(request: Request, listen: Callable[[Event], None]) -> None:
        told = (TokenLogprob(yes, -0.5, ((yes, -0.5), (no, float("-inf")))), TokenLogprob(half, -1.0))
        listen(Piece(request.id, 0, "Y", (yes, half), told))
        listen(Finished(request.id, 0, "length", 3, 2, 1))

    server.behave(behave)
    for stream in (False, True):
        body = ask(logprobs=True, top_logprobs=2, stream=stream)
        reply = server.post(body)
        choices = [event["choices"][0] for event in reply.events] if stream else reply.json["choices"]
        [content] = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
        assert content[0] == {
            "token": "Y",
            "logprob": -0.5,
            "bytes": [89],
            "top_logprobs": [
                {"token": "Y", "logprob": -0.5, "bytes": [89]},
                {"token": "N", "logprob": -9999.0, "bytes": [78]},
            ],
        }
        assert content[1]["bytes"] == [0xC3]
        assert choices[-1]["finish_reason"] == "length"
    found = server.post({"prompt": "a", "logprobs": 1}, TEXT).json["choices"][0]["logprobs"]
    assert found["tokens"][0] == "Y" and found["token_logprobs"] == [-0.5, -1.0]
    assert found["text_offset"] == [0, 1] and found["top_logprobs"][0] == {"Y": -0.5, "N": -9999.0}


def test_completions(server: Server) -> None:
    reply = server.post({"prompt": "The quick", "model": "tiny", "max_tokens": 3}, TEXT).json
    assert reply["object"] == "text_completion" and reply["choices"][0]["text"] == "Hello"
    assert decoded(server) == "The quick" and server.asked.max_new_tokens == 3
    several = server.post({"prompt": ["a", "b"], "n": 2}, TEXT).json
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert server.asked.max_new_tokens == 16
    events = server.post({"prompt": ["a", "b"], "stream": True}, TEXT).events
    texts = ["", ""]
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == ["Hello", "Hello"]
    assert server.post({"prompt": [10, 11]}, TEXT).status == 200
    assert list(server.asked.question.encoded.tokens) == [10, 11]
    assert server.post({"prompt": [[10], [11, 12]]}, TEXT).status == 200


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ([], "empty"),
        ("", "empty"),
        ([-1], "numbers from 0"),
        ([10**9], "numbers from 0"),
        ("<|image_pad|>", "stand for images"),
        (["a"] * 17, "17 prompts"),
    ],
)
def test_prompts_that_are_none(server: Server, prompt: Any, why: str) -> None:
    reply = server.post({"prompt": prompt}, TEXT)
    assert reply.status == 400 and why in reply.error["message"] and reply.error["param"] == "prompt"


# ---------------------------------------------------------------------------------------------------- tools, formats

TEMPLATE = (
    "{% if tools %}TOOLS{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>{% endif %}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'


@pytest.fixture
def tools(tmp_path: Path) -> Server:
    return Server(make_encoder(tmp_path, TEMPLATE))


def test_tools_are_told_and_their_calls_found(tools: Server) -> None:
    tools.behave(says("I look.\n", CALL[:5], CALL[5:30], CALL[30:]))
    reply = tools.post(ask(tools=[TOOL])).json["choices"][0]
    assert reply["finish_reason"] == "tool_calls" and reply["message"]["content"] == "I look."
    [made] = reply["message"]["tool_calls"]
    assert made["type"] == "function" and made["function"] == {"name": "look", "arguments": '{"at": "é"}'}
    assert decoded(tools).startswith('TOOLS[{"type": "function", "function": {"name": "look"')

    deltas = [event["choices"][0] for event in tools.post(ask(tools=[TOOL], stream=True)).events]
    [streamed] = [call for one in deltas for call in one["delta"].get("tool_calls", [])]
    assert streamed["index"] == 0 and streamed["function"] == made["function"]
    assert "".join(one["delta"].get("content") or "" for one in deltas) == "I look."
    assert deltas[-1]["finish_reason"] == "tool_calls"

    follow = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": made["id"], "content": "a house"},
    ]
    assert tools.post({"messages": follow, "tools": [TOOL]}).status == 200
    assert '<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>' in decoded(tools)
    assert "<|im_start|>tool\na house<|im_end|>" in decoded(tools)


def test_a_choice_of_tools(tools: Server) -> None:
    tools.behave(says('{"name": "look", "arg', 'uments": {}}'))
    for choice in ("required", {"type": "function", "function": {"name": "look"}}):
        reply = tools.post(ask(tools=[TOOL], tool_choice=choice)).json["choices"][0]
        assert reply["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}
        assert reply["message"]["content"] is None
        constraint = tools.asked.constraint
        assert constraint is not None and constraint.kind == "json_schema"
        assert json.loads(constraint.text)["properties"]["name"] == {"const": "look"}
    tools.post(ask(tools=[TOOL, {"type": "function", "function": {"name": "b"}}], tool_choice="required"))
    assert tools.asked.constraint is not None and len(json.loads(tools.asked.constraint.text)["anyOf"]) == 2
    tools.behave(says(CALL))
    reply = tools.post(ask(tools=[TOOL], tool_choice="none")).json["choices"][0]
    assert reply["message"] == {"role": "assistant", "content": CALL} and not decoded(tools).startswith("TOOLS")
    unknown = tools.post(ask(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "c"}}))
    assert unknown.status == 400 and unknown.error["param"] == "tool_choice"


def test_a_template_without_tools_says_so(server: Server) -> None:
    reply = server.post(ask(tools=[TOOL]))
    assert reply.status == 400 and reply.error["param"] == "tools" and "no place for tools" in reply.error["message"]


def test_variables_of_the_template(tools: Server) -> None:
    assert tools.post(ask(chat_template_kwargs={"thinking": True})).status == 200
    assert decoded(tools).endswith("<think>")
    reply = tools.post(ask(chat_template_kwargs={"thinking": True, "thinkign": True}))
    assert reply.status == 200 and reply.headers["warning"] == '299 tessera "ignored: chat_template_kwargs.thinkign"'
    assert tools.post(ask(chat_template_kwargs={"messages": []})).status == 400


def test_formats_of_the_answer(server: Server) -> None:
    server.post(ask(response_format={"type": "json_object"}))
    assert server.asked.constraint == Constraint("json_object")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    server.post(ask(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}))
    assert server.asked.constraint == Constraint("json_schema", json.dumps(schema))
    server.post(ask(response_format={"type": "text"}))
    assert server.asked.constraint is None


# -------------------------------------------------------------------------------------------------------- the others


def test_models(server: Server) -> None:
    found = call(server.gate, "GET", "/v1/models").json
    assert [one["id"] for one in found["data"]] == ["tiny", "other"]
    assert found["data"][1]["parent"] == "tiny" and found["data"][0]["max_model_len"] == 4096
    assert call(server.gate, "GET", "/v1/models/other").json == found["data"][1]


def test_metrics(server: Server) -> None:
    server.post(ask(stream=True))
    server.post(ask(model="gpt"))
    call(server.gate, "GET", "/nowhere/to/be/found")
    text = call(server.gate, "GET", "/metrics").body.decode()
    for line in (
        'tessera_requests_total{route="/v1/chat/completions",status="200"} 1.0',
        'tessera_requests_total{route="/v1/chat/completions",status="404"} 1.0',
        'tessera_requests_total{route="other",status="404"} 1.0',
        "tessera_running 3.0",
        "tessera_cached_tokens_total 4.0",
        'tessera_finished_total{reason="stop"} 2.0',
        "tessera_time_to_first_token_seconds_count 1.0",
        "tessera_time_per_output_token_seconds_count 1.0",
    ):
        assert line in text.splitlines(), line


def test_what_is_not_there(server: Server) -> None:
    for path in ("/v1/embeddings", "/admin", "/v1/chat"):
        reply = call(server.gate, "GET", path)
        assert reply.status == 404 and reply.error["message"] == f"there is no {path} here"
    reply = call(server.gate, "GET", CHAT)
    assert reply.status == 405 and reply.headers["allow"] == "POST" and reply.error


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_need_nothing_else(server: Server, path: str) -> None:
    reply = call(server.gate, "GET", path)
    text = reply.body.decode()
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/html")
    assert "://" not in text.replace("${location.origin}", "") and "innerHTML" not in text
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_the_description(server: Server) -> None:
    found = call(server.gate, "GET", "/openapi.json").json
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= set(found["paths"])
    responses = found["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "4XX", "5XX"} == set(responses)
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}


class Elsewhere:
    """Other servers: ``http://x/WIDTH`` is an image of that width, after a while for even widths."""

    def get(self, url: str) -> bytes:
        width = int(url.rpartition("/")[2])
        time.sleep(0.05 if width % 2 == 0 else 0)
        return picture(size=(width, 56))


def test_images_from_everywhere_keep_their_order(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service.library, "_fetcher", Elsewhere())
    parts = [{"type": "image", "image": url} for url in ("http://x/112", uri(picture(size=(84, 56))), "http://x/57")]
    assert server.post(ask(parts)).status == 200
    sources = [medium.sources[0] for medium in server.asked.question.encoded.media]
    assert sources == [picture(size=(112, 56)), picture(size=(84, 56)), picture(size=(57, 56))]
    monkeypatch.setattr("tessera.infer.serve.app.FETCH_S", 0.01)
    reply = server.post(ask(parts))
    assert reply.status == 400 and "took longer than 0.01 s" in reply.error["message"]
    assert reply.error["param"] == "messages.0.content.0"
