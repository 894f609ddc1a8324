"""Tiny models as Megatron checkpoints, and their tensors as any reader of the format would see them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.contract.model import Family
from tessera.contract.shards import whole
from tessera.models.families import family_of
from tessera.weights import hf
from tessera.weights.hf import Checkpoint
from tessera.weights.megatron import convert
from tessera.weights.megatron.checkpoint import locate
from tessera.weights.megatron.options import Options
from tessera.weights.megatron.table import Row
from tessera.weights.megatron.tiling import Tile
from tessera.weights.megatron.towers import dialects_of, make_table
from tests.models import make_model_dir


class Model:
    """A tiny model directory: its config, family and tensors (by our names)."""

    def __init__(self, path: Path, name: str, *, dtype: torch.dtype = torch.bfloat16, **text: Any) -> None:
        self.path = make_model_dir(path, name, dtype=dtype, **text)
        self.reload()
        self._empty()

    def _empty(self) -> None:
        """Zeros for heads that are there to be shared out only: what released checkpoints have in them."""
        spare = [
            tile
            for dialect in dialects_of(self.family)
            for row in make_table(self.family, self.config, dialect).rows.values()
            for tile in beyond(row)
        ]
        if spare:
            values = self.ours
            for tile in spare:
                values[tile.source][tile.inside] = 0
            hf.save(values, self.path, self.family.weightmap(self.config, []))
            self.reload()

    def reload(self) -> None:
        """Read the directory again after it was changed by hand."""
        self.config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        self.family: Family = family_of(self.config)
        self.checkpoint = Checkpoint(self.path)
        self.source = convert.from_hf(self.checkpoint, self.family, self.config)

    @property
    def ours(self) -> dict[str, Tensor]:
        """Every tensor by its name in memory."""
        from tessera.weights.megatron.stored import Reader

        with Reader(self.source.stored) as reader:
            return {name: reader.read(tiling) for name, tiling in self.source.tilings.items()}

    def to_megatron(self, root: Path, options: Options) -> Path:
        """The model as a Megatron checkpoint, with what lies beside the weights."""
        root.mkdir()
        convert.to_megatron(self.source, self.family, self.config, root, options)
        convert.write_side_files(self.checkpoint, root)
        return root

    def to_hf(self, root: Path, out: Path, dialect: str | None = None) -> Path:
        """A Megatron checkpoint of this model as safetensors again."""
        out.mkdir()
        found = locate(root).assembled(self.family, self.config, dialect)
        convert.to_hf(convert.from_megatron(found), self.family, self.config, out, layout=root)
        return out

    def same_weights(self, other: Path) -> None:
        """Assert that the safetensors files in ``other`` are those of this model, byte for byte."""
        names = {file.name for file in self.path.glob("*.safetensors*")}
        assert {file.name for file in other.glob("*.safetensors*")} == names
        for name in names:
            assert (self.path / name).read_bytes() == (other / name).read_bytes(), name


def beyond(row: Row) -> list[Tile]:
    """The parts of ours that are no heads that count."""
    axis, part = row.split.axis, list(whole(row.shape))
    if axis is None or not row.split.least or row.shape[axis] <= row.split.least:
        return []
    part[axis] = slice(row.split.least, row.shape[axis])
    return list(row.tiling.within(tuple(part)))


def dcp_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a ``torch_dist`` directory, read by PyTorch's own distributed checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    described = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    held = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(held, checkpoint_id=str(folder), no_dist=True)
    return held


def rank_tensors(root: Path, *rank: int) -> Mapping[str, Tensor]:
    """The tensors of one rank of a checkpoint below ``root``, read by ``torch.load``."""
    folder = "_".join([f"mp_rank_{rank[0]:02d}", *(f"{part:03d}" for part in rank[1:])])
    file = locate(root).path / folder / "model_optim_rng.pt"
    model: dict[str, Any] = torch.load(file, weights_only=False)["model"]
    return {name: value for name, value in model.items() if isinstance(value, Tensor)}
