"""The next token: transformers' processors in transformers' order, and draws that belong to a row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tessera.config.resolve import run_of
from tessera.infer.sampling import Sampler, Sampling

VOCAB = 50


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


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


def test_description() -> None:
    assert str(Sampling()) == "greedy"
    assert str(Sampling(0.7, 20, 0.8, 1.05)) == "temperature 0.7, top_k 20, top_p 0.8, repetition_penalty 1.05"


def test_greedy_takes_the_largest() -> None:
    scores = logits(4)
    assert torch.equal(Sampler(Sampling(), [[0]] * 4, [0] * 4).choose(scores), scores.argmax(-1))


def test_repetition_penalty_equals_transformers() -> None:
    prompts = [[1, 2, 3, 3], [7], [0, 49]]
    sampler = Sampler(Sampling(repetition_penalty=1.8), prompts, [0, 0, 0])
    rows = [list(prompt) for prompt in prompts]
    for step in range(6):
        scores = logits(3, seed=step)
        expected = torch.stack(
            [
                RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([row]), scores[i : i + 1].clone())[0]
                for i, row in enumerate(rows)
            ]
        ).argmax(-1)
        chosen = sampler.choose(scores)
        assert torch.equal(chosen, expected)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.append(token)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 0.7), (5, 1.0, 1.0), (0, 0.6, 1.3), (10, 0.5, 0.9)]
)
def test_distribution_equals_transformers(top_k: int, top_p: float, temperature: float) -> None:
    scores = logits(1)
    warped = TemperatureLogitsWarper(temperature)(None, scores)
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    expected = warped.softmax(-1)[0]
    draws = 4000
    sampler = Sampler(Sampling(temperature, top_k, top_p), [[0]] * draws, list(range(draws)))
    counts = torch.bincount(sampler.choose(scores.expand(draws, -1)), minlength=VOCAB) / draws
    assert counts[expected == 0].sum() == 0
    assert (counts - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_a_draw_depends_on_its_own_seed_only() -> None:
    settings = Sampling(1.0, 0, 0.9)
    steps = [logits(3, seed=step) for step in range(5)]
    together = Sampler(settings, [[0], [1], [2]], [10, 11, 12])
    alone = Sampler(settings, [[2]], [12])
    for step, scores in enumerate(steps):
        rows = scores if step < 2 else scores[[0, 2]]
        if step == 2:
            together.keep([0, 2])
        assert together.choose(rows)[-1] == alone.choose(scores[2:])[0]


def test_same_seed_same_answer_other_seed_other_answer() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1.0), [[0]], [seed])
        return [int(sampler.choose(logits(1, seed=step))) for step in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_tiny_top_p_and_large_top_k_stay_within_range() -> None:
    scores = logits(64)
    assert torch.equal(Sampler(Sampling(1.0, 0, 1e-9), [[0]] * 64, range(64)).choose(scores), scores.argmax(-1))
    assert torch.equal(Sampler(Sampling(1.0, 0, 0.0), [[0]] * 64, range(64)).choose(scores), scores.argmax(-1))
    chosen = Sampler(Sampling(5.0, 10**6), [[0]] * 64, range(64)).choose(scores)
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < VOCAB
