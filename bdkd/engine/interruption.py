"""Interrupt the compilation of a step when a signal stops the run.

A compilation may take minutes and does not change the state that a checkpoint contains, so it is
interrupted. Other work of a step is finished first, because a step rarely takes more than a second.

To interrupt a compilation, this module kills the compilers, so that the compilation fails. The
signal handler cannot raise an exception instead, because some C++ code of torch aborts the process
if a Python function that it calls raises an exception.
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

# After this time, the process ends although the compilation has not failed. torch may still trace,
# or wait for a process that was killed.
PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.2
# Processes that torch.compile starts. Workers of a data loader do not match.
_COMPILERS = re.compile(
    r"(^|-)(cc1plus|[gc]\+\+|clang|collect2|ld|as|nvcc|ptxas|cicc|hipcc)(\+\+|[-.].*)?$"
)
_WORKER = b"_inductor/compile_worker"

_compilation: object | None = None  # the current compilation
_requested = False


class CompilationInterrupted(BaseException):
    """A signal came during compilation. This is a ``BaseException``, so that handlers of compiler
    errors do not catch it."""


def reset() -> None:
    """Forget an earlier request."""
    global _requested
    _requested = False


def request(number: int) -> None:
    """Interrupt the current compilation and prevent later ones. Call this in a signal handler.

    If the compilation does not fail within ``PATIENCE_SECONDS``, the process ends with the exit
    code of the signal.

    Args:
        number: the number of the signal.
    """
    global _requested
    if _compilation is not None and not _requested:
        # torch traces the backward pass in anomaly mode, which prints a warning for each exception.
        warnings.filterwarnings("ignore", "Error detected in", UserWarning)
        arguments = (_compilation, number)
        threading.Thread(target=_end_compilation, args=arguments, daemon=True).start()
    _requested = True


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Allow :func:`request` to end the compilation in this context.

    Raises:
        CompilationInterrupted: the compilation failed after a request, or the request came before
            the compilation.
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
    """Kill compilers until ``compilation`` has failed. This runs in a thread. It does not affect a
    later compilation of this process."""
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
    """Kill the compilers and the compile workers among the descendants of this process."""
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
