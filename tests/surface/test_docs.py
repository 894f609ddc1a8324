"""Commands in the documentation are commands: each one is parsed here against directories made up for it.

A ``yaml`` block whose first line is ``# name.yaml`` is the file of that name. What the commands do when they really
run is the matter of ``tests/e2e``.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from tessera.config.errors import UserError
from tessera.config.resolve import resolve

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@dataclass(frozen=True)
class Command:
    """One command of a page: its variables and its words."""

    page: str
    env: dict[str, str]
    words: list[str]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: str, text: str) -> list[Command]:
    """The commands of the ``bash`` blocks of a page, continued lines joined, comments dropped."""
    found = []
    for block in blocks(text, "(?:bash|shell)"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            env = {}
            while words and re.match(r"[A-Z_]+=", words[0]):
                name, _, value = words.pop(0).partition("=")
                env[name] = value
            if words:
                found.append(Command(page, env, words))
    return found


def places(words: list[str]) -> list[tuple[str, str]]:
    """Each value with the flag it belongs to; of ``--adapters name=path`` the path."""
    found, flag = [], ""
    for word in words:
        if word.startswith("--"):
            flag = word
        elif flag:
            found.append((flag, word.partition("=")[2] or word if flag == "--adapters" else word))
    return found


def check(command: Command, files: dict[str, str], root: Path) -> None:
    """Parse one command in ``root``, with the files and directories that it names made up."""
    for name, text in files.items():
        (root / name).write_text(text)
    program, *words = command.words
    if program == "make":
        assert set(words) <= TARGETS, command
    if program != "tessera":
        return
    for flag, value in places(words):
        if flag in ("--model", "--adapters"):
            (root / value).mkdir(parents=True, exist_ok=True)
            (root / "base").mkdir(exist_ok=True)
            (root / value / "args.json").write_text('{"dataset": ["train.jsonl"]}')
            (root / value / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
        if flag in ("--mcore_model", "--mcore_adapters"):
            (root / value).mkdir(parents=True, exist_ok=True)
            (root / value / "latest_checkpointed_iteration.txt").write_text("1")
            (root / value / "args.json").write_text('{"load": "base"}')
    if words[-1] not in ("--help", "--version"):
        resolve(words, command.env)


ALL = [command for page in PAGES for command in commands(page.name, page.read_text())]


@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.page}: {' '.join(command.words)[:60]}")
def test_command(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / command.page) if command.page != "README.md" else ROOT / command.page
    yaml = {block.split("\n")[0].removeprefix("# "): block for block in blocks(page.read_text(), "yaml")}
    check(command, yaml, tmp_path)


def test_pages_have_commands_and_wrong_ones_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(ALL) > 10
    good, bad, make = commands(
        "x.md", "```bash\nA=1 tessera sft --model a/b \\\n  --dataset c  # why\ntessera sft --modle a\nmake dmeo\n```\n"
    )
    assert good == Command("x.md", {"A": "1"}, ["tessera", "sft", "--model", "a/b", "--dataset", "c"])
    check(good, {}, tmp_path)
    with pytest.raises(UserError):
        check(bad, {}, tmp_path)
    with pytest.raises(AssertionError):
        check(make, {}, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
