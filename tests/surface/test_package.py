"""The package as a thing to install: its metadata, its commands, and nothing of the machine it was written on."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import tessera

ROOT = Path(__file__).parents[2]
# Joined here so that this file does not hold what it looks for.
MACHINE = re.compile("|".join("/" + name + "/" for name in ("root", "work", "Users", r"home/\w+")))
REGISTRY = re.compile("|".join((r"pypi\." + "org", "python" + "hosted", "registry" + r"\.npmjs")))


def tracked() -> Iterator[tuple[Path, str]]:
    """Every text file of the repository, whether it is committed yet or not."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if names.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, names.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix in ("", ".py", ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ".jsonl"):
            yield path, path.read_text(encoding="utf-8", errors="replace")


def test_no_machine_paths_and_no_registry_hosts() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path, text in tracked()
        for number, line in enumerate(text.splitlines(), 1)
        for match in (*MACHINE.finditer(line), *REGISTRY.finditer(line))
    ]
    assert not found, "\n".join(["", *found])


def test_the_search_for_paths_can_fail() -> None:
    assert MACHINE.search("x = '/" + "home/someone/x'")
    assert MACHINE.search("/" + "root/x")
    assert REGISTRY.search("https://pypi." + "org/simple")
    assert not MACHINE.search("/path/to/model")


def test_metadata() -> None:
    found = metadata.metadata("tessera")
    assert found["Version"] == tessera.__version__
    assert found["Requires-Python"] == ">=3.10"
    required = metadata.requires("tessera") or []
    core = {re.split(r"[<>=; \[]", line)[0] for line in required if "extra ==" not in line}
    assert core == {
        "torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "jinja2", "pillow", "pyyaml", "tqdm",
    }  # fmt: skip
    assert set(found.get_all("Provides-Extra") or []) >= {"fast", "data", "tracking", "plots", "qlora", "hub", "demo"}
    entry = [point.value for point in metadata.entry_points(group="console_scripts") if point.name == "tessera"]
    assert entry == ["tessera.cli:main"]


@pytest.mark.parametrize("command", [["-m", "tessera"]])
def test_program_answers(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"tessera {tessera.__version__}\n")


def test_ci_runs_the_documented_command_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "exec make test"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert "make test" in (ROOT / "README.md").read_text()
