"""The program as a user runs it: in this process where the command line is what matters, else in one of its own."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.cli import main

QUICK = ("--report_to", "none", "--torch_dtype", "float32", "--logging_steps", "1")
"""What every short run of a test wants."""


@dataclass(frozen=True)
class Done:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The ``error: ...`` line; there is exactly one and nothing that looks like a traceback."""
        assert "Traceback" not in self.out + self.err, self.err
        [line] = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """These variables for the block; afterwards everything is as before, whatever the program set."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def tessera(*words: str | Path, **variables: str) -> Done:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with environment(**variables), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def works(*words: str | Path, **variables: str) -> Done:
    """Run a command line that has to succeed."""
    done = tessera(*words, **variables)
    assert done.code == 0, done.err
    return done


def shell(text: str, cwd: Path, **variables: str) -> Done:
    """Run a shell script with ``tessera`` on its path, in a process of its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=cwd,
        env={**os.environ, "PATH": path, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def script(text: str, *more: str, **variables: str) -> Done:
    """Run the one command of a shell script in this process: its variables, its words, then ``more``."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    own: dict[str, str] = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        own[name] = value
    if words[0] == "nohup":
        words.pop(0)
    assert words.pop(0) == "tessera"
    return tessera(*words, *more, **own, **variables)


def run_dir(output: Path) -> Path:
    """The one run below ``output``."""
    [found] = output.glob("v*-*")
    return found


def checkpoint(output: Path) -> Path:
    """The newest checkpoint of the one run below ``output``."""
    return max(run_dir(output).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; empty if it is absent."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(output: Path) -> list[float]:
    """The training loss of every logged step of the one run below ``output``."""
    return [row["loss"] for row in rows_of(run_dir(output) / "logging.jsonl") if "loss" in row]
