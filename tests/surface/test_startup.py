"""What a start does not pay for: transformers' modelling code takes longer to import than all of tessera and torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import make_model_dir
from tests.toys import chats, make_images, write_rows

SCRIPT = """
import sys
from tessera.cli import main
code = main(sys.argv[1:])
print("imported:", *sorted(name for name in sys.modules if name.startswith("transformers.") and "modeling" in name))
sys.exit(code)
"""


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v_moe", "internvl", "composite"])
def test_training_does_not_import_transformers_models(tmp_path: Path, name: str) -> None:
    model = make_model_dir(tmp_path / "model", name)
    make_images(tmp_path / "images", [(64, 48)])
    rows = write_rows(tmp_path / "rows.jsonl", chats(4, [str(path) for path in (tmp_path / "images").iterdir()]))
    words = ["sft", "--model", model, "--dataset", rows, "--train_type", "full", "--max_steps", "1"]
    words += ["--report_to", "none", "--torch_dtype", "float32", "--output_dir", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].strip() == "imported:"


def test_the_recipe_imports_nothing_of_other_layouts() -> None:
    # DTensor brings sympy and takes a second, which a dry run or an export of one process has no use for;
    # Megatron's formats are for those who have such a checkpoint, or ask for one
    code = "import sys, tessera.recipes.supervised; print(*(name for name in sys.argv[1:] if name in sys.modules))"
    slow = ["torch.distributed.tensor", "torch.distributed.pipelining", "torch.distributed.checkpoint", "sympy"]
    slow.append("tessera.weights.megatron")
    out = subprocess.run([sys.executable, "-c", code, *slow], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []
