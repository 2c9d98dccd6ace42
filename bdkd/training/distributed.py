"""The ranks of a run: who they are, what they agree on, and who is missing when one is lost.

One process is one rank; ``torchrun`` starts them. A run of one rank goes the same way through the
trainer: each method here is then the identity and costs nothing.

Two process groups: ``group`` carries tensors (NCCL for those on a GPU, gloo for those on the CPU),
``control`` carries what the hosts agree on (gloo), beside the training.
"""

import atexit
import contextlib
import datetime
import hashlib
import io
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bdkd.data import Shard
from bdkd.errors import Interrupted, RunError, UsageError

Value = TypeVar("Value")

# What gloo and NCCL say when a rank is gone or silent; gloo has no exception type of its own.
_LOST = re.compile(
    r"gloo|NCCL|ncclComm|pair closure|Connection (closed|reset|refused)|Broken pipe|Timed out",
    re.IGNORECASE,
)
_own_files: list[IO[str]] = []  # what this process prints into, if not on the terminal
_terminals: list[IO[str]] = []  # and where it printed before
_stores: list[dist.Store] = []  # of the ranks that this process has joined
_SPEAK_SECONDS = 2.0  # in which the first rank says what it has to say
_FIRST_SECONDS = 1.0  # in which it says what others would say too
_REPORT_SECONDS = 5.0  # how long a rank that lost another waits for the others to say the same


class Lost(RunError):
    """Another rank ended or does not answer."""


class Ranks:
    """This process among those that train together.

    Attributes:
        rank, world: this process and how many there are.
        place: where this rank is in its run; named when another does not answer.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        *,
        group: dist.ProcessGroup | None = None,
        control: dist.ProcessGroup | None = None,
        store: dist.Store | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.rank, self.world = rank, world
        self.group, self.control, self.store, self.timeout = group, control, store, timeout
        self.place = "the start"
        self._asked: tuple[dist.Work, Tensor] | None = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def shard(self) -> Shard:
        """The images that this rank takes."""
        return Shard(self.rank, self.world)

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks. No host sync on a GPU."""
        if not self.alone:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors by those of the first rank, one message a type."""
        if self.alone:
            return
        for group in _by_type(tensors):
            flat = flatten(group)
            dist.broadcast(flat, group=self.group, group_src=0)
            copy_flat(group, flat)

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What ``make`` returns or raises on the first rank, on all of them."""
        if self.alone:
            return make()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = make()
            except (RunError, UsageError, Interrupted) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, group=self.control, group_src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def gather(self, value: Value) -> list[Value] | None:
        """Every rank's value in order of rank, on the first rank; None elsewhere."""
        if self.alone:
            return [value]
        values: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(value, values, group=self.control, group_dst=0)
        return values

    def agree(self, *asked: int) -> tuple[int, ...]:
        """The largest of what any rank asked for, the same on all ranks, to be called by all of
        them once a step with as many numbers. The hosts exchange it beside the next step, so with
        several ranks the answer is to the step before; at first it is zeros."""
        if self.alone:
            return asked
        answer = self._await_agreement() or (0,) * len(asked)
        numbers = torch.tensor(asked)
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.control, async_op=True)
        assert work is not None
        self._asked = work, numbers
        return answer

    def _await_agreement(self) -> tuple[int, ...] | None:
        if self._asked is None:
            return None
        (work, numbers), self._asked = self._asked, None
        work.wait()
        return tuple(numbers.tolist())

    def average_gradients(self, gradients: Iterable[Tensor]) -> None:
        """Mean over the ranks, in place: what DDP does during the backward pass, done after it, for
        a method that learns only from the logits which networks train."""
        if self.alone:
            return
        for group in _by_type(gradients):
            for part in _buckets(group):
                flat = flatten(part) / self.world
                dist.all_reduce(flat, group=self.group)
                copy_flat(part, flat)

    def lost(self, error: BaseException) -> bool:
        """Whether an error says that another rank ended or does not answer."""
        known = isinstance(error, dist.DistError)
        text = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
        return not self.alone and (known or text)

    def who_is_missing(self) -> str:
        """One line with the ranks that do not report here, and the place. Waits for the reports."""
        assert self.store is not None
        others = [rank for rank in range(self.world) if rank != self.rank]
        deadline = time.monotonic() + _REPORT_SECONDS
        try:
            self.store.set(f"lost/{self.rank}", self.place)
            silent = others
            while silent and time.monotonic() < deadline:
                silent = [rank for rank in silent if not self.store.check([f"lost/{rank}"])]
                time.sleep(0.05)
            named = [f"{rank} on {self.store.get(f'host/{rank}').decode()}" for rank in silent]
        except (RuntimeError, dist.DistError) as error:  # torchrun itself, or its machine, is gone
            return (
                f"rank {self.rank} lost the others at {self.place}, and cannot ask torchrun's "
                f"store who is left ({_first_line(error)})"
            )
        who = f"rank {', rank '.join(named)}" if named else "no single rank is silent: the network"
        return (
            f"{who}: ended, or no answer for {self.timeout:g} s (distributed.timeout), while rank "
            f"{self.rank} was at {self.place}"
        )

    def close(self) -> None:
        """Answer what the other ranks still ask."""
        self._await_agreement()


ALONE = Ranks()


@contextlib.contextmanager
def join_ranks(timeout: float, device: str) -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started, or this process alone where it started none.

    Args:
        timeout: seconds that a rank waits for another before it gives the run up.
        device: the recipe's ``device``; NCCL is at hand where it may be a GPU.

    Raises:
        RunError: the other ranks cannot be reached.
    """
    world = int(os.environ.get("WORLD_SIZE", 1)) if launched() else 1
    if world == 1:
        yield ALONE
        return
    rank, seconds = int(os.environ["RANK"]), datetime.timedelta(seconds=timeout)
    gpu = device != "cpu" and torch.cuda.is_available()
    try:
        store = _store(rank, world, seconds)
        # NCCL waits longer: its watchdog ends the process without a word on who is missing.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=store, rank=rank, world_size=world,
            timeout=seconds + datetime.timedelta(seconds=60 if gpu else 0),
        )  # fmt: skip
        control = dist.new_group(backend="gloo", timeout=seconds)
    except RuntimeError as error:
        raise RunError(
            f"rank {rank} of {world} on {socket.gethostname()} cannot reach the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {_first_line(error)}"
        ) from error
    store.set(f"host/{rank}", socket.gethostname())
    _stores.append(store)
    ranks = Ranks(
        rank, world, group=dist.group.WORLD, control=control, store=store, timeout=timeout
    )
    try:
        yield ranks
    except RuntimeError as error:
        if not ranks.lost(error):
            raise
        raise Lost(
            f"{ranks.who_is_missing()}; what was saved is whole, continue with --resume"
        ) from error
    else:
        ranks.close()
        dist.destroy_process_group()  # after a failure the process ends with it


def joined() -> bool:
    """Whether this process has been a rank among others: then it ends by :func:`end_process`."""
    return bool(_stores)


def end_process(code: int) -> NoReturn:
    """End a rank, its ``atexit`` functions run and what it printed written.

    Not by the interpreter's own end: a thread of gloo that lets go of the last hold on a tensor
    waits for the interpreter, and if that ends meanwhile the process dies of it (``terminate called
    without an active exception``, SIGABRT) although its work is done. Those threads live as long
    as anything refers to their group, so ``destroy_process_group`` need not end them."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader may be gone
            stream.flush()
    os._exit(code)


def launched() -> bool:
    """Whether a launcher such as torchrun has said who this process is."""
    return all(key in os.environ for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def local_rank() -> int:
    """This process among those of its machine: which GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0


def launch_identity() -> str | None:
    """What one call of ``torchrun`` has in common with its own restarts and with no other call;
    None where there is no torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    # without --rdzv-id every launch is called "none"; its agent is the parent of its ranks
    return f"{socket.gethostname()}:{os.getppid()}" if run_id == "none" else run_id


@contextlib.contextmanager
def first_rank_speaks() -> Iterator[None]:
    """While all ranks do the same, one of them says what is wrong with it: the others are silent,
    and wait with their exit, upon which torchrun would end the one that speaks."""
    if not launched() or os.environ["RANK"] == "0":
        yield
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except SystemExit:
        time.sleep(_SPEAK_SECONDS)
        raise
    except UsageError as error:
        time.sleep(_SPEAK_SECONDS)
        raise SystemExit(2) from error


def speak_into(folder: Path, rank: int) -> None:
    """Append what this process prints from now on, its libraries included, to a file of its own."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / f"rank-{rank}.log", "a", buffering=1)  # noqa: SIM115 - till the end
    except OSError as error:
        raise RunError(
            f"cannot write the log of rank {rank} in {folder}: {error.strerror or error}"
        ) from error
    _own_files.append(file)
    _terminals.append(os.fdopen(os.dup(2), "w", buffering=1))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    now = datetime.datetime.now().isoformat(" ", "seconds")
    file.write(f"--- rank {rank} on {socket.gethostname()}, {now}, restart {attempt}\n")
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(file.fileno(), descriptor)


def report_failure(error: BaseException) -> bool:
    """Leave the error where torchrun looks for the first that failed. Whether this rank should say
    it: the first rank on the terminal, another in its own file, where it leaves the trace too."""
    first, failed = os.environ.get("RANK", "0") == "0", not isinstance(error, Interrupted)
    if failed and _own_files:
        traceback.print_exception(error)
    if failed and "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        if isinstance(error, RunError | UsageError):  # one line says it all
            error = error.with_traceback(None)
            error.__cause__, error.__suppress_context__ = None, True
        try:
            raise error
        except BaseException:
            get_error_handler().record_exception(error)
    if failed and isinstance(error, RunError | UsageError) and not isinstance(error, Lost):
        _tell(error, first)
    if failed and not first:
        time.sleep(_SPEAK_SECONDS)  # upon this rank's exit torchrun ends the first one too
    return first or bool(_own_files)


def _tell(error: Exception, first: bool) -> None:
    """On the terminal, what another rank than the first has met: once, and not what the first says
    there itself."""
    if not first:
        time.sleep(_FIRST_SECONDS)
    said = hashlib.sha256(str(error).encode(errors="replace")).hexdigest()
    with contextlib.suppress(RuntimeError, dist.DistError, OSError):  # who hears it may be gone
        if all(store.add(f"said/{said}", 1) == 1 for store in _stores):
            for terminal in _terminals:
                print(f"bdkd: rank {os.environ['RANK']}: {error}", file=terminal)


def _store(rank: int, world: int, timeout: datetime.timedelta) -> dist.Store:
    """A store that no earlier attempt of this launch has written to: over stale addresses a restart
    hangs or fails (pytorch#135712)."""
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world,
        is_master=rank == 0 and not agents, timeout=timeout, wait_for_workers=False,
    )  # fmt: skip
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # A machine that comes or goes restarts the ranks too, and leaves that count as it is.
    return dist.PrefixStore(f"bdkd/{attempt}/{world}", store)


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    return list(by_type.values())


def _buckets(tensors: list[Tensor], limit: int = 2**25) -> Iterator[list[Tensor]]:
    """Tensors in parts of some 32 MiB, so that their flat copy is no second set of gradients."""
    part: list[Tensor] = []
    size = 0
    for tensor in tensors:
        part.append(tensor)
        size += tensor.nbytes
        if size >= limit:
            yield part
            part, size = [], 0
    if part:
        yield part


def flatten(tensors: list[Tensor]) -> Tensor:
    """One flat tensor of tensors of one type."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def copy_flat(tensors: list[Tensor], flat: Tensor) -> None:
    """The reverse of :func:`flatten`, into the given tensors."""
    pieces = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(pieces, tensors, strict=True)])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
