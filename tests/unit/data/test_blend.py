"""Blends: proportions, coverage, and an order that only (seed, epoch, position) decides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tessera.config.errors import UserError
from tessera.config.resolve import run_of
from tessera.data.blend import draw, whole_shares
from tessera.data.corpus import Corpus, prepare
from tessera.data.loader import Loader
from tessera.data.render import Renderer
from tessera.data.shards import prepare as energon
from tessera.data.sources import leaves, parse_dataset_spec
from tests.shards import FIELD_MAP, make_shards
from tests.toys import chats, make_geometry, make_tokenizer_dir, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared folders ``a`` (12 samples, 9 train) and ``b`` (8, 6 train), and 10 rows of jsonl."""
    root = tmp_path_factory.mktemp("blend")
    for name, count, each in (("a", 12, 3), ("b", 8, 2)):
        energon.prepare(make_shards(root / name, count, each), "3,1,0", "VQASample", FIELD_MAP)
    write_rows(root / "rows.jsonl", chats(10))
    return root


def write(path: Path, splits: dict[str, Any], kind: str = "MetadatasetV2") -> Path:
    path.write_text(yaml.dump({"__module__": "megatron.energon", "__class__": kind, "splits": splits}))
    return path


def shares(text: str | Path, part: str = "train") -> dict[str, float]:
    return {Path(rows.name).name: share or 0.0 for rows, share in leaves(parse_dataset_spec(str(text)), part)}


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_dataset_comes_round_before_any_row_comes_twice(shuffle: bool) -> None:
    counts, wanted = [4, 7, 1], [6, 2, 3]
    epochs = [draw(counts, wanted, 5, epoch, shuffle=shuffle) for epoch in range(14)]
    for drawn in epochs:
        assert [int(((start <= drawn) & (drawn < end)).sum()) for start, end in ((0, 4), (4, 11), (11, 12))] == wanted
    for start, count in ((0, 4), (4, 7), (11, 1)):
        seen = [int(row) - start for drawn in epochs for row in drawn if start <= row < start + count]
        for at in range(0, len(seen) // count * count, count):
            assert sorted(seen[at : at + count]) == list(range(count))
    again = draw(counts, wanted, 5, 9, shuffle=shuffle)
    assert np.array_equal(again, epochs[9])  # without the epochs before it


def test_shares_become_whole_rows_with_the_same_sum() -> None:
    assert whole_shares([1.5, 1.5, 3.0]) == (2, 1, 3)
    assert whole_shares([0.1, 9.9]) == (1, 10)
    assert sum(whole_shares([3.3] * 10)) == 33


def test_weights_are_proportions_of_what_is_seen(folder: Path) -> None:
    blend = [{"weight": 3, "path": "./a"}, {"weight": 1, "path": "b", "subflavors": {"x": 1}}]
    found = shares(write(folder / "one.yaml", {"train": {"blend": blend}, "val": {"path": "a"}}))
    assert found == {"a": pytest.approx(15 * 3 / 4), "b": pytest.approx(15 / 4)}
    assert shares(f"{folder / 'one.yaml'}:val") == {"a:val": 3.0}
    assert shares(folder / "one.yaml", "val") == {"a:val": 3.0}
    assert sum(shares(f"{folder / 'one.yaml'}#100").values()) == pytest.approx(100)


def test_nested_weights_multiply_and_the_old_form_is_read(folder: Path) -> None:
    (folder / "deep").mkdir(exist_ok=True)
    inner = [{"weight": 1, "path": "../a"}, {"weight": 3, "path": "../b"}]
    write(folder / "deep" / "inner.yaml", {"train": {"datasets": inner}}, "Metadataset")
    outer = [{"weight": 1, "path": "deep/inner.yaml"}, {"weight": 1, "path": "rows.jsonl"}]
    found = shares(write(folder / "outer.yaml", {"train": {"blend": outer}}))
    total = 9 + 6 + 10
    assert found == {"a": pytest.approx(total / 8), "b": pytest.approx(total * 3 / 8), "rows.jsonl": total / 2}


def test_repetitions_and_subsets(folder: Path) -> None:
    entries = [
        {"repetitions": 2, "path": "a", "subset": {"range": ["0%", "50%"]}},
        {"repetitions": 0.5, "path": "b", "subset": {"range": [2, "end"]}},
        {"repetitions": 0, "path": "rows.jsonl"},
    ]
    found = shares(write(folder / "times.yaml", {"train": {"blend_epochized": entries}}))
    assert found == {"a[0:4]": 8.0, "b[2:6]": 2.0}


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ({"blend": [{"weight": -1, "path": "a"}]}, "weight -1 is not a number of at least 0"),
        ({"blend": [{"weight": 0, "path": "a"}]}, "weights of a blend add up to nothing"),
        ({"blend": []}, "a blend is a list of datasets"),
        ({"path": "a", "blend": []}, "exactly one of path, blend"),
        ({"join": [{"path": "a"}]}, "join is not supported"),
        ({"path": "a", "aux": {"x": "b"}}, "aux is not supported"),
        ({"path": "s3://bucket/a"}, "s3://bucket/a is not on this machine"),
        ({"path": "nowhere"}, "nowhere: no such file or directory"),
        ({"path": "bad.yaml"}, "refers to itself"),
        ({"path": "a", "split_part": "dev"}, "no split part 'dev'"),
        ({"path": "a", "subset": {"range": [0, 99]}}, r"range \[0, 99\] is not within the 9 rows"),
        ({"path": "a", "subset": {"range": ["0", "1"]}}, "neither a row number nor a share"),
        ("a", "an entry must be a mapping"),
    ],
)
def test_mistakes_are_one_line(folder: Path, split: Any, reason: str) -> None:
    path = write(folder / "bad.yaml", {"train": split})
    with pytest.raises(UserError, match=reason) as error:
        leaves(parse_dataset_spec(str(path)))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    blend = [{"weight": 3, "path": "b"}, {"weight": 1, "path": "a"}]
    path = write(folder / "run.yaml", {"train": {"blend": blend}})
    directory = make_tokenizer_dir(folder / "model")
    run = run_of("sft", model=str(directory), dataset=(str(path),))
    geometry = make_geometry()
    made, _ = prepare(run.data, Renderer(directory, geometry), geometry)
    return made


def seen(loader: Loader) -> list[int]:
    return [index for step in loader for batch in step.batches for index in batch.sample_ids if index >= 0]


@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_has_the_proportions(corpus: Corpus, packing: bool) -> None:
    assert (len(corpus), corpus.epoch_rows, corpus.shares) == (15, 15, (11, 4))
    for epoch in range(3):
        loader = Loader(corpus, threads=0, epochs=epoch + 1, packing=packing, capacity=256)
        rows = [index for unit in loader._units(epoch) for index in unit]
        assert Counter(corpus.refs[rows, 0].tolist()) == {0: 11, 1: 4}
        counts = Counter(rows)
        assert max(counts.values()) - min(counts.get(row, 0) for row in range(6)) <= 2
    whole = seen(Loader(corpus, threads=0, epochs=3, packing=packing, capacity=256))
    assert len(whole) == 45


@pytest.mark.parametrize("packing", [False, True])
def test_other_workers_and_ranks_go_on_in_the_same_order(corpus: Corpus, packing: bool) -> None:
    options: dict[str, Any] = {"packing": packing, "capacity": 256, "epochs": 4}
    straight = [b.sample_ids for s in Loader(corpus, threads=0, accumulation=2, **options) for b in s.batches]
    first = Loader(corpus, threads=3, accumulation=2, **options)
    iterator = iter(first)
    got = [batch.sample_ids for _ in range(3) for batch in next(iterator).batches]
    state = first.state()
    iterator.close()  # type: ignore[attr-defined]
    ranks = [Loader(corpus, threads=rank, rank=rank, world=2, **options) for rank in range(2)]
    for loader in ranks:
        loader.restore(state)
    for steps in zip(*ranks, strict=True):
        got += [batch.sample_ids for pair in zip(*(step.batches for step in steps), strict=True) for batch in pair]
    assert got == straight


def test_a_resume_with_other_weights_is_refused(corpus: Corpus, folder: Path) -> None:
    from dataclasses import replace

    state = Loader(corpus).state()
    with pytest.raises(UserError, match="dataset"):
        Loader(replace(corpus, shares=(10, 5))).restore(state)
