"""An adapter's directory: what peft's files say, opened but not read.

``adapter_config.json`` says how the adapter was made, ``adapter_model.safetensors`` holds its tensors under names of
peft's own. A :class:`Stored` is one of those tensors before anything of it is read: its shape is known, and any region
of it can be asked for, so a rank that holds a slice of a parameter reads that slice. Experts' tensors are folded in the
files (see :mod:`tessera.adapt.experts`); those are unfolded whole, one at a time, and cut afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tessera.config.errors import UserError
from tessera.contract.shards import Part, whole

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_UNSUPPORTED = (
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its ``shape``, and ``read`` for the values of a region of it."""

    shape: tuple[int, ...]
    read: Callable[[Part], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """One that is in memory already."""
        return cls(tuple(tensor.shape), lambda part: tensor[part])

    def turned(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """This tensor after ``change``, which only moves numbers about."""
        shape = tuple(change(torch.empty(self.shape, device="meta")).shape)
        return Stored(shape, lambda part: change(self.read(whole(self.shape)))[part])


def open_tensors(directory: Path) -> dict[str, Stored]:
    """The tensors of an adapter by their names in the file; UserError if there is none."""
    if (directory / WEIGHTS_FILE).is_file():
        from safetensors import safe_open

        handle = safe_open(directory / WEIGHTS_FILE, framework="pt")
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        return {name: Stored(shape, partial(_read, handle, name, shape)) for name, shape in shapes.items()}
    old = directory / "adapter_model.bin"
    if old.is_file():
        tensors = torch.load(old, map_location="cpu", weights_only=True)
        return {name: Stored.of(tensor) for name, tensor in tensors.items()}
    raise UserError(f"--adapters {directory}: no {WEIGHTS_FILE} there; is the checkpoint complete?")


def _read(handle: Any, name: str, shape: tuple[int, ...], part: Part) -> Tensor:
    tensor = handle.get_tensor(name) if part == whole(shape) else handle.get_slice(name)[part]
    assert isinstance(tensor, Tensor)
    return tensor


def read_config(directory: Path, parameters: Collection[str]) -> LoraConfig:
    """What ``adapter_config.json`` says; UserError if it is of a kind that has no place here.

    ``parameters`` are those that may be adapted by name, rather than as the weight of a linear layer.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"--adapters {directory}: no {CONFIG_FILE} there; give the directory of a checkpoint or adapter"
        )
    fields = json.loads(path.read_text(encoding="utf-8"))
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise UserError(f"--adapters {directory}: peft_type {kind} is not supported; only LORA (LoRA, DoRA, rsLoRA) is")
    used = [name for name in _UNSUPPORTED if fields.get(name)]
    named = {name.rpartition(".")[2] for name in fields.get("target_parameters") or ()}
    if not named <= set(parameters):
        used.append("target_parameters")
    start = fields.get("init_lora_weights", True)
    if used or (isinstance(start, str) and start.split("_")[0] in ("pissa", "olora", "corda", "loftq", "lora")):
        what = used[0] if used else f"init_lora_weights={start}, which changes the base weights"
        raise UserError(f"--adapters {directory}: uses {what}; merge it with peft first and give the result as --model")
    from tessera.adapt.quant import peft_imports  # not above: what quantises asks what is adapted, which asks us

    with peft_imports(quantised=False):
        from peft import LoraConfig

        config = LoraConfig.from_pretrained(str(directory))
    assert isinstance(config, LoraConfig)
    return config
