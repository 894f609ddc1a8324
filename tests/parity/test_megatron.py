"""Against megatron-core itself, where it is installed: its model on our files, our model on its files."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tessera.weights.megatron.checkpoint import LEGACY, TORCH_DIST
from tessera.weights.megatron.options import Options
from tessera.weights.megatron.ranks import Ranks
from tests.megatron import Model

pytest.importorskip("megatron.core", reason="megatron-core is not installed; pip install megatron-core --no-deps")

JOB = Path(__file__).with_name("megatron_job.py")


def run(root: Path, model: Model, answers: Path, out: Path, ranks: Ranks) -> list[float]:
    """The largest difference of every rank's logits."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    world = max(ranks.tp, ranks.ep)
    command = [sys.executable, JOB, root, model.path / "config.json", answers, out, ranks.tp, ranks.ep]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    jobs = [
        subprocess.Popen(
            list(map(str, command)), env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    texts = [job.communicate()[0] for job in jobs]
    assert not any(job.returncode for job in jobs), texts[0][-2000:] + texts[-1][-2000:]
    return [float(re.findall(r"largest difference (\S+)", text)[0]) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TORCH_DIST, LEGACY])
@pytest.mark.parametrize(
    ("name", "ranks"),
    [("llama", Ranks()), ("qwen2", Ranks(tp=2)), ("qwen3", Ranks(tp=2)), ("qwen3_moe", Ranks(ep=2))],
)
def test_megatron_computes_the_same(tmp_path: Path, name: str, ranks: Ranks, kind: str) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}} if name == "llama" else {}
    model = Model(tmp_path / "hf", name, dtype=torch.float32, **rope)
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    tokens = torch.randint(0, 512, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save((tokens, reference(tokens).logits[0]), tmp_path / "answers.pt")
    options = Options(dialect="lm", format=kind, ranks=ranks, local=True)
    root = model.to_megatron(tmp_path / "ours", options)
    differences = run(root, model, tmp_path / "answers.pt", tmp_path / "theirs", ranks)
    assert max(differences) < 1e-5, differences
    for side in ("config.json", "hf_layout.json"):
        (tmp_path / "theirs" / side).write_bytes((root / side).read_bytes())
    model.same_weights(model.to_hf(tmp_path / "theirs", tmp_path / "back"))
