"""Composing holds a few rows at a time: the peak of a process of its own, over what it had before it began."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

from tessera.models.families import family_of
from tessera.models.families.pairing import built
from tessera.weights.hf import shapes_of
from tests.parity import reference as ref
from tests.toys import make_tokenizer_dir

SCRIPT = """
import sys
from tessera.cli import main
from tessera.recipes import compose, vocabulary
from tessera.models.families import composite
import tokenizers

def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
code = main(["compose", *sys.argv[1:]])
print("peak:", peak() - before)
sys.exit(code)
"""


def make(path: Path, name: str, **text: Any) -> tuple[int, int]:
    """A model directory whose weights are a hole in a file; returns bytes of all tensors and of the largest."""
    config = ref.config_of(name)
    config.get("text_config", config).update(text)
    make_tokenizer_dir(path, name)
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text("{}")
    weightmap = family_of(config).weightmap(config, ())
    header, start, largest = {}, 0, 0
    for ours, shape in shapes_of(built(config)).items():
        for piece in weightmap.pieces(ours, shape):
            size = 2 * prod(piece.shape(shape))
            fields = {"dtype": "BF16", "shape": piece.shape(shape), "data_offsets": [start, start + size]}
            header[piece.disk], start, largest = fields, start + size, max(largest, size)
    data = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + start)
    return start, largest


def test_memory_is_less_than_three_times_the_largest_tensor(tmp_path: Path) -> None:
    seeing = make(tmp_path / "vlm", "qwen2_5_vl")
    speaking = make(tmp_path / "llm", "qwen3", vocab_size=32768, hidden_size=1024, intermediate_size=4096, head_dim=64)
    words = ["--vision", tmp_path / "vlm", "--llm", tmp_path / "llm", "--output_dir", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, words)], capture_output=True, text=True, check=True)
    peak = int(done.stdout.splitlines()[-1].split()[1])
    total, largest = seeing[0] + speaking[0], max(seeing[1], speaking[1])
    # About 90 MB are what a look at two models brings (their modules, tokenizers, templates), whatever their size.
    assert total > 3 * largest
    assert peak < 2.5 * largest, f"{peak / 1e6:.0f} MB; tensors of {largest / 1e6:.0f} MB, {total / 1e6:.0f} MB in all"
