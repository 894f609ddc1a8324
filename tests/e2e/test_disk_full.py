"""The disk is full when a checkpoint is to be written: a sentence, and what was there before is as good as ever.

No file may grow beyond a limit that lies between what the run writes all the time and what a checkpoint weighs. To
the program this looks as a full disk does: ``write`` fails with an ``OSError`` in the middle of a file.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import Done, checkpoint, run_dir, shell
from tests.resume.job import assert_identical, make, run


def limited(argv: list[str], out: Path, blocks: int, *more: str, **variables: str) -> Done:
    """Train with files limited to ``blocks`` KiB; the signal that goes with the limit is ignored, as for a disk."""
    words = " ".join([*argv, "--output_dir", str(out), *more])
    return shell(f"trap '' XFSZ; ulimit -f {blocks}; exec tessera {words}", out.parent, **variables)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_previous_checkpoint_survives(kind: str, tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3"), "--train_type", kind, "--max_steps", "8", "--save_steps", "4"]
    straight = run(argv, tmp_path / "a")
    largest = max(path.stat().st_size for path in checkpoint(tmp_path / "a").rglob("*"))
    assert largest > 48 * 1024

    # Up to step 4 there is room; the run is then stopped in the way a kill would, and goes on with a full disk.
    out = tmp_path / "b"
    before = run(argv, out)
    (before / "checkpoint-8").rename(tmp_path / "taken-away")
    untouched = {path: path.read_bytes() for path in (before / "checkpoint-4").rglob("*") if path.is_file()}
    done = limited(argv, out, largest // 2048, "--resume_from_checkpoint", "true")
    assert done.code == 1, done.err
    assert "checkpoint-8 failed: File too large; checkpoint-4 is untouched" in done.error
    assert "--resume_from_checkpoint true" in done.error
    assert sorted(path.name for path in before.iterdir() if "checkpoint" in path.name) == ["checkpoint-4"]
    assert untouched == {path: path.read_bytes() for path in (before / "checkpoint-4").rglob("*") if path.is_file()}

    resumed = run(argv, out, "--resume_from_checkpoint", "true")
    assert_identical(resumed, straight)


def test_the_first_save_has_no_room(tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3"), "--train_type", "full"]
    done = limited(argv, tmp_path / "out", 64)
    assert done.code == 1
    assert "checkpoint-4 failed: File too large; there was no earlier checkpoint" in done.error
    assert not [path for path in run_dir(tmp_path / "out").iterdir() if "checkpoint" in path.name]


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_stage_of_a_pipeline_stops(kind: str, tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3"), "--train_type", kind, "--pipeline_model_parallel_size", "2"]
    done = limited(argv, tmp_path / "out", 48, NPROC_PER_NODE="2", OMP_NUM_THREADS="1")
    assert done.code == 1
    assert "checkpoint-4 failed: File too large; there was no earlier checkpoint" in done.error
    assert not [path for path in run_dir(tmp_path / "out").iterdir() if "checkpoint" in path.name]


def test_exporting_has_no_room(tmp_path: Path) -> None:
    make(tmp_path, "qwen3")
    words = f"export --model {tmp_path / 'model'} --torch_dtype float32 --output_dir {tmp_path / 'out'}"
    done = shell(f"trap '' XFSZ; ulimit -f 64; exec tessera {words}", tmp_path)
    assert done.code == 1
    assert f"--output_dir {tmp_path / 'out'}: writing failed: File too large" in done.error
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
