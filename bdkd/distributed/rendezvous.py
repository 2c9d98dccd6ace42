"""The rendezvous of the ranks: read the launcher's variables, open the store, wait for all ranks.

A rank that cannot reach the others fails within ``distributed.timeout`` with a message of one line.
The rendezvous of torch takes up to three times as long and prints a stack trace for each attempt.
"""

import contextlib
import datetime
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch.distributed as dist

from bdkd.errors import RunError, first_line, reason_of

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.1
_ANSWER_SECONDS = 2.0  # time for a store to answer after the connection


class JoinError(RunError):
    """This rank cannot join the others. It must report this itself, because the others cannot."""


class Launch(NamedTuple):
    """The values of the launcher's environment variables."""

    rank: int
    world_size: int
    host: str  # of rank 0, or of torchrun's agent
    port: int

    def describe(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"


def is_launched() -> bool:
    """Return whether a launcher such as torchrun has assigned a rank to this process."""
    return all(key in os.environ for key in _VARIABLES)


def read_launch() -> Launch:
    """Return the values of the launcher's environment variables. Raise ``JoinError`` if one is
    invalid."""
    world_size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0, world_size - 1, f" (WORLD_SIZE is {world_size})")
    if "LOCAL_RANK" in os.environ:
        _number("LOCAL_RANK", 0)
    port = _number("MASTER_PORT", 1, 65535) if world_size > 1 else 0
    return Launch(rank, world_size, os.environ["MASTER_ADDR"], port)


def _number(name: str, low: int, high: int | None = None, why: str = "") -> int:
    text = os.environ[name]
    if (
        text.isascii()
        and text.isdigit()
        and low <= int(text) <= (math.inf if high is None else high)
    ):
        return int(text)
    needed = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise JoinError(
        f"{name} must be a whole number {needed}{why}, got {text!r}: start the ranks with "
        f"torchrun, or set {', '.join(_VARIABLES)} for each of them"
    )


def open_store(launch: Launch, seconds: float) -> dist.Store:
    """Return the store that the ranks share.

    Each attempt of a launch uses separate keys, because a restart hangs or fails if it reads the
    addresses of an earlier attempt (pytorch#135712).

    Args:
        seconds: time limit.

    Raises:
        JoinError: the store cannot be reached within this time, or rank 0 cannot open it.
    """
    deadline = time.monotonic() + seconds
    serves = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        _check_port(launch)
    else:
        _wait_for_server(launch, seconds)
    # Rank 0 runs the server itself, so it does not need a route to its public address.
    host = "127.0.0.1" if serves else launch.host
    left = max(1.0, deadline - time.monotonic())
    try:
        with _without_torch_messages():
            store = _connect(host, launch.port, launch.world_size, serves, left)
    except (RuntimeError, TimeoutError) as error:
        raise _unreachable(launch, first_line(error), seconds) from error
    store.set_timeout(datetime.timedelta(seconds=seconds))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # If the number of machines changes, torchrun restarts the ranks without increasing this count.
    return dist.PrefixStore(f"bdkd/{attempt}/{launch.world_size}", store)


def _connect(host: str, port: int, world_size: int, serves: bool, seconds: float) -> dist.TCPStore:
    """Return a store.

    If another program answers at this port, torch waits forever. Therefore another thread connects,
    and this thread waits with a timeout. Ctrl-C then works too.
    """
    results: list[dist.TCPStore | RuntimeError] = []

    def connect() -> None:
        try:
            results.append(
                dist.TCPStore(
                    host, port, world_size, is_master=serves, wait_for_workers=False,
                    timeout=datetime.timedelta(seconds=seconds),
                )
            )  # fmt: skip
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds + _ANSWER_SECONDS)
    if not results:
        raise TimeoutError("the program at this port is not a torch store")
    if isinstance(results[0], RuntimeError):
        raise results[0]
    return results[0]


def wait_for_ranks(store: dist.Store, launch: Launch, seconds: float) -> None:
    """Wait until all ranks have called this function.

    Args:
        seconds: time limit.

    Raises:
        JoinError: ranks are missing after this time, or the store cannot be reached.
    """
    deadline = time.monotonic() + seconds
    try:
        store.set(f"host/{launch.rank}", socket.gethostname())
        store.add("joined", 1)
        while store.add("joined", 0) < launch.world_size:
            if time.monotonic() > deadline:
                ranks = range(launch.world_size)
                missing = [str(r) for r in ranks if not store.check([f"host/{r}"])]
                shown = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
                raise JoinError(
                    f"{launch.describe()} waited {seconds:g} s (distributed.timeout) for rank "
                    f"{shown}: start every rank with this MASTER_ADDR ({launch.host}) and "
                    f"MASTER_PORT ({launch.port}), or start them with torchrun"
                )
            time.sleep(_POLL_SECONDS)
    except RuntimeError as error:
        raise _unreachable(launch, first_line(error), seconds) from error


def _check_port(launch: Launch) -> None:
    """Raise ``JoinError`` if rank 0 cannot open the port on this machine."""
    try:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", launch.port))
    except OSError as error:
        raise JoinError(
            f"{launch.describe()} cannot open port {launch.port} (MASTER_PORT): {error.strerror}; "
            "choose another port for all ranks, or end the program that uses it"
        ) from error


def _wait_for_server(launch: Launch, seconds: float) -> None:
    """Wait until the host name can be resolved and a program listens at the address."""
    deadline = time.monotonic() + seconds
    while True:
        left = max(0.1, deadline - time.monotonic())
        try:
            socket.create_connection((launch.host, launch.port), timeout=left).close()
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: not a name
            if time.monotonic() + _POLL_SECONDS > deadline:
                reason = reason_of(error)
                raise _unreachable(launch, reason, seconds) from error
        time.sleep(_POLL_SECONDS)


def _unreachable(launch: Launch, reason: str, seconds: float) -> JoinError:
    return JoinError(
        f"{launch.describe()} cannot reach the others at {launch.host}:{launch.port} within "
        f"{seconds:g} s (distributed.timeout): {reason}; start rank 0 on that machine, and check "
        "MASTER_ADDR, MASTER_PORT and the network between the machines"
    )


@contextlib.contextmanager
def _without_torch_messages() -> Iterator[None]:
    """Discard the output of C++ code on standard error. The exceptions contain the same reason."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
