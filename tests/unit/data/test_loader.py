"""Order, resuming, ranks, failures: the same batches whatever makes them."""

from __future__ import annotations

import gc
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.config.errors import UserError
from tessera.config.resolve import run_of
from tessera.contract.batch import Batch
from tessera.data.buffers import Buffers
from tessera.data.corpus import Corpus, prepare
from tessera.data.loader import Loader, Step, eval_loader
from tessera.data.render import Renderer
from tests.toys import chat, chats, make_geometry, make_images, make_tokenizer_dir, write_rows


def corpus_of(folder: Path, rows: list[dict[str, Any]], style: str = "windows", **flags: Any) -> Corpus:
    directory = make_tokenizer_dir(folder / "model")
    path = write_rows(folder / "rows.jsonl", rows)
    run = run_of("sft", model=str(directory), dataset=(str(path),), **{"split_dataset_ratio": 0.0, **flags})
    geometry = make_geometry(style)
    corpus, _ = prepare(run.data, Renderer(directory, geometry), geometry, folder / "run")
    return corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    return corpus_of(folder, chats(37, make_images(folder / "img", [(100, 80), (64, 200), (300, 120)])))


def ids(steps: list[Step]) -> list[list[tuple[int, ...]]]:
    return [[batch.sample_ids for batch in step.batches] for step in steps]


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    found = [
        batch.tokens,
        batch.targets,
        batch.loss_weight,
        batch.positions,
        batch.supervised,
        batch.segments.cu_seqlens,
    ]
    if batch.media is not None:
        found += [batch.media.patches, batch.media.grids, batch.media.dest, *batch.media.tower.values()]
        found += [segments.cu_seqlens for segments in batch.media.tower_segments.values()]
    return found


def same(left: list[Step], right: list[Step]) -> bool:
    pairs = [(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x.batches, y.batches, strict=True)]
    return ids(left) == ids(right) and all(
        torch.equal(p, q) for a, b in pairs for p, q in zip(tensors_of(a), tensors_of(b), strict=True)
    )


OPTIONS: list[dict[str, Any]] = [
    {"units_per_batch": 2, "accumulation": 3},
    {"packing": True, "capacity": 256, "accumulation": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_threads_change_nothing(corpus: Corpus, options: dict[str, Any]) -> None:
    runs = [list(Loader(corpus, threads=threads, epochs=2, seed=5, **options)) for threads in (0, 1, 4)]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_continues_with_the_next_step(corpus: Corpus, options: dict[str, Any], threads: int) -> None:
    whole = Loader(corpus, threads=0, epochs=2.5, **options)
    expected = list(whole)
    for stop in (1, whole.steps_in_epoch(0), whole.steps_in_epoch(0) + 1):
        first = Loader(corpus, threads=threads, epochs=2.5, **options)
        steps = iter(first)
        for _ in range(stop):
            next(steps)
        state = json.loads(json.dumps(first.state()))
        steps.close()  # type: ignore[attr-defined]
        second = Loader(corpus, threads=threads, epochs=2.5, **options)
        second.restore(state)
        rest = list(second)
        assert same(rest, expected[stop:])
        assert [(step.index, step.epoch) for step in rest] == [(step.index, step.epoch) for step in expected[stop:]]


@pytest.mark.parametrize("packing", [False, True])
def test_ranks_split_what_one_process_accumulates(corpus: Corpus, packing: bool) -> None:
    options: dict[str, Any] = {"threads": 0, "packing": packing, "capacity": 256, "epochs": 2}
    alone = list(Loader(corpus, accumulation=4, **options))
    ranks = [list(Loader(corpus, accumulation=2, rank=rank, world=2, **options)) for rank in range(2)]
    assert len(alone) == len(ranks[0]) == len(ranks[1])
    for step, *parts in zip(alone, *ranks, strict=True):
        together = [batch.sample_ids for pair in zip(*(part.batches for part in parts), strict=True) for batch in pair]
        assert together == [batch.sample_ids for batch in step.batches]
        assert [part.epoch for part in parts] == [step.epoch] * 2
    states = Loader(corpus, accumulation=4, **options).state()
    other = Loader(corpus, accumulation=2, rank=1, world=2, **options)
    other.restore(states)


def test_an_epoch_visits_every_row_once(corpus: Corpus) -> None:
    for options in OPTIONS:
        loader = Loader(corpus, threads=0, epochs=1, **options)
        seen = [index for step in loader for batch in step.batches for index in batch.sample_ids if index >= 0]
        assert sorted(seen) == list(range(len(corpus)))
        assert loader.total_steps == loader.steps_in_epoch(0)


def test_length_of_a_run(corpus: Corpus) -> None:
    assert Loader(corpus, units_per_batch=4, epochs=1).total_steps == 10
    assert Loader(corpus, units_per_batch=4, epochs=2.5).total_steps == 25
    steps = list(Loader(corpus, units_per_batch=4, epochs=1, max_steps=13, threads=0))
    assert [step.index for step in steps] == list(range(13))
    assert steps[9].epoch == 1.0
    assert steps[12].epoch == pytest.approx(1.3)


def test_short_last_step_is_filled_with_nothing(corpus: Corpus) -> None:
    last = list(Loader(corpus, units_per_batch=2, accumulation=3, world=2, rank=1, threads=0))[-1]
    assert len(last.batches) == 3
    filler = last.batches[-1]
    assert filler.sample_ids == (-1,)
    assert filler.weight == 0
    assert filler.num_tokens == 1
    assert len(filler.supervised) == 0
    assert filler.media is not None
    assert filler.media.minimal
    assert len(filler.media.dest) == 0


def test_eval_sees_every_row_once_over_all_ranks(corpus: Corpus) -> None:
    for packing in (False, True):
        ranks = [
            list(eval_loader(corpus, units_per_batch=4, packing=packing, capacity=256, rank=r, world=3, threads=1))
            for r in range(3)
        ]
        assert len({len(steps) for steps in ranks}) == 1
        seen = [i for steps in ranks for step in steps for i in step.batches[0].sample_ids if i >= 0]
        assert sorted(seen) == list(range(len(corpus)))


def test_restore_refuses_another_order(corpus: Corpus) -> None:
    state = Loader(corpus, accumulation=2).state()
    for other, word in (
        (Loader(corpus, accumulation=3), "batch size"),
        (Loader(corpus, accumulation=2, seed=1), "--data_seed"),
        (Loader(corpus, accumulation=2, packing=True), "--packing"),
    ):
        with pytest.raises(UserError, match=word):
            other.restore(state)
    with pytest.raises(UserError, match="dataset"):
        Loader(corpus, accumulation=2).restore({**state, "fingerprint": "other"})


def test_packs_shorter_than_a_row_are_refused(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="--packing_length 16"):
        Loader(corpus, packing=True, capacity=16)


def broken(folder: Path) -> tuple[Corpus, int]:
    """A corpus of which one image, after planning, turns out to be cut short."""
    images = make_images(folder / "img", [(200, 160)] * 3)
    whole = Path(images[1]).read_bytes()
    Path(images[1]).write_bytes(whole[: len(whole) // 2])
    rows = [chat(f"q{i}", "a" * (i + 1), [images[i % 3]] if i < 3 else []) for i in range(12)]
    return corpus_of(folder, rows, dataset_shuffle=False), 1


def test_broken_pixels_are_reported_and_left_out(tmp_path: Path) -> None:
    corpus, bad = broken(tmp_path)
    runs = [list(Loader(corpus, units_per_batch=3, threads=threads, epochs=2)) for threads in (0, 3)]
    assert same(*runs)
    seen = [index for step in runs[0] for batch in step.batches for index in batch.sample_ids]
    assert sorted(seen) == sorted([i for i in range(12) if i != bad] * 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [bad]
    assert "cannot decode" in lines[0]["reason"]
    alone = [step.batches[0] for step in Loader(corpus, threads=0) if step.batches[0].sample_ids == (-1,)]
    assert len(alone) == 1
    assert alone[0].media is not None
    assert alone[0].media.minimal


def test_too_many_broken_pixels_stop_the_run(tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", [(200, 160)] * 6)
    for path in images[:4]:
        Path(path).write_bytes(Path(path).read_bytes()[:2000])
    corpus = corpus_of(tmp_path, [chat("q", "a", [path]) for path in images])
    for threads in (0, 2):
        with pytest.raises(UserError, match="max_skip_ratio.*cannot decode"):
            list(Loader(corpus, threads=threads, epochs=2))


def test_files_that_change_after_planning_are_left_out(tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", [(200, 160)] * 2)
    rows = [chat("q", "a", [images[0]]), *chats(15)]
    corpus = corpus_of(tmp_path, rows, dataset_shuffle=False)
    Path(images[0]).write_bytes(Path(make_images(tmp_path / "new", [(400, 300)])[0]).read_bytes())
    seen = [index for step in Loader(corpus, threads=0) for batch in step.batches for index in batch.sample_ids]
    assert sorted(seen) == [-1, *range(1, 16)]
    assert "changed" in corpus.skips.reasons()[0][1]


def test_leaving_early_ends_the_threads(corpus: Corpus) -> None:
    import threading

    before = threading.active_count()
    for step in Loader(corpus, threads=3):
        assert step.batches
        break
    gc.collect()
    assert threading.active_count() == before


def test_waiting_is_measured(corpus: Corpus) -> None:
    for threads in (0, 2):
        loader = Loader(corpus, threads=threads, packing=True, capacity=512)
        list(loader)
        assert loader.waited > 0
        assert 0.5 < loader.efficiency <= 1.0


def test_buffers_come_back_only_when_nothing_looks_at_them() -> None:
    buffers = Buffers(held=2)
    first = buffers.take(100)
    tensor = torch.from_numpy(first[10:20].reshape(2, 5))
    address = first.__array_interface__["data"][0]
    del first
    gc.collect()
    assert buffers.take(50).__array_interface__["data"][0] != address
    tensor.fill_(7)
    view = tensor[0]
    del tensor
    assert view.tolist() == [7] * 5
    del view
    again = [buffers.take(60) for _ in range(2)]
    assert address in {array.__array_interface__["data"][0] for array in again}
    assert np.shares_memory(again[0], again[0][:5])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("threads", [0, 2])
def test_whole_steps_go_on_with_the_next_epoch(corpus: Corpus, options: dict[str, Any], threads: int) -> None:
    """``drop_last``: the units of three epochs one after the other, cut into whole steps."""
    loader = Loader(corpus, threads=threads, epochs=3, drop_last=True, **options)
    per_step = loader.units_per_step
    every = [unit for epoch in range(3) for unit in loader._units(epoch)]
    alike = options.get("units_per_batch", 1)
    count = sum(len(loader._units(epoch)) // alike * alike for epoch in range(3)) // per_step
    assert loader.total_steps == count
    steps = list(loader)
    seen = [i for step in steps for batch in step.batches for i in batch.sample_ids]
    assert seen == [i for unit in every[: count * per_step] for i in unit]
    assert all(len(step.batches) == options["accumulation"] for step in steps)
    assert [step.index for step in steps] == list(range(count))
    assert 2 < steps[-1].epoch <= 3 and all(a.epoch < b.epoch for a, b in pairwise(steps))
    for stop in (1, count // 3 + 1):
        first = Loader(corpus, threads=threads, epochs=3, drop_last=True, **options)
        begun = [step for _, step in zip(range(stop), first, strict=False)]
        again = Loader(corpus, threads=threads, epochs=3, drop_last=True, **options)
        again.restore(json.loads(json.dumps(first.state())))
        assert same([*begun, *again], steps)


def test_whole_steps_on_ranks_are_those_of_one_process(corpus: Corpus) -> None:
    alone = ids(list(Loader(corpus, threads=0, accumulation=4, epochs=2, drop_last=True)))
    two = [
        ids(list(Loader(corpus, threads=0, accumulation=2, epochs=2, drop_last=True, rank=rank, world=2)))
        for rank in range(2)
    ]
    assert [[a[0], b[0], a[1], b[1]] for a, b in zip(*two, strict=True)] == alone


def test_megatron_swifts_number_of_iterations(corpus: Corpus) -> None:
    for rows, world, batch, epochs in ((1, 2, 4, 3), (2, 4, 16, 2), (3, 1, 9, 1)):
        loader = Loader(
            corpus, threads=0, units_per_batch=rows, accumulation=batch // (rows * world), world=world, epochs=epochs,
            drop_last=True,
        )  # fmt: skip
        alike = rows * world
        assert loader.total_steps == (37 // alike * alike) * epochs // batch
    with pytest.raises(UserError, match="--global_batch_size 64: 37 training rows make no whole step"):
        Loader(corpus, threads=0, accumulation=64, drop_last=True)
    assert Loader(corpus, threads=0, accumulation=64, drop_last=True, max_steps=2).total_steps == 2


def test_an_evaluation_of_so_many_rows(corpus: Corpus) -> None:
    rows = [
        i
        for step in eval_loader(corpus, threads=0, units_per_batch=2, most=7)
        for b in step.batches
        for i in b.sample_ids
    ]
    assert len(rows) == 8
    assert eval_loader(corpus, threads=0, most=1000).total_steps == 37
