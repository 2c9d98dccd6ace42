"""Start and end a rank: create process groups, redirect output, report failures, exit."""

import contextlib
import datetime
import hashlib
import io
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn

import torch
import torch.distributed as dist

from bdkd.distributed.context import SINGLE_PROCESS, DistributedContext, RankLostError
from bdkd.distributed.rendezvous import (
    JoinError,
    is_launched,
    open_store,
    read_launch,
    wait_for_ranks,
)
from bdkd.errors import Interrupted, RunError, UsageError, first_line
from bdkd.interrupts import exit_now

_own_files: list[IO[str]] = []  # the log file of this process, if its output is redirected
_terminals: list[IO[str]] = []  # the standard error of this process before the redirection
_stores: list[dist.Store] = []  # stores of the process groups that this process has joined
_SPEAK_SECONDS = 2.0  # time for rank 0 to print before another rank exits
_FIRST_SECONDS = 1.0  # time for rank 0 to print an error that all ranks have


@contextlib.contextmanager
def init_distributed(timeout: float, device: str) -> Iterator[DistributedContext]:
    """Join the ranks that ``torchrun`` started. Yield :data:`SINGLE_PROCESS` without ``torchrun``.

    Args:
        timeout: seconds that a rank waits for another rank before the run ends.
        device: ``device`` of the recipe. If it may be a GPU, NCCL is initialised.

    Raises:
        JoinError: an environment variable of the launcher is invalid, or the other ranks cannot be
            reached.
        RankLostError: another rank ended or does not answer.
    """
    launch = read_launch() if is_launched() else None
    if launch is None or launch.world_size == 1:
        yield SINGLE_PROCESS
        return
    rank, world_size = launch.rank, launch.world_size
    seconds = datetime.timedelta(seconds=timeout)
    gpu = device != "cpu" and torch.cuda.is_available()
    store = open_store(launch, timeout)
    wait_for_ranks(store, launch, timeout)
    try:
        # NCCL gets a longer timeout, because its watchdog ends the process without a message that
        # names the missing rank.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=store, rank=rank, world_size=world_size,
            timeout=seconds + datetime.timedelta(seconds=60 if gpu else 0),
        )  # fmt: skip
        control = dist.new_group(backend="gloo", timeout=seconds)
    except RuntimeError as error:
        raise JoinError(
            f"{launch.describe()} found the other ranks at {launch.host}:{launch.port}, but cannot "
            f"connect to them: {first_line(error)}; check the network between the machines"
        ) from error
    _stores.append(store)
    context = DistributedContext(
        rank, world_size, group=dist.group.WORLD, control=control, store=store, timeout=timeout
    )
    try:
        yield context
    except RuntimeError as error:
        if not context.is_rank_lost(error):
            raise
        raise RankLostError(
            f"{context.describe_missing_ranks()}; saved checkpoints are complete, continue with "
            "--resume"
        ) from error
    else:
        context.close()
        dist.destroy_process_group()  # not needed after a failure, which ends the process


def is_initialized() -> bool:
    """Return whether this process has joined other ranks. It must then end with
    :func:`exit_rank`."""
    return bool(_stores)


def exit_rank(code: int) -> NoReturn:
    """End the process of a rank.

    The normal exit of the interpreter is not safe. A gloo thread that releases the last reference
    to a tensor waits for the interpreter. If the interpreter ends in the meantime, the process
    aborts with ``terminate called without an active exception``. ``destroy_process_group`` may not
    end these threads, because they live as long as an object refers to their group.
    """
    exit_now(code)


def local_rank() -> int:
    """Return the number of this process on its machine. It uses the GPU with this number."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_launched() else 0


def launch_id() -> str | None:
    """Return an identifier of a ``torchrun`` call that stays the same when it restarts the ranks.
    Return None without ``torchrun``."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    # Without --rdzv-id, each launch has the ID "none". The parent process is torchrun's agent.
    return f"{socket.gethostname()}:{os.getppid()}" if run_id == "none" else run_id


@contextlib.contextmanager
def only_rank0_prints() -> Iterator[None]:
    """Discard the output of all ranks except rank 0 while they do the same work.

    A rank without output delays its exit, because torchrun ends rank 0 as soon as another rank
    exits.
    """
    if not is_launched() or os.environ["RANK"] == "0":
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


def redirect_output(folder: Path, rank: int) -> None:
    """Redirect the output of this process and its libraries to the file ``folder/rank-N.log``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / f"rank-{rank}.log", "a", buffering=1)  # noqa: SIM115 - stays open
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
    """Record an error in the file in which torchrun looks for the first failure.

    Rank 0 prints errors on the terminal. Other ranks write them to their log files, with the
    traceback. One rank of each machine prints a ``JoinError``.

    Returns:
        Whether the caller should print the error.
    """
    number = os.environ.get("LOCAL_RANK" if isinstance(error, JoinError) else "RANK", "0")
    first, failed = number == "0", not isinstance(error, Interrupted)
    if failed and _own_files:
        traceback.print_exception(error)
    if failed and "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        if isinstance(error, RunError | UsageError):  # users need only the line, no traceback
            error = error.with_traceback(None)
            error.__cause__, error.__suppress_context__ = None, True
        try:
            raise error
        except BaseException:
            get_error_handler().record_exception(error)
    if failed and isinstance(error, RunError | UsageError) and not isinstance(error, RankLostError):
        _print_on_terminal(error, first)
    if failed and not first:
        time.sleep(_SPEAK_SECONDS)  # torchrun ends rank 0 as soon as this rank exits
    return first or bool(_own_files)


def _print_on_terminal(error: Exception, first: bool) -> None:
    """Print an error of a rank other than 0 once, unless rank 0 prints the same error."""
    if not first:
        time.sleep(_FIRST_SECONDS)
    digest = hashlib.sha256(str(error).encode(errors="replace")).hexdigest()
    with contextlib.suppress(RuntimeError, dist.DistError, OSError):  # the store may have ended
        if all(store.add(f"said/{digest}", 1) == 1 for store in _stores):
            for terminal in _terminals:
                print(f"bdkd: rank {os.environ['RANK']}: {error}", file=terminal)
