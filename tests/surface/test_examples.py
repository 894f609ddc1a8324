"""The job files of examples/ are what schedulers and the command line take."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from tessera.config.resolve import resolve

EXAMPLES = Path(__file__).parents[2] / "examples"
STUBS = {
    # Two tasks, as srun would start them; each prints what its launcher sees.
    "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id "$@" || exit $?; done',
    "scontrol": 'if [ "$1" = show ]; then printf "alpha\\nbeta\\n"; else echo "scontrol $*"; fi',
    "tessera": 'echo "$NNODES $NODE_RANK $NPROC_PER_NODE $MASTER_ADDR $MASTER_PORT | $*"; ${ACT:-true}',
}
SLURM = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "a[1-2]"}


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """An environment with Slurm's programs and tessera replaced by ones that say how they were called."""
    for name, text in STUBS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **SLURM}


def slurm(cwd: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    script = ["bash", str(EXAMPLES / "slurm.sh"), *more]
    return subprocess.run(script, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def tasks(out: str) -> list[tuple[dict[str, str], list[str]]]:
    """Variables and words of each task that ran."""
    names = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")
    lines = [line.partition(" | ") for line in out.splitlines() if " | " in line]
    return [(dict(zip(names, env.split(), strict=True)), shlex.split(words)) for env, _, words in lines]


def test_slurm_script_parses() -> None:
    assert subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sh")], capture_output=True, check=True).stderr == b""


def test_slurm_gives_every_machine_its_place(
    stubs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    done = slurm(tmp_path, "--max_steps", "7", **stubs)
    assert (done.returncode, done.stderr) == (0, "")
    found = tasks(done.stdout)
    runs = [resolve(words, env) for env, words in found]
    assert [run.parallel.node_rank for run in runs] == [0, 1]
    for run in runs:
        place = run.parallel
        assert (place.nnodes, place.nproc_per_node, place.master_addr, place.master_port) == (2, 4, "alpha", 21234)
        assert (run.train.max_steps, run.save.resume_from_checkpoint) == (7, None)


def test_slurm_resumes_fails_and_requeues(stubs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "output" / "slurm-job" / "v0-20260101-000000" / "checkpoint-5").mkdir(parents=True)
    done = slurm(tmp_path, **stubs)
    assert all(words[-2:] == ["--resume_from_checkpoint", "true"] for _, words in tasks(done.stdout))
    assert slurm(tmp_path, **stubs, ACT="exit 7").returncode == 7
    # Near the time limit the batch script gets USR1: the step is asked to stop and the job queues again.
    done = slurm(tmp_path, **stubs, ACT="eval kill -USR1 $(ps -o ppid= -p $PPID); sleep 3; exit 143")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "scontrol requeue 41234"), done.stderr


def test_kubernetes_manifest_runs_a_command_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load((EXAMPLES / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    master, worker = (job["spec"]["pytorchReplicaSpecs"][name] for name in ("Master", "Worker"))
    assert master["replicas"] == 1
    assert master["template"] == worker["template"]
    [container] = master["template"]["spec"]["containers"]
    assert container["name"] == "pytorch" and container["command"] == ["bash", "-c"]
    [script] = container["args"]
    shown = script.replace("exec tessera", "printf '%s\\n' $NNODES")  # assignments before exec are for the command
    assert subprocess.run(["bash", "-n", "-c", shown], check=False).returncode == 0

    [line] = [text for text in script.replace("\\\n", " ").splitlines() if "tessera" in text and "#" not in text]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    words = shlex.split(line.replace("$resume", "").replace("/data/", ""))
    given = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "tessera-sft-master-0", "MASTER_PORT": "23456"}
    env = {**given}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        env[name] = given[value[1:]] if value.startswith("$") else value
    assert words[:2] == ["exec", "tessera"]
    place = resolve(words[2:], env).parallel
    assert (place.nnodes, place.node_rank, place.nproc_per_node) == (2, 1, 8)
    assert (place.master_addr, place.master_port) == ("tessera-sft-master-0", 23456)
