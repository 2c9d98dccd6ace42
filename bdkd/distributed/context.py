"""The processes that train together, and the collectives that the trainer needs.

One process is one rank, and ``torchrun`` starts the ranks. A run with one rank uses the same code,
but each collective then returns its input.

There are two process groups. ``group`` transfers tensors, with NCCL on GPUs and gloo on CPUs.
``control`` transfers decisions of the hosts with gloo while the devices train.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bdkd._torch_compat import foreach_copy_
from bdkd.data import Shard
from bdkd.errors import Interrupted, RunError, UsageError, first_line

Value = TypeVar("Value")

# Messages of gloo and NCCL about a rank that ended or does not answer. gloo has no exception type.
_LOST = re.compile(
    r"gloo|NCCL|ncclComm|pair closure|Connection (closed|reset|refused)|Broken pipe|Timed out",
    re.IGNORECASE,
)
_REPORT_SECONDS = 5.0  # time that a rank waits for reports of the other ranks after losing one


class RankLostError(RunError):
    """Another rank ended or does not answer."""


class DistributedContext:
    """This process and the other processes that train with it.

    Attributes:
        rank: the number of this process, from 0.
        world_size: the number of processes.
        location: the current phase of this rank, such as ``"step 5"``. A message contains it if
            another rank does not answer.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        *,
        group: dist.ProcessGroup | None = None,
        control: dist.ProcessGroup | None = None,
        store: dist.Store | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.group, self.control, self.store, self.timeout = group, control, store, timeout
        self.location = "the start"
        self._pending: tuple[dist.Work, Tensor] | None = None

    @property
    def is_rank0(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one rank."""
        return self.world_size > 1

    @property
    def shard(self) -> Shard:
        """The part of each batch that this rank processes."""
        return Shard(self.rank, self.world_size)

    def all_reduce_sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks, without synchronizing with a GPU."""
        if self.is_distributed:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0, with one collective for each dtype."""
        if not self.is_distributed:
            return
        for group in by_dtype(tensors):
            flat = flatten(group)
            dist.broadcast(flat, group=self.group, group_src=0)
            copy_flat(group, flat)

    def broadcast_from_rank0(self, make: Callable[[], Value]) -> Value:
        """Call ``make`` on rank 0, and return its result on all ranks. If ``make`` raises an error,
        raise it on all ranks."""
        if not self.is_distributed:
            return make()
        answer: list[Any] = [None, None]
        if self.is_rank0:
            try:
                answer[0] = make()
            except (RunError, UsageError, Interrupted) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, group=self.control, group_src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def gather_objects(self, value: Value) -> list[Value] | None:
        """Return the values of all ranks in the order of the ranks. Only rank 0 gets them, other
        ranks get None."""
        if not self.is_distributed:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_rank0 else None
        dist.gather_object(value, values, group=self.control, group_dst=0)
        return values

    def async_all_reduce_max(self, *values: int) -> tuple[int, ...]:
        """Return the maximum over the ranks of each argument of the previous call.

        All ranks must call this once per step, with the same number of values. The hosts exchange
        the values during the next step, so the result is one step late, and the first result is
        zeros. With one rank, the method returns the values of this call.
        """
        if not self.is_distributed:
            return values
        result = self._wait_for_reduction() or (0,) * len(values)
        numbers = torch.tensor(values)
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.control, async_op=True)
        assert work is not None
        self._pending = work, numbers
        return result

    def _wait_for_reduction(self) -> tuple[int, ...] | None:
        if self._pending is None:
            return None
        (work, numbers), self._pending = self._pending, None
        work.wait()
        return tuple(numbers.tolist())

    def average_gradients(self, gradients: Iterable[Tensor]) -> None:
        """Replace gradients by their means over the ranks, after the backward pass.

        DDP averages gradients during the backward pass, but it requires that the same networks
        train in each step.
        """
        if not self.is_distributed:
            return
        for group in by_dtype(gradients):
            for bucket in _buckets(group):
                flat = flatten(bucket) / self.world_size
                dist.all_reduce(flat, group=self.group)
                copy_flat(bucket, flat)

    def is_rank_lost(self, error: BaseException) -> bool:
        """Return whether an error says that another rank ended or does not answer."""
        known = isinstance(error, dist.DistError)
        text = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
        return self.is_distributed and (known or text)

    def describe_missing_ranks(self) -> str:
        """Wait for reports of the other ranks, and return a line that names the silent ranks."""
        assert self.store is not None
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        deadline = time.monotonic() + _REPORT_SECONDS
        try:
            self.store.set(f"lost/{self.rank}", self.location)
            silent = others
            while silent and time.monotonic() < deadline:
                silent = [rank for rank in silent if not self.store.check([f"lost/{rank}"])]
                time.sleep(0.05)
            named = [f"{rank} on {self.store.get(f'host/{rank}').decode()}" for rank in silent]
        except (RuntimeError, dist.DistError) as error:  # torchrun or its machine ended
            return (
                f"rank {self.rank} lost the connection to the other ranks at {self.location}, and "
                "cannot reach torchrun's store to find out which ranks are left "
                f"({first_line(error)})"
            )
        who = "a network connection (all ranks still report)"
        if named:
            who = f"rank {', rank '.join(named)}"
        return (
            f"{who}: ended, or no answer for {self.timeout:g} s (distributed.timeout), while rank "
            f"{self.rank} was at {self.location}"
        )

    def close(self) -> None:
        """Finish the pending reduction, because the other ranks wait for it."""
        self._wait_for_reduction()


SINGLE_PROCESS = DistributedContext()


def is_sharded(network: nn.Module) -> bool:
    """Return whether the weights of a network are sharded across the ranks (FSDP). All ranks must
    then call the network together."""
    from torch.distributed.tensor import DTensor  # this import takes a second

    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by dtype."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _buckets(tensors: list[Tensor], limit: int = 2**25) -> Iterator[list[Tensor]]:
    """Split a list of tensors into lists of about 32 MiB, so that a flat copy needs little
    memory."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.nbytes
        if size >= limit:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def flatten(tensors: list[Tensor]) -> Tensor:
    """Concatenate tensors of one dtype into one flat tensor."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def copy_flat(tensors: list[Tensor], flat: Tensor) -> None:
    """Copy the elements of a flat tensor, as :func:`flatten` returns it, into the tensors."""
    pieces = flat.split([tensor.numel() for tensor in tensors])
    foreach_copy_(tensors, [p.view_as(t) for p, t in zip(pieces, tensors, strict=True)])
