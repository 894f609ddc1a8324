"""The chat page in a real browser: an image is added, an answer streams in, and nothing comes from anywhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("uvicorn", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("prometheus_client", reason="tessera deploy needs the extra `deploy`")

from tests.browser import Page, browser, program
from tests.e2e.server import Running, deployed
from tests.models import make_model_dir
from tests.toys import make_images

pytestmark = [pytest.mark.slow, pytest.mark.skipif(program() is None, reason="no Chromium on this machine")]
KEY = "sesame"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = make_model_dir(tmp_path_factory.mktemp("page") / "tiny-vl", "qwen2_5_vl")
    with deployed("--model", model, "--torch_dtype", "float32", "--api_key", KEY, "--max_new_tokens", "60") as running:
        yield running


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_images(tmp_path_factory.mktemp("images"), [(160, 120)], suffix=".png")[0]


@pytest.fixture
def page(server: Running, tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path / "profile") as found:
        found.open(server.url + "/")
        yield found


def log_in(page: Page) -> None:
    """Without a key the settings open by themselves; with it the models appear."""
    page.until("document.querySelector('#settings').open")
    page.type("#key", KEY)
    page.run("document.querySelector('#key').dispatchEvent(new Event('change'))")
    page.until("document.querySelectorAll('#model option').length === 1")
    page.run("document.querySelector('#settings').open = false")


def done(turns: int) -> str:
    """An expression that is true when this many answers are complete."""
    return f"document.querySelectorAll('.assistant:not(.busy)').length === {turns}"


def test_a_conversation_about_an_image(page: Page, image: str, server: Running, tmp_path: Path) -> None:
    log_in(page)
    assert page.run("document.querySelector('#model').value") == "tiny-vl"
    page.choose("#file", image)
    page.until("document.querySelectorAll('#thumbs img').length === 1")
    page.type("#text", "What is <b>this</b>? <img src=x onerror=alert(1)>")
    before = server.send("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"}).body
    page.press("Enter")
    page.until(done(1))
    after = server.send("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"}).body
    assert b"tessera_images_encoded_total 0.0" in before and b"tessera_images_encoded_total 1.0" in after

    # What was typed is text and stays text; the picture is shown with it.
    mine = page.run("document.querySelector('.user .words').textContent")
    assert mine == "What is <b>this</b>? <img src=x onerror=alert(1)>"
    assert page.run("document.querySelectorAll('.user img').length") == 1
    assert page.run("document.querySelector('.user img').naturalWidth") == 160
    answer = page.run("document.querySelector('.assistant .words').textContent")
    asked = {"role": "user", "content": page.run("messages[0].content")}
    direct = server.send(
        "POST", "/v1/chat/completions", {"messages": [asked]}, {"Authorization": f"Bearer {KEY}"}
    ).json["choices"][0]["message"]["content"]
    assert answer == direct
    assert "tokens" in page.run("document.querySelector('.assistant .note').textContent")

    page.type("#text", "And now?")
    page.click("#send")
    page.until(done(2))
    assert page.run("messages.length") == 4
    for name, dark in (("light", False), ("dark", True)):
        page.dark(dark)
        assert page.shot(tmp_path / f"{name}.png").stat().st_size > 5000
    colours = []
    for dark in (False, True):
        page.dark(dark)
        colours.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]

    page.click("#new")
    assert page.run("messages.length") == 0 and page.run("document.querySelectorAll('.turn').length") == 0
    assert page.problems == [problem for problem in page.problems if "401" in problem], page.problems


def test_an_answer_streams_and_can_be_stopped(page: Page, server: Running) -> None:
    log_in(page)
    page.run(
        "window.lengths = []; new MutationObserver(() => { const w = document.querySelector('.assistant .words');"
        " if (w) lengths.push(w.textContent.length); }).observe(document.querySelector('#turns'),"
        " {subtree: true, childList: true, characterData: true})"
    )
    page.type("#text", "tell me")
    page.run("document.querySelector('#limit').value = 4000")
    page.press("Enter")
    page.until("window.lengths.filter((n) => n > 0).length > 3")
    assert page.run("getComputedStyle(document.querySelector('#stop')).display") != "none"
    page.click("#stop")
    page.until(done(1))
    lengths = page.run("lengths")
    assert lengths == sorted(lengths) and len(set(lengths)) > 3, "the text should have grown piece by piece"
    assert page.run("document.querySelector('.assistant .note').textContent") == "stopped"
    assert page.run("document.querySelector('#stop').hidden") is True


def test_what_goes_wrong_is_shown(page: Page) -> None:
    log_in(page)
    page.type("#text", "too much")
    page.run("document.querySelector('#limit').value = 1000000")
    page.press("Enter")
    page.until("document.querySelector('.note.wrong') !== null")
    assert "the model has room for" in page.run("document.querySelector('.note.wrong').textContent")
    assert page.run("messages.length") == 0


def test_the_description(page: Page, server: Running) -> None:
    page.run(f"sessionStorage.setItem('key', {json.dumps(KEY)})")
    page.open(server.url + "/docs")
    page.until("document.querySelectorAll('.route').length > 8")
    text = page.run("document.body.innerText")
    assert "POST /v1/chat/completions" in text and "temperature" in text and "≥ 0" in text
    assert not [problem for problem in page.problems if "401" not in problem], page.problems
