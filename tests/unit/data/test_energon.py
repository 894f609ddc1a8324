"""Folders change hands with the real Energon, both ways, sample by sample. Skipped where it is not installed."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessera.data import media
from tessera.data.sample import normalise
from tessera.data.shards.prepare import prepare
from tessera.data.sources import leaves, open_rows, parse_dataset_spec
from tests.shards import FIELD_MAP, make_shards

energon = pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache directory is a directory of the test's."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def task_encoder() -> Any:
    """One that leaves samples as they are, but for decoding their images."""

    class Plain(energon.TaskEncoder):  # type: ignore[name-defined, misc]
        decoder = energon.SampleDecoder(image_decode="pilrgb")

        def encode_sample(self, sample: Any) -> Any:
            return sample

        def batch(self, samples: list[Any]) -> list[Any]:
            return samples

    return Plain()


def theirs(path: Path, part: str = "train") -> dict[str, Any]:
    """Key -> sample, as Energon loads them once each."""
    worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_val_dataset(
        path, split_part=part, worker_config=worker, batch_size=2, task_encoder=task_encoder()
    )
    return {sample.__key__: sample for batch in energon.get_loader(dataset) for sample in batch}


def same(path: Path, part: str) -> int:
    """Compare every sample of a part; how many there were."""
    there, rows = theirs(path, part), open_rows(parse_dataset_spec(f"{path}:{part}"))
    assert len(there) == len(rows)
    keys = {key.rpartition("/")[2]: sample for key, sample in there.items()}
    for index in range(len(rows)):
        here = normalise(rows[index])
        other = keys[rows.place(index).split(": ")[1]]  # type: ignore[attr-defined]
        assert [message.content for message in here.messages] == [other.context, other.answers]
        assert np.array_equal(media.decode(here.images[0]), np.asarray(other.image))
    return len(rows)


def prepared_by_energon(folder: Path) -> None:
    from click.testing import CliRunner
    from megatron.energon.tools.prepare import command

    words = [str(folder), "--non-interactive", "--split-ratio", "3,1,0", "--sample-type", "VQASample"]
    words += ["--field-map", json.dumps(FIELD_MAP), "--num-workers", "1", "--no-progress"]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_what_we_prepare_energon_loads(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds")
    prepare(folder, "3,1,0", "VQASample", FIELD_MAP)
    assert (same(folder, "train"), same(folder, "val")) == (9, 3)
    worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    options = {"shuffle_buffer_size": 4, "max_samples_per_sequence": 4, "task_encoder": task_encoder()}
    dataset = energon.get_train_dataset(folder, worker_config=worker, batch_size=3, **options)
    batches = iter(energon.get_loader(dataset))
    assert len({sample.__key__ for _ in range(40) for sample in next(batches)}) == 9


def test_what_energon_prepares_we_load(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds")
    prepared_by_energon(folder)
    assert (same(folder, "train"), same(folder, "val")) == (9, 3)


def test_the_files_are_the_same(tmp_path: Path) -> None:
    ours = make_shards(tmp_path / "ours", 24, 2)
    shutil.copytree(ours, tmp_path / "theirs")
    prepare(ours, "3,1,0", "VQASample", FIELD_MAP)
    prepared_by_energon(tmp_path / "theirs")
    names = [".nv-meta/split.yaml", ".nv-meta/dataset.yaml", *(f"pretrain-{n}.tar.idx" for n in range(12))]
    for name in names:
        assert (ours / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    infos = [json.loads((tmp_path / who / ".nv-meta" / ".info.json").read_text()) for who in ("ours", "theirs")]
    assert infos[0]["shard_counts"] == infos[1]["shard_counts"]
    assert list(infos[0]["shard_counts"]) == list(infos[1]["shard_counts"])
    databases = [sqlite3.connect(tmp_path / who / ".nv-meta" / "index.sqlite") for who in ("ours", "theirs")]
    for query in (
        "SELECT * FROM samples ORDER BY tar_file_id, sample_index",
        "SELECT * FROM sample_parts ORDER BY tar_file_id, sample_index, content_byte_offset",
        "SELECT type, name, tbl_name FROM sqlite_master ORDER BY name",
    ):
        first, second = (database.execute(query).fetchall() for database in databases)
        assert first == second


def test_a_metadataset_is_the_same_datasets(tmp_path: Path) -> None:
    for name in "ab":
        prepare(make_shards(tmp_path / name, 4, 1), "1,0,0", "VQASample", FIELD_MAP)
    path = tmp_path / "blend.yaml"
    path.write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        "    - {weight: 3, path: ./a}\n    - {weight: 1, path: ./b, subset: {range: [25%, 75%]}}\n"
    )
    worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_train_dataset(
        path,
        worker_config=worker,
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=task_encoder(),
    )
    batches = iter(energon.get_loader(dataset))
    there = {sample.__sources__[0].dataset_path.name: set() for _ in range(200) for sample in next(batches)}
    batches = iter(energon.get_loader(dataset))
    for _ in range(200):
        for sample in next(batches):
            there[sample.__sources__[0].dataset_path.name].add(sample.context)
    found = leaves(parse_dataset_spec(str(path)))
    here = [{normalise(rows[i]).messages[0].content for i in range(len(rows))} for rows, _ in found]
    assert here == [there["a"], there["b"]]
    assert [share for _, share in found] == [4.5, 1.5]
