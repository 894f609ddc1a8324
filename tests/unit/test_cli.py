"""The program itself: what it prints, what it returns, and what it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import tessera
from tessera import cli
from tessera.config.errors import UserError
from tessera.config.flags import VERBS
from tessera.config.run import Run

SFT = ["sft", "--model", "org/name", "--dataset", "rows.jsonl"]
# A stand-in for the work of a verb, for processes that these tests start: it does what ACT says, per rank.
STUB = """
import os, signal, sys, time
from tessera import cli
from tessera.config.errors import UserError

def main(run):
    rank = os.environ.get("RANK", "-")
    world, accumulation = os.environ.get("WORLD_SIZE", "-"), run.train.gradient_accumulation_steps
    print(f"rank {rank} of {world}: accumulate {accumulation}", flush=True)
    for act in os.environ["ACT"].split():
        what, _, who = act.partition("@")
        if who in ("", rank):
            if what == "fail": raise UserError("--dataset rows.jsonl: no such file")
            if what == "die": os.kill(os.getpid(), signal.SIGKILL)
            if what == "wait": time.sleep(60)
            if what == "exit": sys.exit(7)
            if what == "term":
                def stop(*_):
                    print(f"rank {rank} saves and stops", flush=True)
                    sys.exit(143)
                signal.signal(signal.SIGTERM, stop)
"""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs that reached a verb's function."""
    seen: list[Run] = []
    stub = ModuleType("stub")
    vars(stub)["main"] = seen.append
    monkeypatch.setitem(sys.modules, "stub", stub)
    monkeypatch.setattr(cli, "ENTRY", dict.fromkeys(VERBS, "stub:main"))
    return seen


def test_every_verb_has_an_entry() -> None:
    assert set(cli.ENTRY) == set(VERBS)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tessera {tessera.__version__}\n"
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    assert cli.main([]) == 2
    assert cli.main(["sft", "--help"]) == 0
    assert "--lora_rank" in capsys.readouterr().out


def test_a_verb_gets_its_run_and_notes_go_to_stderr(told: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SFT, "--dataset_num_proc", "4", "--dry_run", "true"]) == 0
    assert [run.verb for run in told] == ["sft"]
    assert told[0].dry_run is True
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "note: --dataset_num_proc has no effect: planning lengths needs no worker processes\n"
    assert cli.main(["report", "output/v0"]) == 0
    assert told[1].target == "output/v0"


def test_a_dry_run_starts_no_other_process(told: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert cli.main([*SFT, "--dry_run", "true"]) == 0
    assert told[0].train.gradient_accumulation_steps == 8


def test_the_env_block_of_a_file_reaches_the_process(
    told: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"KEPT": "shell"})
    file = tmp_path / "run.yaml"
    file.write_text("ENV: {KEPT: file, NEW_ONE: 5}\nmodel: org/name\ndataset: rows.jsonl\n")
    assert cli.main(["sft", str(file)]) == 0
    assert os.environ["KEPT"] == "shell"
    assert os.environ["NEW_ONE"] == "5"


def test_errors_are_one_line_with_their_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sft", "--modle", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: --modle: tessera sft has no such flag; nearest: --model")

    def fail(error: BaseException) -> None:
        stub = ModuleType("stub")

        def main(run: Run) -> None:
            raise error

        vars(stub)["main"] = main
        monkeypatch.setitem(sys.modules, "stub", stub)

    monkeypatch.setattr(cli, "ENTRY", dict.fromkeys(VERBS, "stub:main"))
    fail(UserError("rows.jsonl: two\n lines"))
    assert cli.main(SFT) == 1
    assert capsys.readouterr().err == "error: rows.jsonl: two lines\n"
    fail(KeyboardInterrupt())
    assert cli.main(SFT) == 130
    fail(RuntimeError("a defect"))
    with pytest.raises(RuntimeError):
        cli.main(SFT)


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "tessera", "sft", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 128 + signal.SIGPIPE)


def start(tmp_path: Path, act: str, *more: str) -> subprocess.Popen[str]:
    """``NPROC_PER_NODE=2 tessera sft`` with the stub for its work."""
    (tmp_path / "stub.py").write_text(STUB)
    site = tmp_path / "sitecustomize.py"
    site.write_text("from tessera import cli\ncli.ENTRY = {**cli.ENTRY, 'sft': 'stub:main'}\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "NPROC_PER_NODE": "2", "ACT": act, "PYTHONPATH": path}
    command = [sys.executable, "-m", "tessera", *SFT, *more]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(120)
def test_several_processes(tmp_path: Path) -> None:
    done = start(tmp_path, "nothing", "--check_model", "true")
    out, err = done.communicate(timeout=100)
    assert done.returncode == 0, err
    first, *ranks = out.splitlines()
    assert first.startswith("run sh: `")
    assert "-m torch.distributed.run --nproc_per_node 2 --standalone -m tessera sft" in first
    assert sorted(ranks) == ["rank 0 of 2: accumulate 8", "rank 1 of 2: accumulate 8"]
    assert err.count("note: --check_model") == 1


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("act", "code", "error"),
    [
        ("fail", 1, "error: --dataset rows.jsonl: no such file\n"),
        ("fail@1", 1, "error: rank 1: --dataset rows.jsonl: no such file\n"),
        ("exit@0", 7, ""),
        ("die@1", 137, "error: rank 1 was ended by SIGKILL (often: out of memory)\n"),
    ],
)
def test_failing_ranks_speak_once(tmp_path: Path, act: str, code: int, error: str) -> None:
    done = start(tmp_path, act + " wait")
    _, err = done.communicate(timeout=100)
    assert err == error
    assert done.returncode == code


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_signals_reach_the_ranks(tmp_path: Path) -> None:
    running = start(tmp_path, "term wait")
    assert running.stdout is not None
    for _ in range(3):
        running.stdout.readline()
    time.sleep(1)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    # Both ranks write to one pipe, so their lines may run into each other.
    assert [out.count(f"rank {rank} saves and stops") for rank in range(2)] == [1, 1], err
    assert running.returncode == 128 + signal.SIGTERM
