"""The exact state of training, saved so that a resumed run cannot be told from an uninterrupted one.

Four things decide what the next step does, and all four are stored:

    parameters   the float32 masters of whatever is trained (the model files may hold them rounded to bfloat16)
    optimiser    every state tensor, by parameter name
    data         a *global* cursor: epoch and step in the epoch; the order itself is a function of the seed
    randomness   the generator state of every rank (dropout draws from it)

Tensors go through ``torch.distributed.checkpoint``, which writes each rank's shards in parallel and can read them
into another number of ranks; the cursor and the counters are JSON in ``trainer_state.json``.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tessera.checkpoint.background import HostCopies
from tessera.config.errors import UserError
from tessera.parallel import fsdp
from tessera.parallel.mesh import Mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STATE_DIR = "state"


def _rng_path(directory: Path, rank: int) -> Path:
    return directory / f"rng-{rank}.pt"


def _tensors(model: nn.Module, optimizer_state: dict[str, Tensor]) -> dict[str, Any]:
    masters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"model": masters, "optimizer": optimizer_state}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What decides the next step, on this rank: live tensors, or copies of them."""

    tensors: dict[str, Any]
    generators: dict[str, Tensor]
    rank: int
    alone: bool

    @classmethod
    def of(
        cls, model: nn.Module, optimizer_state: dict[str, Tensor], mesh: Mesh, copies: HostCopies | None = None
    ) -> Snapshot:
        """The state as it is now; it stays so if there are ``copies`` to hold it."""
        tensors = _tensors(model, optimizer_state)
        if copies is not None:
            tensors = {
                part: {
                    name: fsdp.like(copies.copy(f"{part}.{name}", fsdp.local(tensor, mesh).detach()), tensor, mesh)
                    for name, tensor in held.items()
                }
                for part, held in tensors.items()
            }
        return cls(tensors, _generators(mesh), mesh.rank, mesh.grid is None)

    def write(self, checkpoint: Path, group: ProcessGroup | None = None) -> None:
        """Write it below ``checkpoint``, together with all ranks (of ``group``). OSError if the disk refuses."""
        import torch.distributed.checkpoint as dcp

        directory = checkpoint / STATE_DIR
        directory.mkdir(exist_ok=True)
        writer = dcp.FileSystemWriter(directory, single_file_per_rank=True, sync_files=False)
        try:
            torch.save(self.generators, _rng_path(directory, self.rank))
            with _quiet():
                dcp.save(self.tensors, storage_writer=writer, process_group=group, no_dist=self.alone)
        except dcp.api.CheckpointException as error:
            refusals = [refused for cause, _ in error.failures.values() if (refused := _refusal(cause)) is not None]
            if not refusals:
                raise
            raise refusals[0] from error
        except RuntimeError as error:
            refused = _refusal(error)
            if refused is None:
                raise
            raise refused from error


def _refusal(error: BaseException) -> OSError | None:
    """The disk's refusal behind an error of torch's archive writer; None if it is another error.

    The writer notices a failed write only by the position it finds itself at, and says so in a RuntimeError. The
    OSError is then the context, or lost if the error came here from another rank.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    torn = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return OSError(errno.EIO, "the disk took only a part of a file (is it full?)") if torn else None


def load_tensors(checkpoint: Path, model: nn.Module, optimizer_state: dict[str, Tensor], mesh: Mesh) -> None:
    """Read what :meth:`Snapshot.write` wrote, in place, into any number of ranks.

    ``optimizer_state`` must hold allocated tensors of the right shapes. UserError if the checkpoint was saved with
    ``--save_only_model true`` or trains other parameters.
    """
    import torch.distributed.checkpoint as dcp

    directory = checkpoint / STATE_DIR
    if not (directory / ".metadata").is_file():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: it holds no optimizer state (saved with --save_only_model true); "
            "start a new run from it with --model instead"
        )
    wanted = _tensors(model, optimizer_state)
    reader = dcp.FileSystemReader(directory)
    stored = set(reader.read_metadata().state_dict_metadata)
    mine = {f"{part}.{name}" for part, tensors in wanted.items() for name in tensors}
    asked = set().union(*mesh.gather(mine))
    if stored != asked:
        odd = sorted(stored ^ asked)
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: it trains other parameters than these flags do "
            f"({len(odd)} differ, first {odd[0]}); resume with the flags of its args.json"
        )
    with _quiet():
        dcp.load(wanted, storage_reader=reader, no_dist=mesh.grid is None)
    rng = _rng_path(directory, mesh.rank)
    if rng.is_file():
        state = torch.load(rng, weights_only=True)
        torch.set_rng_state(state["cpu"])
        if mesh.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], mesh.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a single process is a single process, which ``no_dist`` has just said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _generators(mesh: Mesh) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(mesh.device)
    return state
