"""Rows that join and leave a running batch: their answers are those they would have alone, and room comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tessera.infer.features import Image
from tessera.infer.limits import Limits
from tessera.infer.prompt import Prompt, prompt_of
from tessera.infer.request import Event, Failed, Finished, Piece, Refused
from tessera.infer.sampling import Sampling
from tessera.infer.scheduler import Scheduler
from tessera.infer.session import Answer
from tessera.models.vlm import VLM
from tests.parity import reference as ref
from tests.prompts import prompts_of, request, run, scheduler_of, spell

IMAGES: list[ref.Sample] = [[5, (1, 4, 6), 7], [3, (1, 8, 8), 4, (1, 4, 4), 6], [9], [2, (1, 10, 12), 11], [40], [4]]
LIMITS = Limits(frozenset(range(2, 512, 23)), 20, 4096)
SETTINGS = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.8, top_k=20, top_p=0.9, repetition_penalty=1.2),
    Sampling(repetition_penalty=1.3),
    Sampling(1.2, min_p=0.05, presence_penalty=0.5),
    Sampling(frequency_penalty=1.0),
]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "qwen3_moe"])
def made(request: pytest.FixtureRequest) -> tuple[VLM, dict[str, Any]]:
    config = ref.config_of(request.param)
    return ref.ours(config).eval(), config


@pytest.fixture(scope="module")
def plain() -> tuple[VLM, dict[str, Any]]:
    config = ref.config_of("qwen3")
    return ref.ours(config).eval(), config


def samples(config: dict[str, Any]) -> list[ref.Sample]:
    return IMAGES if "vision_config" in config else [[12], [25], [9], [33], [40], [4]]


def alone(made: tuple[VLM, dict[str, Any]], **settings: Any) -> list[Answer]:
    """Every prompt in a scheduler of its own, without anything kept."""
    model, config = made
    out = []
    for index, prompt in enumerate(prompts_of(ref.batch_of(config, samples(config)), config)):
        scheduler = scheduler_of(model, config, LIMITS, prefix_tokens=0)
        scheduler.add(request(SETTINGS[index], seed=index, **settings), prompt)
        [answer] = run(scheduler).values()
        out.append(answer)
    return out


@pytest.mark.parametrize("sizes", [{}, {"rows": 3}, {"prefill_tokens": 16, "prefix_tokens": 0}, {"cache_tokens": 200}])
def test_answers_do_not_depend_on_company(made: tuple[VLM, dict[str, Any]], sizes: dict[str, int]) -> None:
    """Six rows with six settings that arrive over several steps, with little room, prompts read in parts."""
    model, config = made
    scheduler = scheduler_of(model, config, LIMITS, **sizes)
    prompts = prompts_of(ref.batch_of(config, samples(config)), config)
    asked = [request(how, seed=index) for index, how in enumerate(SETTINGS)]
    events: list[Event] = []
    for one, prompt in zip(asked, prompts, strict=True):
        scheduler.add(one, prompt)
        events += scheduler.step()
        events += scheduler.step()
    answers = collected(events + stepped(scheduler))
    assert [answers[one.id, 0] for one in asked] == alone(made)
    assert len({len(answer.tokens) for answer in answers.values()}) > 1
    assert scheduler.promised == 0


def stepped(scheduler: Scheduler) -> list[Event]:
    events: list[Event] = []
    run(scheduler, events.append)
    return events


def collected(events: Sequence[Event]) -> dict[tuple[str, int], Answer]:
    tokens: dict[tuple[str, int], list[int]] = {}
    found = {}
    for event in events:
        assert not isinstance(event, Failed), event
        key = event.request, event.choice
        if isinstance(event, Piece):
            tokens.setdefault(key, []).extend(event.tokens)
        else:
            assert event.reason in ("stop", "length")
            found[key] = Answer(tuple(tokens.get(key, ())), event.prompt_tokens, event.reason == "stop")
    return found


def test_a_known_beginning_is_not_read_again(made: tuple[VLM, dict[str, Any]]) -> None:
    """The same image and first words: the tower runs once, and only what differs is computed."""
    model, config = made
    common: ref.Sample = [5, (1, 8, 8), 80] if "vision_config" in config else [90]
    first = ref.batch_of(config, [common])
    begun = prompts_of(first, config)[0]
    rest = [prompts_of(ref.batch_of(config, [[9]], seed), config)[0] for seed in (1, 2)]
    seen: list[int] = []
    answers = []
    scheduler = scheduler_of(model, config, LIMITS)
    for tail in rest:
        scheduler.add(request(), longer(begun, tail))
        events = stepped(scheduler)
        seen += [event.cached_tokens for event in events if isinstance(event, Finished)]
        answers += list(collected(events).values())
    blocks = len(begun) // 16 * 16
    assert seen == [0, blocks]
    # Together: the second waits for the first, and finds the same.
    together = scheduler_of(model, config, LIMITS)
    for tail in rest:
        together.add(request(), longer(begun, tail))
    events = stepped(together)
    assert list(collected(events).values()) == answers
    assert sorted(event.cached_tokens for event in events if isinstance(event, Finished)) == [0, blocks]
    # And both are what they are without any memory.
    for tail, answer in zip(rest, answers, strict=True):
        bare = scheduler_of(model, config, LIMITS, prefix_tokens=0, tower_bytes=0)
        bare.add(request(), longer(begun, tail))
        assert list(run(bare).values()) == [answer]
    for each in (scheduler, together):
        assert each.residents[None].encoded == ("vision_config" in config)
        assert each.counts.cached_tokens == blocks


def longer(begun: Prompt, tail: Prompt) -> Prompt:
    """A prompt that goes on after ``begun`` with the text of ``tail``."""
    tokens = np.concatenate([begun.tokens, tail.tokens])
    positions = torch.cat([begun.positions, tail.positions + begun.following], dim=-1)
    images = tuple(Image(i.key, i.grid, i.dest, patches=i.patches) for i in begun.images)
    return prompt_of(tokens, positions, images)


def test_another_image_is_another_beginning() -> None:
    config = ref.config_of("qwen2_5_vl")
    model = ref.ours(config).eval()
    scheduler = scheduler_of(model, config, LIMITS)
    prompts = [prompts_of(ref.batch_of(config, [[5, (1, 8, 8), 40]], seed), config)[0] for seed in (0, 1)]
    prompts[1] = prompt_of(prompts[0].tokens, prompts[0].positions, prompts[1].images)
    for prompt in prompts:
        scheduler.add(request(), prompt)
        run(scheduler)
    assert scheduler.counts.cached_tokens == 0
    assert scheduler.residents[None].encoded == 2


def test_a_conversation_goes_on_where_it_was(plain: tuple[VLM, dict[str, Any]]) -> None:
    model, config = plain
    scheduler = scheduler_of(model, config, Limits(frozenset(), 40, 4096))
    [prompt] = prompts_of(ref.batch_of(config, [[30]]), config)
    scheduler.add(request(), prompt)
    [answer] = run(scheduler).values()
    tokens = np.concatenate([prompt.tokens, answer.tokens, [50, 51, 52]])
    again = prompt_of(tokens, torch.arange(len(tokens)), ())
    scheduler.add(request(), again)
    events = stepped(scheduler)
    assert [event.cached_tokens for event in events if isinstance(event, Finished)] == [64]
    bare = scheduler_of(model, config, Limits(frozenset(), 40, 4096), prefix_tokens=0)
    bare.add(request(), again)
    assert list(run(bare).values()) == list(collected(events).values())


def test_choices_share_their_prompt(plain: tuple[VLM, dict[str, Any]]) -> None:
    model, config = plain
    [prompt] = prompts_of(ref.batch_of(config, [[40]]), config)
    how = Sampling(1.3)
    scheduler = scheduler_of(model, config, LIMITS)
    one = request(how, n=5, seed=4)
    scheduler.add(one, prompt)
    answers = run(scheduler)
    assert scheduler.counts.prompt_tokens == 40
    assert len({answer.tokens for answer in answers.values()}) == 5
    # The first is the answer to the same request with one choice; and few rows at a time change nothing.
    narrow = scheduler_of(model, config, LIMITS, rows=2, prefix_tokens=0)
    narrow.add(request(how, n=5, seed=4, id=one.id), prompt)
    assert run(narrow) == answers
    single = scheduler_of(model, config, LIMITS)
    single.add(request(how, seed=4, id=one.id), prompt)
    assert run(single)[one.id, 0] == answers[one.id, 0]


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(plain: tuple[VLM, dict[str, Any]]) -> None:
    model, config = plain
    [prompt] = prompts_of(ref.batch_of(config, [[40]]), config)
    scheduler = scheduler_of(model, config, Limits(frozenset(), 20, 100), cache_tokens=64)
    scheduler.add(request(), prompt)
    with pytest.raises(Refused, match="40 tokens with 30 new ones needs 96 tokens of cache; there are 64 in all"):
        scheduler.add(request(max_new_tokens=30), prompt)
    with pytest.raises(Refused, match="no adapter is called 'poet'"):
        scheduler.add(request(adapter="poet"), prompt)
    with pytest.raises(Refused, match="n is 0"):
        scheduler.add(request(n=0), prompt)
    with pytest.raises(Refused, match="max_new_tokens is -1"):
        scheduler.add(request(max_new_tokens=-1), prompt)
    with pytest.raises(Refused, match="21 log-probabilities"):
        scheduler.add(request(logprobs=21), prompt)
    tight = scheduler_of(model, config, Limits(frozenset(), 20, 40))
    with pytest.raises(Refused, match="the prompt has 40 tokens; the model takes 40"):
        tight.add(request(), prompt)
    assert [len(answer.tokens) for answer in run(scheduler).values()] == [20]


def test_room_comes_back(plain: tuple[VLM, dict[str, Any]]) -> None:
    """A hundred requests of all lengths, some cancelled, in room for a few: all end, and memory stays within."""
    model, config = plain
    lengths = [5 + 37 * index % 90 for index in range(100)]
    prompts = prompts_of(ref.batch_of(config, [[length] for length in lengths]), config)
    scheduler = scheduler_of(model, config, LIMITS, cache_tokens=500, prefix_tokens=320, prefill_tokens=64, rows=8)
    asked = [request(SETTINGS[index % 6], seed=index) for index in range(100)]
    ended: dict[str, str] = {}
    most = 0
    for index, (one, prompt) in enumerate(zip(asked, prompts, strict=True)):
        scheduler.add(one, prompt)
        if index % 7 == 3:
            scheduler.cancel(asked[index // 2].id)
        for event in scheduler.step():
            if isinstance(event, Finished):
                ended[event.request] = event.reason
        most = max(most, scheduler.promised)
        assert used(scheduler) <= 500
    for event in stepped(scheduler):
        assert used(scheduler) <= 500
        if isinstance(event, Finished):
            ended[event.request] = event.reason
    assert ended.keys() == {one.id for one in asked}
    assert {"cancelled", "length"} <= set(ended.values())
    assert 200 < most <= 500
    assert scheduler.promised == 0
    assert scheduler.rows == scheduler.waiting == 0
    assert len(scheduler.residents[None].prefixes) <= 20


def used(scheduler: Scheduler) -> int:
    """Tokens that are really allocated."""
    lanes = scheduler.residents[None].cache._lanes.values()
    return sum(lane.data.shape[2] * lane.data.shape[4] for lane in lanes)


def test_a_failure_is_its_own_requests(plain: tuple[VLM, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks while a row is read or chosen for fails that request; the others answer as ever."""

    class Broken:
        def mask(self, size: int) -> Any:
            raise ValueError("no idea")

        def take(self, token: int) -> None: ...

        def copy(self) -> Broken:
            return self

    model, config = plain
    prompts = prompts_of(ref.batch_of(config, [[9], [12], [8]]), config)
    scheduler = scheduler_of(model, config, LIMITS)
    good, bad, other = request(), request(n=2), request()
    scheduler.add(good, prompts[0])
    scheduler.add(bad, prompts[1], Broken())
    scheduler.add(other, prompts[2])
    events: list[Event] = []
    while not scheduler.idle:
        events += scheduler.step()
    assert [event for event in events if isinstance(event, Failed)] == [Failed(bad.id, "ValueError: no idea", False)]
    assert {event.request for event in events if isinstance(event, Finished)} == {good.id, other.id}
    assert scheduler.promised == 0


def test_numbers_that_are_none_stay_with_their_row(plain: tuple[VLM, dict[str, Any]]) -> None:
    """A prompt whose embedding is not a number fails; the slot it leaves behind harms nobody."""
    config = ref.config_of("qwen3")
    model = ref.ours(config).eval()
    prompts = prompts_of(ref.batch_of(config, [[9], [12], [8]]), config)
    expected = run_all(model, config, [prompts[0], prompts[2]])
    with torch.no_grad():
        model.decoder.embed_tokens.weight[int(prompts[1].tokens[3])] = float("nan")
    scheduler = scheduler_of(model, config, LIMITS, prefix_tokens=0)
    asked = [request(), request(), request()]
    events: list[Event] = []
    for one, prompt in zip(asked, prompts, strict=True):
        scheduler.add(one, prompt)
        events += scheduler.step()
    while not scheduler.idle:
        events += scheduler.step()
    assert [event.request for event in events if isinstance(event, Failed)] == [asked[1].id]
    answers = collected([event for event in events if not isinstance(event, Failed)])
    assert [answers[asked[0].id, 0], answers[asked[2].id, 0]] == expected


def run_all(model: VLM, config: dict[str, Any], prompts: Sequence[Any]) -> list[Answer]:
    scheduler = scheduler_of(model, config, LIMITS, prefix_tokens=0)
    asked = [request() for _ in prompts]
    for one, prompt in zip(asked, prompts, strict=True):
        scheduler.add(one, prompt)
    found = run(scheduler)
    return [found[one.id, 0] for one in asked]


def test_stop_texts_end_an_answer_before_themselves(plain: tuple[VLM, dict[str, Any]]) -> None:
    model, config = plain
    [prompt] = prompts_of(ref.batch_of(config, [[12]]), config)
    limits = Limits(frozenset(), 12, 4096)

    def ask(**settings: Any) -> tuple[str, list[Piece], Finished]:
        scheduler = scheduler_of(model, config, limits)
        scheduler.add(request(Sampling(1.5), seed=1, **settings), prompt)
        events = stepped(scheduler)
        pieces = [event for event in events if isinstance(event, Piece)]
        [end] = [event for event in events if isinstance(event, Finished)]
        return "".join(piece.text for piece in pieces), pieces, end

    whole, pieces, end = ask()
    assert end.reason == "length"
    assert len(pieces) == 12
    ids = [token for piece in pieces for token in piece.tokens]
    assert whole == spell(ids)
    # A stop that spans two tokens, "...5><12..." for instance.
    stop = f"{ids[5]}><{ids[6]}"
    for stream in (True, False):
        text, pieces, end = ask(stop=("never", stop), stream=stream)
        assert text == whole[: whole.index(stop)]
        assert (end.reason, end.stopped_by, end.completion_tokens) == ("stop", stop, 7)
        assert [token for piece in pieces for token in piece.tokens] == ids[:7]
        assert len(pieces) > 3 if stream else len(pieces) == 1


def test_log_probabilities_come_with_their_tokens(plain: tuple[VLM, dict[str, Any]]) -> None:
    model, config = plain
    [prompt] = prompts_of(ref.batch_of(config, [[12]]), config)
    ended = Limits(frozenset(range(0, 512, 9)), 200, 4096)
    scheduler = scheduler_of(model, config, ended)
    scheduler.add(request(Sampling(1.5), seed=2, logprobs=2), prompt)
    events = stepped(scheduler)
    told = [told for event in events if isinstance(event, Piece) for told in event.logprobs]
    ids = [token for event in events if isinstance(event, Piece) for token in event.tokens]
    [end] = [event for event in events if isinstance(event, Finished)]
    assert [each.token for each in told] == ids
    assert end.reason == "stop" and end.end is not None and end.end_logprob is not None
    tokens = torch.tensor([*prompt.tokens.tolist(), *ids, end.end])
    batch = ref.batch_of(config, [[len(tokens)]])
    with torch.no_grad():
        logits = ref.logits_of(model, replace(batch, tokens=tokens)).log_softmax(-1)[len(prompt) - 1 :]
    for row, each in zip(logits, [*told, end.end_logprob], strict=False):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-4)
        assert [value for _, value in each.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_forgetting_what_old_weights_made(plain: tuple[VLM, dict[str, Any]]) -> None:
    config = ref.config_of("qwen3")
    model = ref.ours(config).eval()
    [prompt] = prompts_of(ref.batch_of(config, [[40]]), config)
    scheduler = scheduler_of(model, config, LIMITS)
    scheduler.add(request(), prompt)
    run(scheduler)
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.k_proj.weight").mul_(-3)
    scheduler.forget()
    scheduler.add(request(), prompt)
    assert list(run(scheduler).values()) == run_all(model, config, [prompt])
    assert scheduler.counts.cached_tokens == 0


def test_nothing_runs_where_nothing_was_asked(plain: tuple[VLM, dict[str, Any]]) -> None:
    model, config = plain
    scheduler = scheduler_of(model, config, LIMITS)
    assert scheduler.idle
    assert scheduler.step() == []
    scheduler.cancel("nobody")
    assert scheduler.idle
