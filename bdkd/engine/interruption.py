"""Interrupt the compilation of a step when a signal requests to stop.

A compilation takes minutes, and changes nothing that a checkpoint contains. All other work of a
step is finished first, because a step rarely takes more than a second.

The compilers are killed, so that the compilation fails. An exception in the signal's handler would
not do: some of torch's C++ code aborts the process if a function that it calls raises one.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

# After this time, the process ends without the compilation's failure: torch still traces, or waits
# for a process that was killed.
PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.2
# Processes that torch.compile starts. Workers that load images go on.
_COMPILERS = re.compile(
    r"(^|-)(cc1plus|[gc]\+\+|clang|collect2|ld|as|nvcc|ptxas|cicc|hipcc)(\+\+|[-.].*)?$"
)
_WORKER = b"_inductor/compile_worker"

_compilation: object | None = None  # the present one
_requested = False


class CompilationInterrupted(BaseException):
    """A signal came while torch compiled the step. As a ``BaseException`` it is not taken for an
    error of the compiler."""


def reset() -> None:
    """Forget an earlier request."""
    global _requested
    _requested = False


def request(number: int) -> None:
    """End the present compilation and prevent later ones. Call this in the handler of the signal
    with this number. If the compilation does not fail within ``PATIENCE_SECONDS``, the process
    ends with the exit code of the signal."""
    global _requested
    if _compilation is not None and not _requested:
        # Torch traces the backward pass in anomaly mode, which explains every exception.
        warnings.filterwarnings("ignore", "Error detected in", UserWarning)
        arguments = (_compilation, number)
        threading.Thread(target=_end_compilation, args=arguments, daemon=True).start()
    _requested = True


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Allow :func:`request` to end the compilation in this context.

    Raises:
        CompilationInterrupted: it failed after a request, or the request had come before.
    """
    global _compilation
    if _requested:
        raise CompilationInterrupted
    _compilation = object()
    try:
        yield
    except Exception as error:
        if _requested:
            raise CompilationInterrupted from error
        raise
    finally:
        _compilation = None


def _end_compilation(compilation: object, number: int) -> None:
    """Kill compilers until a compilation has failed. Run this in a thread. A later compilation of
    this process goes on."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if _compilation is not compilation:
            return
        _kill_compilers()
        time.sleep(_POLL_SECONDS)
    if _compilation is not compilation:
        return
    name = signal.Signals(number).name
    line = f"bdkd: {name} while compiling: stopped; --resume continues from the last checkpoint"
    print(line, file=sys.stderr, flush=True)
    os._exit(128 + number)


def _kill_compilers() -> None:
    """End the compilers and the compiling workers among the descendants of this process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):  # there is no /proc on macOS
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found, descendants = [os.getpid()], list[int]()
    while found:
        found = [child for parent in found for child in children.get(parent, [])]
        descendants += found
    for pid in reversed(descendants):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            name = os.path.basename(os.fsdecode(command.split(b"\0")[0]))
            if _WORKER in command or _COMPILERS.search(name):
                os.kill(pid, signal.SIGKILL)
