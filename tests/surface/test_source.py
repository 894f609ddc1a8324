"""The house rules, over the whole tree; and on a bad snippet each, so that no rule is silently blind."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import tessera
from tessera.config.run import ROOM_CLASSES
from tests.surface import checks
from tests.surface.checks import Check, Module

PACKAGE = Path(tessera.__file__).parent
MODULES = checks.modules_of(PACKAGE)
RULES: tuple[Check, ...] = (
    checks.size_budgets,
    checks.no_probing,
    checks.no_swallowed_errors,
    checks.no_monkeypatching,
    checks.no_module_state,
    checks.no_host_sync,
    checks.environment_stays_outside,
    checks.no_process_groups,
    checks.typed_and_documented,
)


def complaints(check: Check, modules: list[Module]) -> list[str]:
    return [sentence for module in modules for sentence in check(module)]


def test_the_tree_is_seen() -> None:
    assert {"cli.py", "config/flags.py"} <= {module.path for module in MODULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Check) -> None:
    found = complaints(rule, MODULES)
    assert not found, "\n".join(["", *found])


def stems() -> set[str]:
    """``abc2_5_vl`` and ``abc3`` are both found by their stem ``abc``."""
    from tessera.models.families import FAMILIES

    return {found[0] for name in FAMILIES if (found := re.match(r"[a-z]+", name.lower()))}


def test_no_family_name_in_shared_rooms() -> None:
    # "llama3" is also what config files of every family call one way to stretch RoPE, "composite" an ordinary word,
    # "nvlm" a set of foreign scripts.
    found = complaints(checks.family_names(stems(), allowed=["llama3", "composite", "nvlm"]), MODULES)
    assert not found, "\n".join(["", *found])


def test_every_flag_is_used() -> None:
    """A field of a room that nobody reads is a flag that does nothing, silently."""
    read = checks.attributes_read(m for m in MODULES if m.room != "config" or m.path == "config/run.py")
    unused = [spec.name for kind in ROOM_CLASSES.values() for spec in fields(kind) if spec.name not in read]
    assert not unused


GOOD = '"""Doc."""\nfrom __future__ import annotations\n'
BAD: list[tuple[Check, str, str]] = [
    (checks.size_budgets, "a.py", "x = 1\n" * 501),
    (checks.size_budgets, "a.py", "def f():\n" + "    x = 1\n" * 60),
    (checks.size_budgets, "a.py", "class A:\n" + "".join(f"    def m{i}(self): ...\n" for i in range(13))),
    (checks.no_probing, "a.py", "hasattr(x, name)"),
    (checks.no_probing, "a.py", "getattr(x, 'name', None)"),
    (checks.no_swallowed_errors, "a.py", "try:\n    f()\nexcept:\n    raise\n"),
    (checks.no_swallowed_errors, "a.py", "try:\n    f()\nexcept Exception:\n    pass\n"),
    (checks.no_swallowed_errors, "a.py", "try:\n    f()\nexcept Exception as e:\n    pass\n"),
    (checks.no_swallowed_errors, "a.py", "with contextlib.suppress(Exception):\n    f()\n"),
    (checks.no_monkeypatching, "a.py", "import torch\ntorch.nn.Linear.forward = f\n"),
    (checks.no_monkeypatching, "a.py", "def g():\n    from torch.nn import Linear as L\n    a, L.forward = 1, f\n"),
    (checks.no_monkeypatching, "a.py", "from torch import nn\nsetattr(nn.Linear, name, f)\n"),
    (checks.no_module_state, "a.py", "def f():\n    global x\n    x = 1\n"),
    (checks.no_module_state, "a.py", "CACHE: dict[str, int] = {}\n"),
    (checks.no_host_sync, "models/vlm.py", "def forward(x):\n    return x.sum().item()\n"),
    (checks.no_host_sync, "models/families/a.py", "class A(nn.Module):\n    def f(self, x):\n        x.tolist()\n"),
    (checks.environment_stays_outside, "train/a.py", "import os\nos.environ['A']\n"),
    (checks.environment_stays_outside, "train/a.py", "from os import getenv\n"),
    (checks.no_process_groups, "data/a.py", "import torch.distributed as dist\n"),
    (checks.no_process_groups, "objectives/a.py", "from torch import distributed\n"),
    (checks.no_process_groups, "models/a.py", "import torch\ntorch.distributed.barrier()\n"),
    (checks.typed_and_documented, "a.py", "from __future__ import annotations\nx = 1\n"),
    (checks.typed_and_documented, "a.py", '"""Doc."""\nx = 1\n'),
    (checks.typed_and_documented, "a.py", GOOD + "def f() -> None: ...\n"),
    (checks.typed_and_documented, "a.py", GOOD + 'def f(x) -> None:\n    """Doc."""\n'),
    (checks.typed_and_documented, "a.py", GOOD + 'class A:\n    """Doc."""\n    def f(self): ...\n'),
    (checks.family_names(["llama"], ["llama3"]), "data/a.py", "llama3_2\n"),
    (checks.family_names(["qwen"]), "data/a.py", "if model_type == 'Qwen3_vl': ...\n"),
]


@pytest.mark.parametrize(("rule", "path", "snippet"), BAD)
def test_rules_can_fail(rule: Check, path: str, snippet: str) -> None:
    assert list(rule(Module(path, snippet)))


@pytest.mark.parametrize(
    ("rule", "path", "snippet"),
    [
        (checks.no_probing, "a.py", "getattr(x, name)"),
        (checks.no_swallowed_errors, "a.py", "try:\n    f()\nexcept Exception as e:\n    raise UserError() from e\n"),
        (checks.no_swallowed_errors, "a.py", "try:\n    f()\nexcept Exception as e:\n    tell(e)\n"),
        (checks.no_monkeypatching, "a.py", "import torch\nself.x = torch.zeros(1)\nx.data = 1\n"),
        (checks.no_module_state, "a.py", "TABLE = {'a': 1}\n"),
        (checks.no_host_sync, "models/geometry.py", "x.tolist()\n"),
        (checks.no_host_sync, "models/families/a.py", "def geometry(x):\n    return x.tolist()\n"),
        (checks.environment_stays_outside, "parallel/mesh.py", "import os\nos.environ['RANK']\n"),
        (checks.no_process_groups, "parallel/a.py", "import torch.distributed as dist\n"),
        (checks.typed_and_documented, "a.py", GOOD + "def _f(x): ...\n"),
        (checks.family_names(["qwen"]), "models/families/a.py", "qwen\n"),
        (checks.family_names(["llama"], ["llama3"]), "models/a.py", "llama3\n"),
    ],
)
def test_rules_can_pass(rule: Check, path: str, snippet: str) -> None:
    assert not list(rule(Module(path, snippet)))


def test_unused_flags_would_be_found() -> None:
    assert checks.attributes_read([Module("a.py", "run.train.seed")]) == {"train", "seed"}
