"""The engine's thread: answers equal those of ``tessera infer``, whoever else asks, cancels, fails or floods."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tessera.config.errors import UserError
from tessera.config.resolve import resolve
from tessera.data.sample import BadRow
from tessera.infer.engine import Engine, Event, Failed, Finished, Full, Piece, Refused, Request, Sampling
from tessera.infer.session import Session
from tests.disk import save_checkpoint
from tests.unit.infer.test_session import adapter_of

TOKENS = 24
WAIT = 60


class Listener:
    """Hears the events of one request."""

    def __init__(self, choices: int = 1) -> None:
        self.events: list[Event] = []
        self.first = threading.Event()
        self.done = threading.Event()
        self._missing = choices

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.first.set()
        self._missing -= isinstance(event, Finished)
        if isinstance(event, Failed) or self._missing == 0:
            self.done.set()

    def wait(self) -> Listener:
        assert self.done.wait(WAIT), "nothing was heard"
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def end(self) -> Event:
        return self.events[-1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_checkpoint(tmp_path_factory.mktemp("models") / "base", "qwen2_5_vl")
    random = np.random.default_rng(0)
    for name, size in (("a", (64, 96)), ("b", (100, 60))):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(directory / f"{name}.png")
    return directory


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of(base, tmp_path_factory.mktemp("adapters") / "checkpoint-1", freeze_vit=False)


def options(base: Path, *more: str) -> Any:
    return resolve(["infer", "--model", str(base), "--max_new_tokens", str(TOKENS), *more], {})


@pytest.fixture(scope="module")
def engine(base: Path, adapter: Path) -> Iterator[Engine]:
    opened = Engine.open(options(base), {"tuned": str(adapter)}, max_rows=8)
    yield opened
    assert opened.close(timeout=WAIT)


def rows_of(base: Path) -> list[dict[str, Any]]:
    a, b = str(base / "a.png"), str(base / "b.png")
    asked = [
        ("<image>what is this?", [a]),
        ("<image>what is that?", [a]),
        ("<image>what is this?", [b]),
        ("no picture at all", []),
        ("<image> and <image>: which is older?", [b, a]),
        ("<image>what is this?", [a]),
        ("a somewhat longer question without any picture in it, to have another length", []),
        ("b", []),
    ]
    return [{"messages": [{"role": "user", "content": text}], "images": images} for text, images in asked]


def answers(session: Session, rows: Sequence[dict[str, Any]]) -> list[str]:
    """One at a time, each in a session that remembers nothing of the others."""
    out = []
    for row in rows:
        session.scheduler.forget()
        [reply] = session.answer([session.question(row)])
        assert not isinstance(reply, BadRow)
        out.append(reply.text)
    return out


def test_concurrent_equals_one_by_one_with_every_adapter(engine: Engine, base: Path, adapter: Path) -> None:
    rows = rows_of(base)
    expected = {
        None: answers(Session.open(options(base)), rows),
        "tuned": answers(Session.open(options(base, "--adapters", str(adapter))), rows),
    }
    assert all(one != other for one, other in zip(*expected.values(), strict=True))
    heard: list[tuple[str | None, int, Listener]] = []
    lock = threading.Lock()

    def ask(name: str | None, index: int) -> None:
        listener = Listener()
        engine.submit(Request(engine.session.question(rows[index]), adapter=name), listener)
        with lock:
            heard.append((name, index, listener))

    threads = [threading.Thread(target=ask, args=(name, i)) for i in range(len(rows)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, index, listener in heard:
        assert listener.wait().text == expected[name][index]
    assert len(heard) == 16
    assert engine.adapters == ("tuned",)
    # Two pictures and two models that see: no more than four passes of a tower per picture.
    assert engine.stats().images_encoded <= 4


def test_a_stream_is_the_whole_text(engine: Engine, base: Path) -> None:
    question = engine.session.question(rows_of(base)[0])
    streamed, whole = Listener(), Listener()
    engine.submit(Request(question), streamed)
    engine.submit(Request(question, stream=False), whole)
    assert streamed.wait().text == whole.wait().text
    assert len(streamed.events) > len(whole.events) == 2
    end = whole.end
    assert isinstance(end, Finished)
    assert end.prompt_tokens == len(question.encoded.tokens)
    assert (end.reason, end.completion_tokens) == ("length", TOKENS)


def test_what_cannot_be_answered_fails_alone(engine: Engine, base: Path, tmp_path: Path) -> None:
    rows = rows_of(base)
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((base / "a.png").read_bytes()[:900])
    bad, good = Listener(), Listener()
    asked = {"messages": rows[0]["messages"], "images": [str(damaged)]}
    engine.submit(Request(engine.session.question(asked)), bad)
    engine.submit(Request(engine.session.question(rows[0])), good)
    [event] = bad.wait().events
    assert isinstance(event, Failed)
    assert event.bad_request
    assert "damaged.png" in event.error
    assert isinstance(good.wait().end, Finished)
    question = engine.session.question(rows[3])
    with pytest.raises(Refused, match="no adapter is called 'other'"):
        engine.submit(Request(question, adapter="other"), Listener())
    with pytest.raises(Refused, match="n is 1000"):
        engine.submit(Request(question, n=1000), Listener())


def test_cancelled_requests_free_their_room(engine: Engine, base: Path) -> None:
    question = engine.session.question(rows_of(base)[3])
    long = [Listener() for _ in range(12)]  # more than run together
    tickets = [engine.submit(Request(question, max_new_tokens=1500), listener) for listener in long]
    assert long[0].first.wait(WAIT)
    for ticket in tickets:
        ticket.cancel()
    for listener in long:
        end = listener.wait().end
        assert isinstance(end, Finished)
        assert end.reason == "cancelled"
        assert end.completion_tokens < 1500
    tickets[0].cancel()
    soon(lambda: engine.stats().running == engine.stats().cache_tokens == engine.stats().waiting == 0)
    assert isinstance(ask(engine, question).end, Finished)


def test_a_listener_that_raises_loses_its_request_only(engine: Engine, base: Path) -> None:
    question = engine.session.question(rows_of(base)[3])

    def deaf(event: Event) -> None:
        raise ValueError("not now")

    engine.submit(Request(question, max_new_tokens=1500), deaf)
    assert isinstance(ask(engine, question).end, Finished)
    soon(lambda: engine.stats().running == 0)
    assert engine.deaf == "a listener raised ValueError: not now"


def ask(engine: Engine, question: Any, **settings: Any) -> Listener:
    listener = Listener(settings.get("n", 1))
    engine.submit(Request(question, **settings), listener)
    return listener.wait()


def soon(condition: Any) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_choices_and_seeds(engine: Engine, base: Path) -> None:
    question = engine.session.question(rows_of(base)[0])
    sampled = {"sampling": Sampling(1.5), "n": 3}
    first, again, other = (ask(engine, question, seed=seed, **sampled) for seed in (5, 5, 6))

    def texts(listener: Listener) -> list[str]:
        pieces = [event for event in listener.events if isinstance(event, Piece)]
        return ["".join(piece.text for piece in pieces if piece.choice == choice) for choice in range(3)]

    assert texts(first) == texts(again) != texts(other)
    assert len(set(texts(first))) == 3


def test_full_then_drained_then_closed(base: Path) -> None:
    engine = Engine.open(options(base), max_rows=2, max_waiting=3)
    question = engine.session.question(rows_of(base)[3])
    running = [Listener() for _ in range(2)]
    for listener in running:
        engine.submit(Request(question, max_new_tokens=1000), listener)
        assert listener.first.wait(WAIT)
    waiting = [Listener() for _ in range(3)]
    for listener in waiting:
        engine.submit(Request(question), listener)
    assert engine.stats().waiting == 3
    with pytest.raises(Full, match="3 requests are waiting already"):
        engine.submit(Request(question), Listener())
    closer = threading.Thread(target=engine.close)
    closer.start()
    closer.join(WAIT)
    assert not closer.is_alive()
    assert [listener.wait().end.reason for listener in waiting] == ["length"] * 3  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="closing"):
        engine.submit(Request(question), Listener())


def test_closed_without_draining(base: Path) -> None:
    engine = Engine.open(options(base), max_rows=2)
    question = engine.session.question(rows_of(base)[3])
    listeners = [Listener() for _ in range(4)]
    for listener in listeners:
        engine.submit(Request(question, max_new_tokens=1500), listener)
    assert engine.close(drain=False, timeout=WAIT)
    for listener in listeners:
        end = listener.wait().end
        assert isinstance(end, Finished)
        assert end.reason == "cancelled"


def test_a_dead_thread_says_why(base: Path) -> None:
    engine = Engine.open(options(base))
    question = engine.session.question(rows_of(base)[3])

    def broken() -> list[Event]:
        raise MemoryError("out of luck")

    engine.session.scheduler.step = broken  # type: ignore[method-assign]
    listener = Listener()
    engine.submit(Request(question), listener)
    end = listener.wait().end
    assert isinstance(end, Failed)
    assert not end.bad_request
    assert engine.failed == "MemoryError: out of luck"
    with pytest.raises(RuntimeError, match="has died: MemoryError: out of luck"):
        engine.submit(Request(question), Listener())
    assert engine.close(timeout=WAIT)


def test_an_idle_engine_does_nothing(engine: Engine, base: Path) -> None:
    ask(engine, engine.session.question(rows_of(base)[3]))
    soon(lambda: engine.stats().running == 0)
    before, spent = engine.stats().steps, time.process_time()
    time.sleep(0.5)
    assert engine.stats().steps == before
    assert time.process_time() - spent < 0.1


def test_hundreds_of_requests_leave_nothing_behind(base: Path) -> None:
    """Small room, cancellations, two kinds of settings: all end, and what is kept stays within its limits."""
    engine = Engine.open(options(base), max_rows=8, max_waiting=2000, memory=1 << 20)
    rows = rows_of(base)
    questions = [engine.session.question(row) for row in rows]
    listeners = [Listener() for _ in range(300)]
    for index, listener in enumerate(listeners):
        how = Sampling(1.0) if index % 2 else Sampling()
        request = Request(questions[index % len(rows)], how, seed=index, max_new_tokens=1 + index % 7)
        ticket = engine.submit(request, listener)
        if index % 11 == 0:
            ticket.cancel()
    for listener in listeners:
        assert isinstance(listener.wait().end, Finished)
    assert engine.close(timeout=WAIT)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_tokens, stats.failed) == (0, 0, 0, 0)
    assert 0 < stats.prefix_tokens <= stats.prefix_capacity < 5000
    assert stats.tower_bytes <= stats.tower_capacity
    assert stats.images_encoded + stats.images_reused > 0
    assert sum(stats.finished.values()) <= 300


def test_modules_trained_whole_belong_to_their_adapter(base: Path, tmp_path: Path) -> None:
    """An adapter that brings a module of its own leaves the base model's alone."""
    whole = adapter_of(base, tmp_path / "checkpoint-2", modules_to_save=("norm",))
    from safetensors.torch import load_file, save_file

    file = whole / "adapter_model.safetensors"
    tensors = {key: value + 0.5 if key.endswith("norm.weight") else value for key, value in load_file(file).items()}
    save_file(tensors, file)
    session = Session.open(options(base), {"whole": str(whole)})
    rows = rows_of(base)[:2]
    assert answers(session, rows) == answers(Session.open(options(base)), rows)
    alone = Session.open(options(base, "--adapters", str(whole)))
    expected = answers(alone, rows)
    for row, text in zip(rows, expected, strict=True):
        request = Request(session.question(row), session.sampling, adapter="whole")
        made = session.prepare(request)
        session.scheduler.add(request, made.prompt)
        said = []
        while not session.scheduler.idle:
            said += [event.text for event in session.scheduler.step() if isinstance(event, Piece)]
        assert "".join(said) == text
    shared = {p.data_ptr() for p in session.scheduler.residents[None].model.parameters()}
    own = [n for n, p in session.scheduler.residents["whole"].model.named_parameters() if p.data_ptr() not in shared]
    assert own
    assert all(".lora_" in name or "norm" in name for name in own)


def test_an_adapter_that_is_none_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter_config.json"):
        Session.open(options(base), {"nothing": str(tmp_path)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
