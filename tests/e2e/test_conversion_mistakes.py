"""Conversions that cannot be: one line that says why, and nothing under the name of the result."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.e2e.command import tessera, works
from tests.models import make_model_dir


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("made")
    model = make_model_dir(here / "model", "qwen3_vl")
    works("export", "--model", model, "--to_mcore", "true", "--output_dir", here / "dist")
    flags = ("--mcore_format", "torch", "--target_tensor_parallel_size", "2")
    works("export", "--model", model, "--to_mcore", "true", *flags, "--output_dir", here / "ranks")
    return here


class Runs:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch owned",)


def drop_rank(path: Path) -> None:
    shutil.rmtree(path / "iter_0000001" / "mp_rank_01")


def cut_rank(path: Path) -> None:
    file = path / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def bad_rank(path: Path) -> None:
    file = path / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    torch.save({"args": Runs()}, file, pickle_module=pickle)


def cut_chunk(path: Path) -> None:
    file = max((path / "iter_0000001").glob("*.distcp"), key=lambda place: place.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_chunk(path: Path) -> None:
    next((path / "iter_0000001").glob("*.distcp")).unlink()


def bad_common(path: Path) -> None:
    torch.save({"args": Runs()}, path / "iter_0000001" / "common.pt", pickle_module=pickle)


def more_layers(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (path / "config.json").write_text(json.dumps(config))


def fewer_layers(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    (path / "config.json").write_text(json.dumps(config))


def wider(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (path / "config.json").write_text(json.dumps(config))


def lost_iteration(path: Path) -> None:
    (path / "latest_checkpointed_iteration.txt").write_text("7")


@pytest.mark.parametrize(
    ("kind", "harm", "told"),
    [
        ("ranks", drop_rank, "rank 1 is missing"),
        ("ranks", cut_rank, "model_optim_rng.pt"),
        ("ranks", bad_rank, "system"),
        ("dist", cut_chunk, ".distcp"),
        ("dist", drop_chunk, ".distcp"),
        ("dist", bad_common, "system"),
        ("dist", more_layers, "missing"),
        ("dist", fewer_layers, "unexpected"),
        ("dist", wider, "of another shape"),
        ("dist", lost_iteration, "iter_0000007"),
    ],
    ids=lambda value: value.__name__ if callable(value) else value,
)
def test_a_damaged_checkpoint_is_named(
    made: Path, tmp_path: Path, kind: str, harm: Callable[[Path], None], told: str
) -> None:
    path = shutil.copytree(made / kind, tmp_path / "mcore")
    harm(path)
    # Adapters and most conversions read the arguments of the job, too.
    flags = ("--to_mcore", "true", "--mcore_format", "torch") if told == "system" else ("--to_hf", "true")
    done = tessera("export", "--mcore_model", path, *flags, "--output_dir", tmp_path / "out")
    assert done.code not in (0, None) and "Traceback" not in done.err, done.err
    assert told in done.error and str(path) in done.error and "\n" not in done.error.strip()
    assert {place.name for place in tmp_path.iterdir()} == {"mcore"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--target_tensor_parallel_size", "3"), "--target_tensor_parallel_size 3: does not divide"),
        (("--target_pipeline_parallel_size", "5"), "--target_pipeline_parallel_size 5: does not divide"),
        (("--target_expert_parallel_size", "2"), "the model has no experts"),
        (("--mcore_dialect", "lm"), "--mcore_dialect lm: has no layout for qwen3_vl"),
        (("--padded_vocab_size", "5"), "--padded_vocab_size 5: the model has"),
    ],
)
def test_what_cannot_be_written_is_refused(made: Path, tmp_path: Path, flags: tuple[str, ...], told: str) -> None:
    done = tessera("export", "--model", made / "model", "--to_mcore", "true", *flags, "--output_dir", tmp_path / "out")
    assert done.code not in (0, None) and told in done.error and not list(tmp_path.iterdir())


def test_an_existing_directory_stays(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("export", "--mcore_model", made / "dist", "--to_hf", "true", "--output_dir", out)
    works(*words)
    before = {place.name: place.stat().st_mtime_ns for place in out.iterdir()}
    done = tessera(*words)
    assert done.code not in (0, None) and "exists already; choose another or add --exist_ok true" in done.error
    assert before == {place.name: place.stat().st_mtime_ns for place in out.iterdir()}
    works(*words, "--exist_ok", "true")


def test_a_full_disk_leaves_nothing(made: Path, tmp_path: Path) -> None:
    # A limit of file sizes stands for a full disk: a write beyond it fails with an OSError.
    words = ["export", "--model", str(made / "model"), "--to_mcore", "true", "--output_dir", str(tmp_path / "out")]
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from tessera.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "writing failed: File too large" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
