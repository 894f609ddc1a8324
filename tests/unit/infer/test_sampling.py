"""The next token: transformers' processors in transformers' order, and draws that belong to a row alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tessera.config.resolve import run_of
from tessera.infer.sampling import Chosen, Draws, Sampling, choose, seed_of

VOCAB = 50


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def draws(how: Sampling, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **more: Any) -> list[Draws]:
    return [Draws(how, np.array(prompt), seed, **more) for prompt, seed in zip(prompts, seeds, strict=True)]


def tokens(chosen: Sequence[Chosen]) -> torch.Tensor:
    return torch.tensor([each.token for each in chosen])


def sampling(defaults: dict[str, Any] | None = None, **flags: Any) -> Sampling:
    return Sampling.of(run_of("infer", **flags).infer, defaults or {})


def test_flags_win_over_the_generation_config() -> None:
    config = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    assert sampling(config) == Sampling(0.7, 20, 0.8, 1.05)
    assert sampling(config, temperature=0) == Sampling(0.0, 20, 0.8, 1.05)
    assert sampling(config, temperature=0).greedy
    assert sampling(config, top_p=0.5, temperature=1.5) == Sampling(1.5, 20, 0.5, 1.05)
    assert sampling({**config, "do_sample": False}).greedy
    assert sampling({}).greedy
    assert sampling({}, temperature=0.3) == Sampling(0.3)
    assert sampling({}, top_k=5) == Sampling(1.0, 5)
    assert sampling({"top_k": 50, "do_sample": True}, top_k=-1).top_k == 0
    assert sampling({"do_sample": True, "min_p": 0.1}) == Sampling(1.0, min_p=0.1)


def test_description() -> None:
    assert str(Sampling()) == "greedy"
    assert str(Sampling(0.7, 20, 0.8, 1.05)) == "temperature 0.7, top_k 20, top_p 0.8, repetition_penalty 1.05"
    assert str(Sampling(1, min_p=0.1, presence_penalty=0.5)) == "temperature 1, min_p 0.1, presence_penalty 0.5"


def test_greedy_takes_the_largest() -> None:
    scores = logits(4)
    assert torch.equal(tokens(choose(scores, draws(Sampling(), [[0]] * 4, [0] * 4))), scores.argmax(-1))


def test_repetition_penalty_equals_transformers() -> None:
    prompts = [[1, 2, 3, 3], [7], [0, 49]]
    made = draws(Sampling(repetition_penalty=1.8), prompts, [0, 0, 0])
    rows = [list(prompt) for prompt in prompts]
    for step in range(6):
        scores = logits(3, seed=step)
        expected = torch.stack(
            [
                RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([row]), scores[i : i + 1].clone())[0]
                for i, row in enumerate(rows)
            ]
        ).argmax(-1)
        chosen = tokens(choose(scores, made))
        assert torch.equal(chosen, expected)
        assert torch.equal(scores, logits(3, seed=step)), "the caller's logits are left alone"
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.append(token)


def test_presence_and_frequency_penalise_the_answer_only() -> None:
    """As OpenAI defines them: minus presence once, minus frequency for every time the answer has the token."""
    how = Sampling(presence_penalty=1.5, frequency_penalty=0.75)
    [made] = draws(how, [[4, 4, 5]], [0])
    said: list[int] = []
    for step in range(12):
        scores = logits(1, seed=step % 2)
        counts = torch.bincount(torch.tensor(said, dtype=torch.int64), minlength=VOCAB)
        expected = int((scores[0] - 1.5 * (counts > 0) - 0.75 * counts).argmax())
        said.append(choose(scores, [made])[0].token)
        assert said[-1] == expected
    assert len(set(said)) > 2


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "temperature"),
    [(0, 1.0, 0, 0.7), (5, 1.0, 0, 1.0), (0, 0.6, 0, 1.3), (10, 0.5, 0, 0.9), (0, 1.0, 0.2, 1.5), (8, 0.9, 0.1, 2.0)],
)
def test_distribution_equals_transformers(top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    scores = logits(1)
    warped = TemperatureLogitsWarper(temperature)(None, scores)
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    warped = MinPLogitsWarper(min_p)(None, warped) if min_p else warped
    expected = warped.softmax(-1)[0]
    count = 4000
    made = draws(Sampling(temperature, top_k, top_p, min_p=min_p), [[0]] * count, list(range(count)))
    counts = torch.bincount(tokens(choose(scores.expand(count, -1), made)), minlength=VOCAB) / count
    assert counts[expected == 0].sum() == 0
    assert (counts - expected).abs().max() < 4 * (0.25 / count) ** 0.5


def test_ranks_are_looked_at_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """How deep the first look goes, and who else is looked at, changes nothing."""
    kinds = [Sampling(1.5, 0, 0.95), Sampling(0.9, 30), Sampling(2.0, 0, 1.0, min_p=0.02), Sampling(1.1), Sampling()]
    scores = logits(len(kinds), seed=3)
    deep = [choose(scores[i : i + 1], draws(how, [[0]], [i]))[0].token for i, how in enumerate(kinds)]
    monkeypatch.setattr("tessera.infer.sampling.FIRST_RANKS", 2)
    mixed = [draws(how, [[0]], [i])[0] for i, how in enumerate(kinds)]
    assert tokens(choose(scores, mixed)).tolist() == deep


def test_a_draw_depends_on_its_own_seed_only() -> None:
    settings = Sampling(1.0, 0, 0.9)
    steps = [logits(3, seed=step) for step in range(5)]
    together = draws(settings, [[0], [1], [2]], [10, 11, 12])
    [alone] = draws(settings, [[2]], [12])
    for step, scores in enumerate(steps):
        rows = scores if step < 2 else scores[[0, 2]]
        if step == 2:
            del together[1]
        assert choose(rows, together)[-1] == choose(scores[2:], [alone])[0]


def test_same_seed_same_answer_other_seed_other_answer() -> None:
    def draw(seed: int) -> list[int]:
        made = draws(Sampling(1.0), [[0]], [seed])
        return [choose(logits(1, seed=step), made)[0].token for step in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(-1) == draw(2**64 - 1)
    assert seed_of(7, 0) == 7
    assert len({seed_of(seed, choice) for seed in range(20) for choice in range(20)}) == 400


def test_numbers_are_uniform() -> None:
    [made] = draws(Sampling(1.0), [[0]], [5])
    found = []
    for made.drawn in range(20000):
        found.append(made.uniform())
    counts, _ = np.histogram(found, 20, (0, 1))
    assert abs(counts - 1000).max() < 150
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03


def test_tiny_top_p_and_large_top_k_stay_within_range() -> None:
    scores = logits(64)
    for p in (1e-9, 0.0):
        made = draws(Sampling(1.0, 0, p), [[0]] * 64, range(64))
        assert torch.equal(tokens(choose(scores, made)), scores.argmax(-1))
    chosen = tokens(choose(scores, draws(Sampling(5.0, 10**6), [[0]] * 64, range(64))))
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < VOCAB


def test_log_probabilities_are_the_models_own() -> None:
    """Whatever penalties and temperature do to the choice."""
    how = Sampling(0.5, repetition_penalty=3.0)
    rows = [*draws(how, [[0, 1, 2]], [3], logprobs=3), *draws(how, [[0]], [4]), *draws(how, [[0]], [5], logprobs=0)]
    scores = logits(3)
    expected = scores.log_softmax(-1)
    first, second, third = choose(scores, rows)
    assert first.logprob is not None and third.logprob is not None and second.logprob is None
    assert first.logprob.token == first.token
    assert first.logprob.logprob == pytest.approx(float(expected[0, first.token]))
    values, ids = expected[0].topk(3)
    assert [token for token, _ in first.logprob.top] == ids.tolist()
    assert [value for _, value in first.logprob.top] == pytest.approx(values.tolist())
    assert third.logprob.top == ()
    assert third.logprob.logprob == pytest.approx(float(expected[2, third.token]))


@pytest.mark.parametrize("how", [Sampling(), Sampling(1.0), Sampling(1.0, 5)])
def test_logits_that_are_no_numbers_choose_nothing(how: Sampling) -> None:
    scores = logits(3)
    scores[1, 7] = float("nan")
    chosen = choose(scores, draws(how, [[0]] * 3, range(3)))
    assert [each.token < 0 for each in chosen] == [False, True, False]
    assert [each.token for each in chosen if each.token >= 0] == [
        choose(scores[i : i + 1], draws(how, [[0]], [i]))[0].token for i in (0, 2)
    ]
