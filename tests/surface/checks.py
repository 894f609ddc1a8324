"""What a reader of the source may rely on, as functions from source text to complaints.

Each check takes a :class:`Module` and yields sentences ``file:line: what is wrong``. They are plain functions so that
``test_source.py`` can run them over the tree and, on a bad snippet each, show that they can fail.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MAX_FILE, MAX_FUNCTION, MAX_METHODS = 500, 60, 12
ENV_READERS = ("cli.py", "config/resolve.py", "parallel/mesh.py")
FunctionNode = (ast.FunctionDef, ast.AsyncFunctionDef)
Check = Callable[["Module"], Iterator[str]]


@dataclass(frozen=True)
class Module:
    """One source file; ``path`` is relative to the package, e.g. ``models/vlm.py``."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def room(self) -> str:
        return self.path.split("/")[0]

    def at(self, node: ast.AST, complaint: str) -> str:
        return f"{self.path}:{vars(node).get('lineno', 1)}: {complaint}"

    def of(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in self.nodes if isinstance(node, kinds))


def modules_of(package: Path) -> list[Module]:
    """Every source file of the package."""
    files = sorted(package.rglob("*.py"))
    return [Module(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")) for path in files]


def size_budgets(module: Module) -> Iterator[str]:
    """Files, functions and classes stay small enough to be read in one go."""
    lines = len(module.text.splitlines())
    if lines > MAX_FILE:
        yield f"{module.path}: {lines} lines, at most {MAX_FILE}"
    for node in module.nodes:
        if isinstance(node, FunctionNode):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield module.at(node, f"{node.name} has {length} lines, at most {MAX_FUNCTION}")
        if isinstance(node, ast.ClassDef):
            public = [item for item in node.body if isinstance(item, FunctionNode) and not item.name.startswith("_")]
            if len(public) > MAX_METHODS:
                yield module.at(node, f"{node.name} has {len(public)} public methods, at most {MAX_METHODS}")


def no_probing(module: Module) -> Iterator[str]:
    """No hasattr, no getattr with a literal name: types say what a thing has."""
    for call in module.of(ast.Call):
        assert isinstance(call, ast.Call)
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if name == "hasattr":
            yield module.at(call, "hasattr")
        literal = len(call.args) > 1 and isinstance(call.args[1], ast.Constant)
        if name in ("getattr", "setattr", "delattr") and literal:
            yield module.at(call, f"{name} with a literal name")


def no_swallowed_errors(module: Module) -> Iterator[str]:
    """No bare except; no handler or suppress() that lets any Exception vanish."""
    broad = ("Exception", "BaseException")
    for node in module.nodes:
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield module.at(node, "bare except")
            elif ast.unparse(node.type) in broad and not any(
                isinstance(n, ast.Raise) or (isinstance(n, ast.Name) and n.id == node.name) for n in ast.walk(node)
            ):
                yield module.at(node, f"except {ast.unparse(node.type)} that neither raises nor says what it was")
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            if any(ast.unparse(arg) in broad for arg in node.args):
                yield module.at(node, "suppress of every Exception")


def no_monkeypatching(module: Module) -> Iterator[str]:
    """Nothing is assigned to an attribute of an imported module or class."""
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in module.of(ast.Import, ast.ImportFrom)
        for alias in node.names  # type: ignore[attr-defined]
    }
    for node in module.nodes:
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = [inner for target in node.targets for inner in _flat(target)]
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        for target in targets:
            if isinstance(target, ast.Attribute) and _root(target) in imported:
                yield module.at(node, f"assignment to {ast.unparse(target)}, which is imported")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr") and node.args:
            if _root(node.args[0]) in imported:
                yield module.at(node, f"setattr on {ast.unparse(node.args[0])}, which is imported")


def no_module_state(module: Module) -> Iterator[str]:
    """No global statement, no empty container at module level waiting to be filled."""
    for node in module.of(ast.Global):
        yield module.at(node, "global statement")
    for node in module.tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            if ast.unparse(node.value) in ("[]", "{}", "set()", "dict()", "list()"):
                yield module.at(node, "an empty container at module level")


def no_host_sync(module: Module) -> Iterator[str]:
    """A model never asks the device a question: no .item(), no .tolist() in the code of a forward pass."""
    if module.room != "models" or module.path.endswith("geometry.py"):
        return
    classes = [node for node in module.of(ast.ClassDef) if "Module" in ast.unparse(node).split("\n")[0]]
    scopes: list[ast.AST] = list(classes) if "families" in module.path else [module.tree]
    for scope in scopes:
        for node in ast.walk(scope):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in ("item", "tolist") and not node.args:
                    yield module.at(node, f".{node.func.attr}() in a model")


def environment_stays_outside(module: Module) -> Iterator[str]:
    """Only the command line, its resolution and the mesh see the environment."""
    if module.path in ENV_READERS:
        return
    for node in module.nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv"):
            yield module.at(node, ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names} & {"environ", "getenv", "putenv"}
            if names:
                yield module.at(node, f"from os import {', '.join(sorted(names))}")


def no_process_groups(module: Module) -> Iterator[str]:
    """Models, data and objectives read as code of one device."""
    if module.room not in ("models", "data", "objectives", "config", "contract", "observe"):
        return
    for node in module.nodes:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        if any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in names):
            yield module.at(node, "torch.distributed")


def typed_and_documented(module: Module) -> Iterator[str]:
    """Modules, public classes and functions have docstrings; public functions and methods are fully typed."""
    if ast.get_docstring(module.tree) is None:
        yield f"{module.path}:1: no module docstring"
    future = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in module.tree.body)
    if not future and len(module.tree.body) > 1:
        yield f"{module.path}:1: no `from __future__ import annotations`"
    for node in module.tree.body:
        if isinstance(node, (*FunctionNode, ast.ClassDef)) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield module.at(node, f"{node.name} has no docstring")
            members = node.body if isinstance(node, ast.ClassDef) else [node]
            for item in members:
                if isinstance(item, FunctionNode) and not item.name.startswith("_") and not _typed(item):
                    yield module.at(item, f"{item.name} is not fully typed")


def family_names(stems: Iterable[str], allowed: Iterable[str] = ()) -> Check:
    """A check that no family's name appears outside ``models/families`` and Megatron's tables of names.

    ``config/scripts`` holds the names of other people's files, which are called after families. Names in the
    ``allowed`` words pass.
    """
    words = "".join(rf"(?!{re.escape(word)}\b)" for word in allowed)
    pattern = re.compile(words + "(" + "|".join(sorted(map(re.escape, stems))) + ")", re.IGNORECASE)

    def check(module: Module) -> Iterator[str]:
        if (
            module.path.startswith(("models/families/", "config/scripts/"))
            or module.path == "weights/megatron/towers.py"
        ):
            return
        for number, line in enumerate(module.text.splitlines(), 1):
            found = pattern.search(line)
            if found:
                yield f"{module.path}:{number}: family name {found[0]}"

    return check


def attributes_read(modules: Iterable[Module]) -> set[str]:
    """Every name that is read as an attribute, ``x.name``, anywhere in ``modules``."""
    return {node.attr for module in modules for node in module.nodes if isinstance(node, ast.Attribute)}


def _typed(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    args = function.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    if named and named[0].arg in ("self", "cls"):
        named = named[1:]
    every = [*named, *(arg for arg in (args.vararg, args.kwarg) if arg is not None)]
    return function.returns is not None and all(arg.annotation is not None for arg in every)


def _root(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _flat(target: ast.expr) -> list[ast.expr]:
    if isinstance(target, (ast.Tuple, ast.List)):
        return [inner for item in target.elts for inner in _flat(item)]
    return [target]
