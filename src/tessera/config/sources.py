"""Which directory is meant: ``--model``, ``--load``, ``--mcore_model``, ``--mcore_adapters``.

Two kinds of directory hold a model. A *Hugging Face* directory has ``config.json`` and safetensors; adapters lie in
PEFT's format. A *Megatron* (mcore) directory has numbered iterations and a file that names the newest::

    DIR/latest_checkpointed_iteration.txt     "500" or "release"
    DIR/iter_0000500/  DIR/release/           metadata.json and *.distcp, or mp_rank_00/model_optim_rng.pt

``--load`` takes either; if ``--model`` is given as well, that one only says where config and tokenizer lie
(``--hf_dir``), as in Megatron-SWIFT. Commands of that tool name the directory of a *run*, too: here a run holds
``checkpoint-N`` directories that need no conversion, and the newest of them is meant. So
``export --mcore_adapters RUN --to_hf true`` merges the adapter of such a run, and a note says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tessera.config.flags import TRAIN
from tessera.config.parse import json_object, usage_error

TRACKER = "latest_checkpointed_iteration.txt"


def is_mcore(path: Path) -> bool:
    """Whether ``path`` is a Megatron checkpoint: the directory above its iterations, or an iteration itself."""
    if not path.is_dir():
        return False
    return (path / TRACKER).is_file() or any(_is_iteration(place) for place in (path, *sorted(path.iterdir())))


def _is_iteration(path: Path) -> bool:
    if not (re.fullmatch(r"iter_\d+|release", path.name) and path.is_dir()):
        return False
    return (path / "metadata.json").is_file() or any(path.glob("mp_rank_*"))


def newest(path: Path) -> Path | None:
    """The model or adapter that ``path`` is, or the newest checkpoint of the run that it is; None if it is neither."""
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return path
    found = [place for place in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", place.name)]
    return max(found, key=lambda place: int(place.name.split("-")[1]), default=None)


class Sources:
    """Settles the flags of one command line about directories, in place.

    ``values`` holds the flags given so far and ``provenance`` where each came from; ``label`` says how the user
    spelled a flag, and remarks go to ``notes``.
    """

    def __init__(
        self, values: dict[str, Any], provenance: dict[str, str], label: Callable[[str], str], notes: list[str]
    ) -> None:
        self.values, self.provenance, self.label, self.notes = values, provenance, label, notes

    def settle(self, verb: str) -> None:
        """After this, ``model`` and ``adapters`` are what is read, unless ``export`` converts a Megatron checkpoint."""
        if verb == "export":
            self._export()
            return
        for name in ("load", "mcore_model") if verb in TRAIN else ("load",):
            if name in self.values:
                self._read(name)
        if verb in ("infer", "deploy") and "model" in self.values:
            self._newest_of_run()

    def _put(self, name: str, value: Any, origin: str) -> None:
        self.values[name], self.provenance[name] = value, self.provenance[origin]

    def _read(self, name: str) -> None:
        """``name`` is what is trained or run."""
        path = Path(self.values[name])
        if "model" in self.values and "hf_dir" not in self.values:
            self._put("hf_dir", self.values["model"], "model")
        found = None if is_mcore(path) else newest(path)
        if found is not None and (found / "adapter_config.json").is_file():
            self._put("adapters", (str(found),), name)
            self.values.pop("model", None)
        else:
            self._put("model", str(found or path), name)
        if found not in (None, path):
            self.notes.append(f"{self.label(name)} {path}: the newest checkpoint of this run is read, {found}")
        del self.values[name]

    def _newest_of_run(self) -> None:
        """``--model`` may be a run: its newest checkpoint, a model or an adapter, is what is used."""
        path = Path(self.values["model"])
        found = None if is_mcore(path) else newest(path)
        if found is None or found == path:
            return
        if (found / "adapter_config.json").is_file():
            self._put("adapters", (str(found), *self.values.get("adapters", ())), "model")
            del self.values["model"]
        else:
            self._put("model", str(found), "model")
        self.notes.append(f"{self.label('model')} {path}: the newest checkpoint of this run is read, {found}")

    def _export(self) -> None:
        values = self.values
        if "load" in values:
            self._put("mcore_model" if is_mcore(Path(values["load"])) else "model", values["load"], "load")
            del values["load"]
        if "mcore_model" in values and "model" in values and "hf_dir" not in values:
            self._put("hf_dir", values.pop("model"), "model")
        elif "model" in values and "mcore_model" not in values and is_mcore(Path(values["model"])):
            self._put("mcore_model", values.pop("model"), "model")
        for name in ("mcore_adapters", "mcore_model"):
            if name in values:
                self._converted(name)

    def _converted(self, name: str) -> None:
        """``name`` is to be converted, if it is a Megatron checkpoint; else it is exported as it is."""
        given = self.values[name]
        path = Path(given if isinstance(given, str) else given[0])
        if not path.is_dir():
            raise usage_error(f"{self.label(name)} {path}: no such directory")
        if is_mcore(path):
            if name == "mcore_adapters" and not {"mcore_model", "model"} & self.values.keys():
                self._base_of(path)
            return
        found = newest(path)
        if found is None:
            raise usage_error(
                f"{self.label(name)} {path}: neither a Megatron checkpoint (no {TRACKER}, no iter_N) nor a run or "
                "model directory"
            )
        if (found / "adapter_config.json").is_file():
            self._put("adapters", (str(found),), name)
            if "merge_lora" not in self.values:
                self._put("merge_lora", True, name)
        else:
            self._put("model", str(found), name)
        if not self.values.get("to_mcore", False):
            self._as_it_is(name, path, found)
        del self.values[name]

    def _as_it_is(self, name: str, path: Path, found: Path) -> None:
        untested = "; there is no conversion to test" if self.values.get("test_convert_precision") else ""
        self.notes.append(f"{self.label(name)} {path}: {found} is in Hugging Face format, not converted{untested}")
        for flag in ("to_hf", "test_convert_precision"):
            self.values.pop(flag, None)
        if "output_dir" not in self.values:
            self._put("output_dir", f"{str(path).rstrip('/')}-hf", name)

    def _base_of(self, adapter: Path) -> None:
        """The model that an adapter was trained on, from its args.json."""
        file = adapter / "args.json"
        stored = json_object(str(file), "") if file.is_file() else {}
        base = next((stored[key] for key in ("mcore_model", "load", "model") if stored.get(key)), None)
        if base is None:
            raise usage_error(
                f"{self.label('mcore_adapters')} {adapter}: no args.json names its base model; add --mcore_model DIR "
                "or --model DIR"
            )
        if not is_mcore(Path(base)):
            self.values["model"], self.provenance["model"] = str(base), "args.json"
            return
        self.values["mcore_model"], self.provenance["mcore_model"] = os.path.abspath(base), "args.json"
        if "hf_dir" not in self.values and stored.get("model") and not (Path(base) / "config.json").is_file():
            self.values["hf_dir"], self.provenance["hf_dir"] = str(stored["model"]), "args.json"
