"""Data parallelism: several processes train one model, each on its columns of the batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import PeerError
from engine.launch import local_rank
from model import Hidden

# Timeout of collectives: rank 0 may evaluate or write meanwhile.
PATIENCE = timedelta(hours=1)


class Ranks:
    """The processes of a run and their collectives, which are no-ops for a single process.

    All processes draw the same random numbers, so that masks and windows are those of the whole
    batch, and compute on their own columns. Gradients are averaged over equal shares, so that the
    step is the same in all processes. Only rank 0, the leader, writes files.

    Args:
        rank: this process's number.
        size: number of processes.
        control: process group for CPU tensors; None: the default group.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, control: dist.ProcessGroup | None = None
    ) -> None:
        self.rank = rank
        self.size = size
        self.control = control

    @property
    def leader(self) -> bool:
        """True for rank 0, the process that writes."""
        return self.rank == 0

    def share(self, columns: int) -> slice:
        """This process's slice of the columns.

        Raises:
            ValueError: the columns cannot be shared equally.
        """
        if columns % self.size:
            raise ValueError(f"{columns} columns cannot be shared equally by {self.size} processes")
        width = columns // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def average(self, tensors: list[Tensor]) -> None:
        """All-reduce tensors of one device and dtype to their means, in place."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        with _peers_reported():
            dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def gather(self, columns: Tensor, dim: int) -> Tensor:
        """All-gather columns and concatenate them along dim."""
        if self.size == 1:
            return columns
        parts = [torch.empty_like(columns) for _ in range(self.size)]
        with _peers_reported():
            dist.all_gather(parts, columns.contiguous())
        return torch.cat(parts, dim)

    def largest(self, *values: int) -> list[int]:
        """All-reduce each value to its maximum over the processes."""
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.int64)
        with _peers_reported():
            dist.all_reduce(together, dist.ReduceOp.MAX, group=self.control)
        return [int(value) for value in together]

    def from_leader(self, value: float) -> float:
        """Broadcast the leader's value."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        with _peers_reported():
            dist.broadcast(shared, 0, group=self.control)
        return float(shared)

    def wait(self) -> None:
        """Synchronise all processes (a barrier)."""
        self.largest(0)

    def gather_hidden(self, hidden: Hidden) -> Hidden:
        """All-gather the states of the whole batch."""
        return [tuple(self.gather(part, 1) for part in state) for state in hidden]

    def share_hidden(self, hidden: Hidden) -> Hidden:
        """This process's part of the states of the whole batch."""
        return [tuple(part[:, self.share(part.size(1))] for part in state) for state in hidden]


@contextmanager
def launched_ranks(device: torch.device) -> Iterator[Ranks]:
    """Connect the processes that torchrun has started, by NCCL on GPUs and gloo on CPUs.

    Args:
        device: this process's device; if a GPU, torch's current one.
    """
    if local_rank() is None:
        yield Ranks()
        return
    size = int(os.environ["WORLD_SIZE"])
    gpu = device.type == "cuda"
    with _peers_reported():
        store, rank, _ = next(dist.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
        # torchrun keeps its store over a restart, with the addresses of the ended processes.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {start}", store)  # type: ignore[attr-defined]
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        control = dist.new_group(backend="gloo", timeout=PATIENCE) if gpu else None
    ranks = Ranks(dist.get_rank(), size, control)
    del control
    try:
        yield ranks
        ranks.wait()  # a process that exits early would break connections that others still use
    finally:
        ranks.control = None
        with suppress(RuntimeError):  # another process may have ended
            dist.destroy_process_group()


@contextmanager
def _peers_reported() -> Iterator[None]:
    """Turn torch's errors about other processes into a PeerError of one line."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        raise PeerError(f"another process of this run is gone: {reason}") from None
