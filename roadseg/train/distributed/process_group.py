"""The ranks of a training and their collectives: sums, broadcasts, gathers.

Every collective runs inside `answered`, so that a dead peer is the same error everywhere.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from roadseg.errors import Interrupted, PeerLost
from roadseg.train.distributed.environment import cluster_from_environment
from roadseg.train.distributed.run_store import RunStore

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # of one collective: while rank 0 saves, draws or compiles the others wait in the next
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
REPORTED_WITHIN_S = 5.0  # how long a rank that lost another waits for its reason


@contextmanager
def answered() -> Iterator[None]:
    """Around collectives: an error of the connection becomes PeerLost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:  # gloo has no class of its own; NCCL's derive from it
        raise PeerLost(
            f"another rank no longer answers ({_plain(e)})",
            todo="check its output; run again to go on after the last checkpoint",
        ) from e


def _plain(error: Exception) -> str:
    """The first line of gloo's or NCCL's message, without the place in their source, up to the peer's address."""
    text = re.sub(r"^\[[^]]*\.(cc|cpp|h):\d+\] *", "", str(error).splitlines()[0])
    return re.sub(r"(\]:\d+)\b.*", r"\1", text)


@dataclass(frozen=True)
class Ranks:
    """One of `world` processes that train together; alone by default."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    on_this_machine: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            with answered():
                dist.all_reduce(tensor)
        return tensor

    def summed(self, own: Tensor) -> Tensor:
        """The sum over all ranks as a new tensor; its gradient is passed on to this rank's own."""
        return own if self.world == 1 else self.sum_(own.detach().clone()) + (own - own.detach())

    def share_of(self, whole: Tensor) -> Tensor:
        """This rank's share of a loss that every rank computes; the gradient is that of the whole loss."""
        return whole if self.world == 1 else whole.detach() / self.world + (whole - whole.detach())

    def gather_rows(self, own_KN: Tensor) -> Tensor:
        """[ceil(K / ranks), ranks x N]: some of the rows for this rank, with all ranks' columns in their order.

        Every rank passes the same number of rows (padded with zeros to a multiple of the ranks) and of columns.
        """
        if self.world == 1:
            return own_KN
        padded = F.pad(own_KN, (0, 0, 0, -len(own_KN) % self.world))
        return self._exchanged(padded.unflatten(0, (self.world, -1))).transpose(0, 1).flatten(1)

    def scatter_columns(self, whole_SM: Tensor, rows: int) -> Tensor:
        """[rows, N]: the inverse of `gather_rows`."""
        if self.world == 1:
            return whole_SM
        return self._exchanged(whole_SM.unflatten(1, (self.world, -1)).transpose(0, 1)).flatten(0, 1)[:rows]

    def _exchanged(self, parts: Tensor) -> Tensor:
        """Part r of every rank, for rank r."""
        parts = parts.contiguous()
        got = torch.empty_like(parts)
        with answered():
            dist.all_to_all_single(got, parts)
        return got

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum every .grad over all ranks, in place, and `loss` (float32 []), whose sum is returned.

        All in one flat float32 message, in the order of `parameters`, which is the same on every rank.
        """
        if self.world == 1:
            return loss
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum_(torch.cat([g.float().reshape(-1) for g in (*gradients, loss)]))
        *parts, total = flat.split([*(g.numel() for g in gradients), 1])
        torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])
        return total.view(()).clone()  # a view would keep the whole flat tensor alive

    def same_weights(self, module: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0, in place."""
        if self.world > 1:
            with answered(), torch.no_grad():
                for tensor in (*module.parameters(), *module.buffers()):
                    whole = tensor.contiguous()  # collectives need contiguous memory; channels-last tensors are copied
                    dist.broadcast(whole, 0)
                    tensor.copy_(whole)

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        with answered():
            dist.broadcast_object_list(box, 0)
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        with answered():
            dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world > 1:
            with answered():
                dist.barrier()


ALONE = Ranks()


def ranks_from_environment() -> Ranks:
    """This process among those that torchrun started."""
    c = cluster_from_environment()
    return Ranks(c.rank, c.world, c.local_rank, c.local_world)


@contextmanager
def joined(ranks: Ranks, device: torch.device, run: str = "ranks") -> Iterator[None]:
    """Inside, the ranks are connected: by NCCL on CUDA, else by gloo. run: name of this training, equal on all ranks.

    They begin together. What one rank raises is recorded for the others; a rank that only notices the silence of
    another raises PeerFailed if that one recorded why, or PeerLost if it was killed.
    """
    if ranks.world == 1:
        yield
        return
    cluster = cluster_from_environment()
    store = RunStore(cluster, run)
    store.barrier("ready")
    _connect(store, device)
    try:
        yield
    except PeerLost:
        _abort(device)
        store.raise_failure(within_s=REPORTED_WITHIN_S)
        raise
    except BaseException as e:
        _abort(device)  # first: the others may be in a collective, and notice nothing before it breaks
        if not isinstance(e, Interrupted):
            store.fail(e)
        raise
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.destroy_process_group()


def _connect(store: RunStore, device: torch.device) -> None:
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost", "::1"):
        # Otherwise they look up this host's name, which without a network may have no answer.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
    cuda = device.type == "cuda"
    with answered():
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", store.store),  # type: ignore[attr-defined]
            rank=store.cluster.rank,
            world_size=store.cluster.world,
            timeout=TIMEOUT,
            device_id=device if cuda else None,
        )


def _abort(device: torch.device) -> None:
    """Leave the group without waiting for the others, which may be gone: NCCL would wait for them."""
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if dist.is_initialized() and device.type == "cuda" and abort:
        abort()
    elif dist.is_initialized() and device.type != "cuda":
        dist.destroy_process_group()
