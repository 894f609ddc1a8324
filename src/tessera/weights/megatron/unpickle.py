"""Pickles that are read as data: nothing in them is ever called.

A Megatron checkpoint pickles tensors and plain containers, and beside them the training's arguments, enums, optimizer
and random states: objects of classes that need not be installed here, and code that need not be run. So every class of
the modules in :data:`KNOWN` becomes an :class:`Inert` object, which keeps what it was made of and does nothing; tensors
become :class:`~tessera.weights.megatron.stored.Stored` places in the file; plain containers are what they are. Anything
else (``os.system``, ``builtins.eval``) is refused by its name::

    model_optim_rng.pt: asks for posix.system, which is neither a tensor nor a plain container; do not trust this file
"""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tessera.config.errors import UserError

KNOWN = (
    "megatron",
    "torch",
    "numpy",
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "argparse",
    "enum",
    "pathlib",
    "signal",
    "datetime",
    "modelopt",
    "omegaconf",
    "swift",
    "mcore_bridge",
    "megatron_patch",
)
"""Packages whose objects are kept, inert."""

HARMLESS = frozenset(
    {
        ("_codecs", "encode"),
        ("_io", "BytesIO"),
        ("io", "BytesIO"),
        ("collections", "defaultdict"),
        ("collections", "deque"),
        ("copyreg", "_reconstructor"),
        ("functools", "partial"),
        ("types", "SimpleNamespace"),
        ("builtins", "getattr"),
    }
)
"""Functions of the standard library that honest checkpoints name (enums, as getattr); they, too, are only kept."""

PLAIN: Mapping[str, Callable[..., Any]] = {"set": set, "frozenset": frozenset, "complex": complex, "slice": slice}
"""What of the builtins is made for real: containers that cannot be larger than the file they come from."""

BUILTINS = frozenset(("bool", "bytearray", "bytes", "dict", "float", "int", "list", "object", "range", "str", "tuple"))
"""Further builtins that may be named."""


class Inert:
    """An object of a class that is not there: its name and what it was made of."""

    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        made = super().__new__(cls)
        made.args, made.state, made.items = args, None, []
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Keep an element of what was a list."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """Keep elements of what was a list."""
        self.items.extend(values)

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert(*args)

    def field(self, name: str, default: Any = None) -> Any:
        """An attribute it was pickled with."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    @classmethod
    def named(cls, module: str, name: str) -> type[Inert]:
        """A class of its own for ``module.name``."""
        return type(name.rpartition(".")[2], (cls,), {"__module__": f"inert.{module}"})


class Restricted(pickle.Unpickler):
    """Reads ``data`` of the file called ``origin``; ``known`` replaces globals by (module, name)."""

    def __init__(
        self,
        data: bytes,
        origin: str,
        known: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._origin, self._known, self._persistent = origin, known, persistent
        self._classes: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What stands for ``module.name`` here; UserError for what no checkpoint has a reason to name."""
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # their old names
        key = (module, name)
        if key in self._known:
            return self._known[key]
        if key == ("collections", "OrderedDict"):
            return OrderedDict
        if key == ("argparse", "Namespace"):
            return Namespace
        if key == ("torch", "Size"):
            return tuple
        if module == "builtins" and name in PLAIN:
            return PLAIN[name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        kept = key in HARMLESS or (module == "builtins" and name in BUILTINS) or module.split(".")[0] in KNOWN
        if not kept:
            raise UserError(
                f"{self._origin}: asks for {module}.{name}, which is neither a tensor nor a plain container; "
                "do not trust this file"
            )
        if key not in self._classes:
            self._classes[key] = Inert.named(module, name)
        return self._classes[key]

    def persistent_load(self, key: Any) -> Any:
        """What the pickle refers to outside itself: the storage of a tensor."""
        if self._persistent is None:
            raise UserError(f"{self._origin}: refers to tensors where there are none; copy the checkpoint again")
        return self._persistent(key)


def loads(
    data: bytes,
    origin: str,
    known: Mapping[tuple[str, str], Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The object in ``data``, read from the file called ``origin`` in errors; UserError if it is not to be read."""
    try:
        return Restricted(data, origin, known or {}, persistent).load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{origin}: not a readable pickle ({error}); copy the checkpoint again") from error
