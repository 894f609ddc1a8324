"""torch.save files: PyTorch reads ours, we read PyTorch's, and nothing in them is called."""

from __future__ import annotations

import argparse
import builtins
import collections
import os
import pickle
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.config.errors import UserError
from tessera.weights.megatron import archive
from tessera.weights.megatron.archive import Blank
from tessera.weights.megatron.stored import Reader, Stored
from tessera.weights.megatron.tiling import same
from tessera.weights.megatron.unpickle import Inert, loads


def read(stored: Stored) -> Tensor:
    with Reader({"x": stored}) as reader:
        return reader.read(same("x", stored.shape))


def written(path: Path, tensors: dict[str, Tensor], start: int = 0) -> int:
    """``tensors`` written by us, in pieces of a few bytes."""
    blanks = {name: Blank(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def payload(blank: Blank, offset: int) -> None:
        (name,) = [name for name, other in blanks.items() if other is blank]
        for piece in tensors[name].contiguous().reshape(-1).view(torch.uint8).split(7):
            offset += os.pwrite(descriptor, piece.numpy().data, offset)

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        return archive.save(descriptor, start, {"model": blanks, "iteration": 3, "args": None}, payload)
    finally:
        os.close(descriptor)


TENSORS = {
    "weight": torch.randn(3, 5).bfloat16(), "bias": torch.randn(7), "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 4), "ids": torch.arange(9), "mask": torch.tensor([True, False]),
    "double": torch.randn(2, 2, 2).double(),
}  # fmt: skip


@pytest.mark.parametrize("options", [{"weights_only": True}, {"weights_only": False}, {"mmap": True}])
def test_torch_reads_what_we_write(tmp_path: Path, options: dict[str, bool]) -> None:
    written(tmp_path / "x.pt", TENSORS)
    held = torch.load(tmp_path / "x.pt", **options)
    assert held["iteration"] == 3 and list(held["model"]) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(held["model"][name], tensor) and held["model"][name].dtype == tensor.dtype


def test_checksums_are_those_of_torch_and_data_is_aligned(tmp_path: Path) -> None:
    """Records of tensors have none, as after ``set_crc32_options(False)``; the others are right."""
    written(tmp_path / "x.pt", TENSORS)
    with zipfile.ZipFile(tmp_path / "x.pt") as found:
        for record in found.infolist():
            plain = "/data/" not in record.filename
            assert bool(record.CRC) == plain
            assert not plain or found.read(record)
    held = archive.load(tmp_path / "x.pt")["model"]
    assert all(stored.offset % 64 == 0 for stored in held.values())


def test_an_archive_may_begin_anywhere_in_a_file(tmp_path: Path) -> None:
    length = written(tmp_path / "x.pt", TENSORS, start=1001)
    held = archive.load(tmp_path / "x.pt", 1001, length)["model"]
    for name, tensor in TENSORS.items():
        assert torch.equal(read(held[name]), tensor)


def test_records_beyond_four_gigabytes_have_long_sizes(tmp_path: Path) -> None:
    """The table of records only: what a payload of 5 GB would need."""
    end = tmp_path / "end.zip"
    with end.open("wb") as stream:
        made = archive._Archive(stream.fileno(), 0, "archive")
        made._at = 5 * 2**30
        made._entries = [(b"archive/data/0", 0, 5 * 2**30 - 100, 1)]
        made.close()
    with zipfile.ZipFile(end) as found:
        (info,) = found.infolist()
    assert (info.file_size, info.header_offset) == (5 * 2**30 - 100, 0)


def test_we_read_what_torch_writes(tmp_path: Path) -> None:
    """Views of a shared storage, transposes and parameters, too."""
    base = torch.randn(6, 4)
    held = {"base": base, "rows": base[2:4], "turned": base.t(), "parameter": torch.nn.Parameter(base[1])}
    torch.save({"model": held}, tmp_path / "x.pt")
    found = archive.load(tmp_path / "x.pt")["model"]
    for name, tensor in held.items():
        assert torch.equal(read(found[name]), tensor), name


def test_plain_containers_and_arguments_come_back() -> None:
    value = {
        "args": argparse.Namespace(num_layers=2, dtype=torch.bfloat16, names=["a"], signal=signal.SIGTERM),
        "state": collections.OrderedDict(a=(1, 2.5, None, True, b"x")), "set": {1, 2}, "size": torch.Size([2, 3]),
    }  # fmt: skip
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        found = loads(pickle.dumps(value, protocol), "x.pt")
        assert (found["args"].num_layers, found["args"].dtype, found["args"].names) == (2, torch.bfloat16, ["a"])
        assert found["state"]["a"][:4] == (1, 2.5, None, True) and found["set"] == {1, 2} and found["size"] == (2, 3)
        signalled = found["args"].signal  # pickled by value, or by name in older Pythons
        assert isinstance(signalled, Inert) or issubclass(signalled, Inert)


class Calls:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "builtins.eval"),
        (exec, "builtins.exec"),
        (builtins.__import__, "builtins.__import__"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_by_name(tmp_path: Path, function: Any, name: str, protocol: int) -> None:
    trap = tmp_path / "trap"
    data = pickle.dumps({"x": Calls(function, f"open({str(trap)!r}, 'w')")}, protocol)
    with pytest.raises(UserError, match=f"model.pt: asks for .*{name}.* do not trust this file"):
        loads(data, "model.pt")
    assert not trap.exists()


def test_what_is_kept_inert_is_not_called_either(tmp_path: Path) -> None:
    """Functions of known packages are named by honest files; even those only leave a mark."""
    trap = tmp_path / "trap"
    found = loads(pickle.dumps({"x": Calls(torch.save, {}, str(trap)), "y": Calls(getattr, "a", "upper")}), "x.pt")
    assert isinstance(found["x"], Inert) and found["x"].args == ({}, str(trap))
    assert isinstance(found["y"], Inert) and not trap.exists()


def test_a_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(2)}, "rng_state": Calls(os.system, "true")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x.pt: asks for posix.system"):
        archive.load(tmp_path / "x.pt")


@pytest.mark.parametrize("keep", [0, 10, 500, -1, -100])
def test_a_file_cut_short_is_one_line(tmp_path: Path, keep: int) -> None:
    torch.save({"weight": torch.ones(200)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[:keep])
    with pytest.raises(UserError, match=r"x.pt: not a file that torch.save writes, or cut short") as caught:
        archive.load(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.pt: cannot be read \(No such file"):
        archive.load(tmp_path / "x.pt")
