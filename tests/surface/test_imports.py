"""The dependency direction of the house, checked by import-linter on the contracts in ``pyproject.toml``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings its backport
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).parents[2]
LINT = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]


def test_contracts_hold() -> None:
    done = subprocess.run([*LINT, "--config", "pyproject.toml"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_contracts_have_no_exceptions() -> None:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert len(rules["contracts"]) >= 3
    for contract in rules["contracts"]:
        assert not {"ignore_imports", "exhaustive_ignores"} & set(contract), contract["name"]


@pytest.mark.timeout(60)
def test_contracts_can_fail(tmp_path: Path) -> None:
    """The same layers refuse a package in which the bottom imports the top, or a neighbour its neighbour."""
    text = (ROOT / "pyproject.toml").read_text()
    layers = next(c for c in tomllib.loads(text)["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    house = tmp_path / "house"
    for name in (part.strip() for line in layers["layers"] for part in line.split("|")):
        (house / name).mkdir(parents=True)
        (house / name / "__init__.py").touch()
    (house / "__init__.py").touch()
    lines = "\n".join(f"    {line}" for line in layers["layers"])
    (tmp_path / "rules.ini").write_text(
        "[importlinter]\nroot_package = house\n[importlinter:contract:1]\nname = layers\ntype = layers\n"
        f"containers = house\nlayers =\n{lines}\n"
    )

    def lint() -> int:
        command = [*LINT, "--config", "rules.ini"]
        env = {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True).returncode

    assert lint() == 0
    for room, other in (("config", "train"), ("data", "weights"), ("observe", "cli")):
        (house / room / "__init__.py").write_text(f"import house.{other}\n")
        assert lint() == 1, f"{room} may import {other}"
        (house / room / "__init__.py").write_text("")


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys; from tessera.cli import main; main(['sft', '--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'tokenizers', 'PIL'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
