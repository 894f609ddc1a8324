"""Ranks that die, raise, hang or cannot meet: one clear line, every rank gone within seconds, checkpoints untouched.

The ranks are real (gloo, a small model, ``NPROC_PER_NODE=2 tessera sft``). What goes wrong is done by the rank itself
at a given step: ``ACT=kill@1:6`` is SIGKILL for rank 1 in the middle of its sixth step.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.ranks import free_port
from tests.resume.job import make

STUB = """
import os, signal, sys, time
from tessera.recipes import supervised
from tessera.train import trainer

def main(run):
    what, _, when = os.environ.get("ACT", "").partition("@")
    ranks, _, step = when.partition(":")
    real, seen = trainer.train_step, [0]

    def train_step(engine, *args, **more):
        seen[0] += 1
        print(f"rank {os.environ['RANK']} pid {os.getpid()} step {seen[0]}", flush=True)
        if what and os.environ["RANK"] in ranks.split(",") and seen[0] == int(step):
            if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
            if what == "stop": os.kill(os.getpid(), signal.SIGSTOP)
            if what == "raise": raise ZeroDivisionError("a defect")
            if what == "sleep": time.sleep(1000)
        return real(engine, *args, **more)

    trainer.train_step = train_step
    return supervised.main(run)
"""


@dataclass
class Launch:
    """Starts launchers of one job and ends whatever they leave behind."""

    root: Path
    argv: list[str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.root / "out"

    def __call__(self, act: str = "", *more: str, **variables: str) -> subprocess.Popen[str]:
        env = {**os.environ, "ACT": act, "PYTHONPATH": f"{self.root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        process = subprocess.Popen(
            [sys.executable, "-m", "tessera", *self.argv, "--output_dir", str(self.out), *more],
            env={**env, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("*/checkpoint-*"))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Launch]:
    (tmp_path / "stub.py").write_text(STUB)
    site = "from tessera import cli\ncli.ENTRY = {**cli.ENTRY, 'sft': 'stub:main'}\n"
    (tmp_path / "sitecustomize.py").write_text(site)
    launch = Launch(tmp_path, [*make(tmp_path, "qwen3"), "--train_type", "full"])
    yield launch
    for process in launch.started:
        if process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.kill()
            for pid in children:
                os.kill(int(pid), signal.SIGKILL)


def ended(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout, stderr; and no rank that printed its pid is alive."""
    out, err = process.communicate(timeout=seconds)
    for pid in {int(found) for found in re.findall(r"pid (\d+)", out)}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return process.returncode, out, err


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if not line.startswith("note: ") and line.strip()]


def seconds_after(process: subprocess.Popen[str], line: str) -> float:
    """How long the launcher lives on after a rank printed ``line``."""
    assert process.stdout is not None
    while (text := process.stdout.readline()) and line not in text:
        pass
    start = time.monotonic()
    process.wait(120)
    return time.monotonic() - start


LAYOUTS = [
    pytest.param((), id="dp2"),
    pytest.param(("--tensor_model_parallel_size", "2"), id="tp2", marks=pytest.mark.parallel),
    pytest.param(("--pipeline_model_parallel_size", "2"), id="pp2", marks=pytest.mark.parallel),
]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_rank_ends_all_and_the_last_checkpoint_stays(layout: tuple[str, ...], job: Launch) -> None:
    process = job("kill@1:6", *layout)
    assert seconds_after(process, "rank 1 pid") < 60  # all of training after the first step of rank 1
    code, _, err = ended(process)
    assert (code, errors(err)) == (137, ["error: rank 1 was ended by SIGKILL (often: out of memory)"])
    assert job.checkpoints() == ["checkpoint-4"]
    code, _, err = ended(job("", "--resume_from_checkpoint", "true", *layout))
    assert code == 0, err
    assert job.checkpoints() == ["checkpoint-4", "checkpoint-8"]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("ranks", ["1", "0,1"])
def test_a_defect_prints_one_traceback(ranks: str, job: Launch) -> None:
    code, _, err = ended(job(f"raise@{ranks}:3"))
    assert code == 1
    assert err.count("Traceback") == err.count("ZeroDivisionError: a defect\nerror: ") == 1
    assert f"error: rank {ranks[0]} failed: ZeroDivisionError: a defect" in errors(err)[-1]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_rank_that_hangs_is_named(job: Launch) -> None:
    process = job("sleep@1:6", "--ddp_timeout", "6")
    assert seconds_after(process, "rank 1 pid") < 60
    code, _, err = ended(process)
    [line] = errors(err)
    assert code == 1
    host = re.escape(socket.gethostname())
    pattern = rf"error: no progress for 6 s \(--ddp_timeout\): rank 1 \(host {host}\) has not moved since step 5 "
    assert re.match(pattern + r"\(phase: .*\); rank 0 waits in \w+ at ", line), line
    assert job.checkpoints() == ["checkpoint-4"]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_rank_that_is_stopped_is_named_by_the_others(job: Launch) -> None:
    process = job("stop@1:6", "--ddp_timeout", "6")
    assert seconds_after(process, "rank 1 pid") < 60
    code, _, err = ended(process)
    [line] = errors(err)
    assert code == 1
    # What was last seen of it is as old as the last look.
    assert re.search(r"rank 1 \(host \S+\) does not respond, last seen at step [45] \(", line), line
    assert "rank 0 waits in all_reduce at mesh.py" in line, line


def test_a_port_in_use(job: Launch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, _, err = ended(job("", MASTER_PORT=port))
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: MASTER_PORT={port}: cannot be opened (address already in use)")


def test_no_address(job: Launch) -> None:
    code, out, err = ended(job("", NNODES="2"))
    assert (code, out) == (2, "")
    assert err == "error: NNODES=2 needs MASTER_ADDR, the address of the first machine\n"


@dataclass(frozen=True)
class Pair:
    """The variables of two machines, both of them this one."""

    port: int = field(default_factory=free_port)

    def node(self, rank: int, **more: str) -> dict[str, str]:
        place = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        return {**place, "NPROC_PER_NODE": "1", **more}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_machines_train(job: Launch) -> None:
    pair = Pair()
    both = [job("", **pair.node(rank)) for rank in (1, 0)]
    for process in both:
        code, _, err = ended(process)
        assert (code, errors(err)) == (0, []), err
    assert job.checkpoints() == ["checkpoint-4", "checkpoint-8"]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("dies", [0, 1])
def test_a_failure_ends_both_machines_and_is_explained_once(dies: int, job: Launch) -> None:
    pair = Pair()
    both = [job(f"raise@{dies}:6", **pair.node(rank)) for rank in (0, 1)]
    texts = []
    for process in both:
        code, _, err = ended(process)
        assert code == 1
        texts.append(err)
    assert texts[dies].count("Traceback") == 1
    reason = f"rank {dies} (host {socket.gethostname()}) failed first: rank {dies} failed: ZeroDivisionError: a defect"
    assert errors(texts[1 - dies]) == [f"error: stopped, because {reason}"]
    assert job.checkpoints() == ["checkpoint-4"]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_machine_that_is_gone(job: Launch) -> None:
    """The first machine's launcher and rank vanish: no message reaches the second one."""
    pair = Pair()
    first, second = (job("", "--max_steps", "100000", "--save_steps", "4", **pair.node(rank)) for rank in (0, 1))
    assert first.stdout is not None
    while not (found := re.search(r"pid (\d+) step 6", first.stdout.readline())):
        pass
    first.send_signal(signal.SIGKILL)
    os.kill(int(found[1]), signal.SIGKILL)
    code, _, err = ended(second)
    assert code == 1
    assert errors(err) == [f"error: stopped, because the first machine (127.0.0.1:{pair.port}) is gone"]
    assert "checkpoint-4" in job.checkpoints()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_machines_that_disagree(job: Launch) -> None:
    pair = Pair()
    first = job("", "--ddp_timeout", "4", **pair.node(0))
    other = job("", "--ddp_timeout", "4", **pair.node(1, NPROC_PER_NODE="2"))
    code, _, err = ended(other)
    shape = "NNODES=2 NPROC_PER_NODE"
    assert code == 1 and f"{shape}=2 here but {shape}=1 on another machine" in err
    code, _, err = ended(first)
    assert code == 1 and "only 1 of them came" in err
    lonely = job("", "--ddp_timeout", "2", **Pair().node(1))
    code, _, err = ended(lonely)
    assert code == 1 and "the first machine (NODE_RANK=0) does not answer: connection refused" in err


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_signal_saves_on_all_ranks(layout: tuple[str, ...], job: Launch) -> None:
    process = job("", *layout)
    assert process.stdout is not None
    seen: set[str] = set()
    while len(seen) < 2:
        seen |= set(re.findall(r"rank \d pid", process.stdout.readline()))
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 128 + signal.SIGTERM, err
    assert "Traceback" not in err and "error:" not in err
    assert job.checkpoints()
    code, _, err = ended(job("", "--resume_from_checkpoint", "true", *layout))
    assert code == 0, err
    assert job.checkpoints()[-1] == "checkpoint-8"
