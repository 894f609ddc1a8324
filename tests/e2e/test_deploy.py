"""``tessera deploy`` over real connections: answers equal ``tessera infer``, bad input harms nothing, it ends well."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("uvicorn", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("prometheus_client", reason="tessera deploy needs the extra `deploy`")

from tests.e2e.command import rows_of, works
from tests.e2e.server import Reply, Running, deployed
from tests.models import make_model_dir
from tests.serving import huge_png
from tests.toys import make_images, write_rows

CHAT = "/v1/chat/completions"
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deploy")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return make_model_dir(folder / "tiny", "qwen2_5_vl")


@pytest.fixture(scope="module")
def images(folder: Path) -> list[str]:
    return make_images(folder / "images", [(64, 48), (96, 96), (120, 60), (56, 112)], suffix=".png")


@pytest.fixture(scope="module")
def adapter(folder: Path, model: Path) -> Path:
    """An adapter that changes what the model says."""
    from tests.unit.infer.test_session import adapter_of

    return adapter_of(model, folder / "checkpoint-3")


@pytest.fixture(scope="module")
def server(model: Path, adapter: Path, folder: Path, images: list[str]) -> Iterator[Running]:
    with deployed(
        "--model", model, "--torch_dtype", "float32", "--adapters", f"math={adapter}", "--max_new_tokens", NEW,
        "--allowed_media_dir", folder / "images", "--log_interval", "1", "--max_num_seqs", "40", "--temperature", "0",
    ) as running:  # fmt: skip
        yield running
        alive = running.send("GET", "/health")
        assert alive.status == 200, running.output
        assert "Traceback" not in running.output, running.output


def rows(images: list[str]) -> list[dict[str, Any]]:
    """32 questions, most of them about images, no two alike."""
    made = []
    for index in range(32):
        shown = images[index % 4 : index % 4 + index % 3]
        text = "<image>" * len(shown) + f"question {index}" + " and so on" * (index % 5)
        made.append({"messages": [{"role": "user", "content": text}], "images": shown})
    return made


def parts_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The content of a dataset row as a client would send it."""
    urls = ["data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode() for path in row["images"]]
    text = row["messages"][0]["content"].replace("<image>", "")
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


@pytest.fixture(scope="module")
def expected(model: Path, images: list[str], folder: Path) -> list[str]:
    """What ``tessera infer`` answers."""
    path = write_rows(folder / "rows.jsonl", rows(images))
    out = folder / "infer.jsonl"
    works(
        "infer", "--model", model, "--torch_dtype", "float32", "--val_dataset", path, "--result_path", out,
        "--max_new_tokens", str(NEW), "--temperature", "0",
    )  # fmt: skip
    answers = [row["response"] for row in rows_of(out)]
    assert len(set(answers)) > 12, "the test should see different answers"
    return answers


def test_answers_equal_infer_one_at_a_time(server: Running, images: list[str], expected: list[str]) -> None:
    for row, answer in list(zip(rows(images), expected, strict=True))[:6]:
        assert server.chat(parts_of(row)).text == answer
        assert server.chat(parts_of(row), stream=True).text == answer


def test_answers_equal_infer_for_32_at_once(server: Running, images: list[str], expected: list[str]) -> None:
    with ThreadPoolExecutor(32) as clients:
        futures = [
            clients.submit(server.chat, parts_of(row), stream=index % 2 == 0) for index, row in enumerate(rows(images))
        ]
        assert [future.result().text for future in futures] == expected


def test_an_image_may_be_a_file_or_come_from_elsewhere(server: Running, images: list[str], expected: list[str]) -> None:
    row = rows(images)[1]
    for url in (Path(row["images"][0]).name, row["images"][0], Path(row["images"][0]).as_uri()):
        parts = parts_of(row)
        parts[0] = {"type": "image_url", "image_url": {"url": url}}
        assert server.chat(parts).text == expected[1]


def test_an_adapter_by_its_name(server: Running, model: Path, adapter: Path, folder: Path, images: list[str]) -> None:
    path = write_rows(folder / "few.jsonl", rows(images)[:4])
    out = folder / "adapter.jsonl"
    works(
        "infer", "--model", model, "--adapters", adapter, "--torch_dtype", "float32", "--val_dataset", path,
        "--result_path", out, "--max_new_tokens", str(NEW), "--temperature", "0",
    )  # fmt: skip
    answers = [row["response"] for row in rows_of(out)]
    with ThreadPoolExecutor(8) as clients:
        own = [clients.submit(server.chat, parts_of(row), model="math") for row in rows(images)[:4]]
        base = [clients.submit(server.chat, parts_of(row), model="tiny") for row in rows(images)[:4]]
        assert [future.result().text for future in own] == answers
        assert [future.result().text for future in base] != answers
    listed = server.send("GET", "/v1/models").json["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("tiny", None), ("math", "tiny")]


def test_settings_of_a_request(server: Running) -> None:
    drawn = [server.chat("hello", temperature=1.5, seed=seed, n=2).json["choices"] for seed in (1, 1, 2)]
    texts = [[choice["message"]["content"] for choice in choices] for choices in drawn]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
    short = server.chat("hello", max_tokens=3, logprobs=True, top_logprobs=2).json
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 3
    assert [len(one["top_logprobs"]) for one in short["choices"][0]["logprobs"]["content"]] == [2, 2, 2]
    whole = server.chat("hello").text
    cut = server.chat("hello", stop=[whole[4:6]]).json["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(whole[4:6])] and cut["finish_reason"] == "stop"


def test_a_prompt_that_came_before_is_known(server: Running, images: list[str]) -> None:
    parts = parts_of(rows(images)[2])
    server.chat(parts)
    usage = server.chat(parts).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 2


def test_json_that_fits_a_schema(server: Running) -> None:
    pytest.importorskip("llguidance", reason="constrained answers need the extra `deploy`")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    found = json.loads(server.chat("who?", response_format=form, max_tokens=400).text)
    assert set(found) == {"name", "ok"} and isinstance(found["ok"], bool)
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    assert server.chat("who?", response_format=bad).status == 400


def test_the_openai_client(server: Running, images: list[str], expected: list[str]) -> None:
    openai = pytest.importorskip("openai", reason="the official client is not installed")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)
    assert [one.id for one in client.models.list().data] == ["tiny", "math"]
    messages = [{"role": "user", "content": parts_of(rows(images)[1])}]
    answer = client.chat.completions.create(model="tiny", messages=messages, seed=1)
    assert answer.choices[0].message.content == expected[1]
    stream = client.chat.completions.create(
        model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}, logprobs=True
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == expected[1] and chunks[-1].usage == answer.usage
    assert client.completions.create(model="tiny", prompt="The", max_tokens=4).choices[0].text
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="gpt", messages=messages)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=-1)
    assert caught.value.param == "max_tokens"


BAD: list[tuple[str, dict[str, Any], int]] = [
    ("malformed base64", {"image": "data:image/png;base64,@@@"}, 400),
    ("an empty image", {"image": "data:image/png;base64,"}, 400),
    ("garbage", {"image": "data:image/png;base64," + base64.b64encode(b"garbage" * 99).decode()}, 400),
    ("200 megapixels", {"image": "data:image/png;base64," + base64.b64encode(huge_png(20000, 10000)).decode()}, 400),
    ("loopback", {"image": "http://127.0.0.1:1/a.png"}, 400),
    ("cloud metadata", {"image": "http://169.254.169.254/latest/meta-data"}, 400),
    ("another file", {"image": "/etc/passwd"}, 400),
    ("unknown model", {"model": "gpt-5"}, 404),
    ("negative max_tokens", {"max_tokens": -5}, 400),
    ("too long a prompt", {"content": "word " * 20_000}, 400),
    ("too long an answer", {"max_tokens": 100_000}, 400),
    ("10,000 images", {"content": [{"type": "image", "image": "data:,"}] * 10_000}, 400),
    ("no messages", {"messages": []}, 400),
    ("unsupported", {"logit_bias": {"1": 5}}, 400),
]


@pytest.mark.parametrize(("name", "fields", "status"), BAD, ids=[name for name, *_ in BAD])
def test_bad_input(server: Running, name: str, fields: dict[str, Any], status: int) -> None:
    given = dict(fields)
    content = given.pop("content", "hello")
    if "image" in given:
        content = [{"type": "image_url", "image_url": {"url": given.pop("image")}}, {"type": "text", "text": "?"}]
    reply = server.chat(content, **given)
    assert reply.status == status and reply.error["message"]
    assert server.chat("hello", max_tokens=1).status == 200


def test_an_image_that_breaks_off(server: Running, images: list[str]) -> None:
    """Its header is right, its pixels are missing: found when they are decoded, and still the client's mistake."""
    data = Path(images[1]).read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data[: len(data) // 2]).decode()
    for stream in (False, True):
        reply = server.chat([{"type": "image_url", "image_url": {"url": url}}], stream=stream)
        assert reply.status == 400 and "decode" in reply.error["message"], reply.body


def test_bodies(server: Running) -> None:
    assert server.send("POST", CHAT, b"{").status == 400
    large = server.send("POST", CHAT, b"x" * (33 * 2**20))
    assert large.status == 413 and large.error["code"] == "request_too_large"
    # Chunks whose number nobody knows: no Content-Length is sent.
    with socket.create_connection(("127.0.0.1", server.port), 30) as raw:
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
        for _ in range(34):
            raw.sendall(chunk)
        raw.sendall(b"0\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    assert server.send("GET", "/v1/models", headers={"Host": "evil.example"}).status == 403


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(server: Running, stream: bool) -> None:
    server.wait_for("tessera_running", 0)
    before = server.numbers()["tessera_generated_tokens_total"]
    fields = {"max_tokens": 4000, "n": 8, "temperature": 0, "stream": stream}
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields})
    with socket.create_connection(("127.0.0.1", server.port), 30) as raw:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        if stream:
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
        else:
            server.wait_for("tessera_running", 8)
    server.wait_for("tessera_running", 0)
    assert server.numbers()["tessera_generated_tokens_total"] - before < 8 * 2000


def test_what_is_printed(server: Running, images: list[str]) -> None:
    secret = "a very secret question"
    server.chat([*parts_of(rows(images)[1])[:1], {"type": "text", "text": secret}])
    deadline = time.monotonic() + 20
    while "requests |" not in server.output and "requests (" not in server.output:
        assert time.monotonic() < deadline, server.output
        time.sleep(0.1)
    assert secret not in server.output and "base64" not in server.output and "iVBOR" not in server.output


def certified(folder: Path) -> tuple[list[str], ssl.SSLContext | None]:
    """Flags for HTTPS with a certificate of our own and a client's trust in it; nothing where openssl is missing."""
    if shutil.which("openssl") is None:
        return [], None
    key, certificate = str(folder / "key.pem"), str(folder / "cert.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    extra = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*make, *extra], check=True, capture_output=True)
    return ["--ssl_keyfile", key, "--ssl_certfile", certificate], ssl.create_default_context(cafile=certificate)


def test_a_full_queue_and_a_drain(model: Path, tmp_path: Path) -> None:
    """With one place and one waiting a third request is told to come back; after SIGTERM what runs ends well.

    Over HTTPS, and of a run's newest checkpoint.
    """
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-5").symlink_to(model)
    flags, context = certified(tmp_path)
    with deployed(
        "--model", tmp_path / "run", "--torch_dtype", "float32", "--max_num_seqs", "1", "--max_waiting", "1",
        "--api_key", "secret", *flags, context=context,
    ) as running:  # fmt: skip
        key = {"Authorization": "Bearer secret"}
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 600, "temperature": 1.0, "seed": 1}
        assert running.send("POST", CHAT, body).status == 401
        [listed] = running.send("GET", "/v1/models", headers=key).json["data"]
        assert listed["id"] == "checkpoint-5"
        replies: list[Reply] = []

        def ask() -> None:
            replies.append(running.send("POST", CHAT, body, key))

        first, second = threading.Thread(target=ask), threading.Thread(target=ask)
        first.start()
        wait_for(running, key, "tessera_running", 1)
        second.start()
        wait_for(running, key, "tessera_waiting", 1)
        refused = running.send("POST", CHAT, body, key)
        assert refused.status == 429 and refused.headers["retry-after"] and refused.error["type"] == "rate_limit_error"

        running.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while running.send("GET", "/health").status != 503:
            assert time.monotonic() < deadline
        late = running.send("POST", CHAT, body, key)
        assert late.status == 503 and late.error["code"] == "shutting_down"
        first.join(60)
        second.join(60)
        assert [reply.status for reply in replies] == [200, 200]
        assert replies[0].text == replies[1].text
        assert running.process.wait(20) == 0, running.output
    assert "secret" not in running.output and "Traceback" not in running.output


def wait_for(running: Running, key: dict[str, str], name: str, value: int) -> None:
    """Until ``/metrics`` of a server with a key says so."""
    deadline = time.monotonic() + 20
    while f"\n{name} {value}.0\n" not in running.send("GET", "/metrics", headers=key).body.decode():
        assert time.monotonic() < deadline, running.output
        time.sleep(0.01)
