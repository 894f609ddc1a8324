"""Answers from a server, whatever it does, and from a model in this process."""

from __future__ import annotations

import base64
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.config.resolve import resolve, run_of
from tessera.data.sample import BadRow
from tessera.evaluate import server as local
from tessera.evaluate.answerer import Answerer, Ask, Embedded, Told
from tessera.evaluate.identity import fingerprint_of
from tessera.evaluate.remote import Remote, Server, chat_messages, check_url, data_uri
from tessera.evaluate.sources import sampling_of, settings_of, with_generation
from tessera.infer.session import Session
from tests.benchmarks import COLOURS, QUESTION, completion, picture, server
from tests.models import make_model_dir


def asks(tmp_path: Path, count: int) -> Iterator[Ask]:
    for number in range(count):
        path = picture(tmp_path / f"{number}.png", list(COLOURS)[number % 3])
        row = {"messages": [{"role": "user", "content": f"<image>{QUESTION}"}], "images": [str(path)]}
        yield Ask(number, row, tmp_path, number, 16)


def told(remote: Answerer, questions: Iterator[Ask]) -> list[Told]:
    return sorted(remote.answers(questions), key=lambda found: found.number)


def test_a_server_sees_the_pictures_and_the_settings(tmp_path: Path) -> None:
    with server() as (url, requests):
        remote = Remote(Server(url, api_key="k"), {"temperature": 0.0}, concurrency=3)
        assert remote.settings == {"url": f"{url}/v1", "model": "seer", "temperature": 0.0}
        found = told(remote, asks(tmp_path, 9))
    assert [answer.text for answer in found] == [list(COLOURS)[number % 3] for number in range(9)]
    assert {answer.finish for answer in found} == {"stop"}
    assert {(answer.prompt_tokens, answer.completion_tokens) for answer in found} == {(9, 2)}
    for request in requests:
        assert request["path"] == "/v1/chat/completions"
        assert request["key"] == "Bearer k"
        body = request["body"]
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("seer", 16, 0.0)
        assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_every_spelling_of_an_address(path: str) -> None:
    assert Server(f"http://h:1{path}").base == "http://h:1/v1"
    assert Server("http://h/api/v3").base == "http://h/api/v3"


def test_what_passes_is_tried_again_later(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], number: int) -> tuple[int, Any]:
        return ((429, 503, 200)[min(number, 3) - 1], {"error": {"message": "later"}} if number < 3 else None)

    with server(reply) as (url, requests):
        [found] = told(Remote(Server(url, "seer", pause_s=0.01), {}), asks(tmp_path, 1))
    assert (found.text, len(requests)) == ("red", 3)


def test_a_question_that_is_refused_is_its_own_trouble(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], number: int) -> tuple[int, Any]:
        return (
            (400, {"error": {"message": "too   long"}})
            if "green" in completion(body)["choices"][0]["message"]["content"]
            else (200, None)
        )

    with server(reply) as (url, requests):
        found = told(Remote(Server(url, "seer"), {}), asks(tmp_path, 6))
    assert [answer.error for answer in found] == ["", "refused: 400 too long", ""] * 2
    assert len(requests) == 6


@pytest.mark.parametrize(("status", "hint"), [(401, "give --api_key"), (404, "check the address and --model")])
def test_what_is_wrong_for_all_ends_the_run(tmp_path: Path, status: int, hint: str) -> None:
    with server(lambda body, number: (status, {"error": {"message": "no"}})) as (url, requests):
        with pytest.raises(UserError, match=f"{status} no; {hint}"):
            told(Remote(Server(url, "seer"), {}, concurrency=2), asks(tmp_path, 50))
    assert len(requests) < 10


def test_a_server_that_only_fails_ends_the_run_and_one_that_sometimes_fails_does_not(tmp_path: Path) -> None:
    with server(lambda body, number: (200, b"<html>")) as (url, _):
        with pytest.raises(UserError, match=r"16 requests in a row failed \(failed: not a chat completion: <html>\)"):
            told(Remote(Server(url, "seer"), {}), asks(tmp_path, 40))
    with server(lambda body, number: (200, {"choices": []} if number % 4 == 0 else None)) as (url, _):
        found = told(Remote(Server(url, "seer"), {}, concurrency=1), asks(tmp_path, 40))
    assert sum(answer.error.startswith("failed: not a chat completion") for answer in found) == 10


def test_nobody_listening(tmp_path: Path) -> None:
    with server() as (url, _):
        pass
    with pytest.raises(UserError, match=rf"--eval_url {url}: cannot be reached"):
        Remote(Server(url), {})
    with pytest.raises(UserError, match="expected http://host:port"):
        check_url("localhost:8000")


def test_as_many_questions_are_under_way_as_were_asked_for(tmp_path: Path) -> None:
    here, most, lock, full = 0, 0, threading.Lock(), threading.Event()

    def reply(body: dict[str, Any], number: int) -> tuple[int, Any]:
        nonlocal here, most
        with lock:
            here += 1
            most = max(most, here)
            if here == 4:
                full.set()
        full.wait(5)
        with lock:
            here -= 1
        return 200, None

    with server(reply) as (url, _):
        assert len(told(Remote(Server(url, "seer"), {}, concurrency=4), asks(tmp_path, 12))) == 12
    assert most == 4


def test_messages_keep_the_places_of_pictures(tmp_path: Path) -> None:
    from PIL import Image

    one, two = picture(tmp_path / "a.png", "red"), tmp_path / "b.bmp"
    Image.new("RGB", (20, 20), (0, 0, 255)).save(two)
    row = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "a<image>b<image>"},
            {"role": "assistant", "content": "the answer is not sent"},
        ],
        "images": ["a.png", {"bytes": two.read_bytes()}],
    }
    messages, tools = chat_messages(row, tmp_path)
    assert tools == []
    assert messages[0] == {"role": "system", "content": "S"}
    assert len(messages) == 2
    parts = messages[1]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert base64.b64decode(urls[0].partition(",")[2]) == one.read_bytes(), "as it is"
    assert urls[1].startswith("data:image/png;base64,"), "not every server reads bmp"
    (tmp_path / "no.png").write_bytes(b"no picture")
    for name in ("no.png", "nowhere.png"):
        with pytest.raises(BadRow):
            data_uri(str(tmp_path / name))


def test_a_missing_picture_is_the_questions_trouble(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "<image>x"}], "images": ["nowhere.png"]}
    with server() as (url, requests):
        [found] = told(Remote(Server(url, "seer"), {}), iter([Ask(0, row, tmp_path, 0, 4)]))
    assert "nowhere.png" in found.error
    assert requests == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model") / "m", "qwen3_vl")


def test_a_model_here_answers_as_inference_does(model: Path, tmp_path: Path) -> None:
    session = Session.open(run_of("infer", model=str(model), temperature=0.0, max_new_tokens=8))
    wanted = [session.answer([session.question(ask.row)])[0] for ask in asks(tmp_path, 5)]
    embedded = Embedded(session, {"m": 1})
    broken = Ask(5, {"messages": [{"role": "user", "content": "<image>x"}], "images": ["/no.png"]}, None, 0, 8)
    limited = [Ask(ask.number, ask.row, ask.base, ask.seed, 8) for ask in asks(tmp_path, 5)]
    found = {answer.number: answer for answer in embedded.answers(iter([*limited, broken]))}
    assert "/no.png" in found.pop(5).error
    for number, reply in enumerate(wanted):
        assert not isinstance(reply, BadRow)
        assert found[number].text == reply.text
        assert found[number].completion_tokens == len(reply.answer.tokens)


def test_limits_differ_between_questions(model: Path, tmp_path: Path) -> None:
    session = Session.open(run_of("infer", model=str(model), temperature=0.0))
    mixed = [Ask(ask.number, ask.row, ask.base, 0, 3 + ask.number % 2 * 4) for ask in asks(tmp_path, 4)]
    found = list(Embedded(session, {}).answers(iter(mixed)))
    assert {answer.number: answer.completion_tokens for answer in found if answer.finish == "length"} == {
        ask.number: ask.max_new_tokens
        for ask in mixed
        if any(a.number == ask.number and a.finish == "length" for a in found)
    }
    assert max(answer.completion_tokens for answer in found) == 7


def test_settings_are_the_model_and_what_decides_answers(model: Path, tmp_path: Path) -> None:
    def settings(*words: str) -> dict[str, Any]:
        run = with_generation(resolve(["eval", "--model", str(model), "--eval_datasets", "a=b", *words], {}))
        return {**settings_of(run), **sampling_of(run, Session.open(run))}

    plain = settings()
    assert plain == settings("--eval_limit", "3", "--max_batch_size", "2", "--seed", "7")
    assert plain["temperature"] == 0.0
    warm = settings("--eval_generation_config", '{"temperature": 0.6, "top_p": 0.9, "seed": 7}')
    assert (warm["temperature"], warm["top_p"], warm["seed"]) == (0.6, 0.9, 7)
    assert settings("--temperature", "0.1", "--eval_generation_config", '{"temperature": 0.6}')["temperature"] == 0.1
    assert settings("--max_pixels", "2048") == {**plain, "max_pixels": 2048}
    with pytest.raises(UserError, match=r"--eval_generation_config num_beams: not offered"):
        settings("--eval_generation_config", '{"num_beams": 4}')


def test_a_fingerprint_is_the_contents(model: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert fingerprint_of(copy) == fingerprint_of(model)
    (copy / "args.json").write_text("{}")
    assert fingerprint_of(copy) == fingerprint_of(model)
    other = make_model_dir(tmp_path / "other", "qwen3_vl", seed=1)
    assert fingerprint_of(other) != fingerprint_of(model)


def test_a_fingerprint_of_large_files_sees_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.setattr("tessera.evaluate.identity.WHOLE", 1000)
    tensors = {f"layer.{index}": torch.full((64, 64), float(index)) for index in range(5)}
    save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / "b.bin").write_bytes(bytes(5000))
    seen = {fingerprint_of(tmp_path)}
    for name in tensors:
        save_file({**tensors, name: tensors[name] + 1}, tmp_path / "a.safetensors")
        seen.add(fingerprint_of(tmp_path))
    assert len(seen) == 6


SERVER = """
import sys, time
from tests.benchmarks import server
with server(port=int(sys.argv[1])):
    time.sleep(60)
"""


def test_a_server_of_our_own_lives_as_long_as_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolve(["eval", "--model", "org/m", "--max_pixels", "4096", "--eval_datasets", "a=b"], {})
    words = local.command(run, 1234, "vllm")
    assert words[3:] == ["deploy", "--host", "127.0.0.1", "--port", "1234", "--model", "org/m", "--served_model_name",
                         local.NAME, "--infer_backend", "vllm", "--max_pixels", "4096"]  # fmt: skip
    monkeypatch.setattr(local, "command", lambda run, port, backend: [sys.executable, "-c", SERVER, str(port)])
    answerer = local.Deployed(run, "vllm", {"model": "abc"}, {})
    assert answerer.settings == {"model": "abc", "backend": "vllm"}
    assert [answer.text for answer in told(answerer, asks(tmp_path, 2))] == ["red", "green"]
    url = answerer._remote._server.url
    answerer.close()
    with pytest.raises(UserError, match="cannot be reached"):
        Remote(Server(url), {})
    monkeypatch.setattr(local, "command", lambda run, port, backend: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match="tessera deploy ended with exit code 3 before it answered"):
        local.Deployed(run, "vllm", {}, {})
