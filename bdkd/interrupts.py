"""Handle Ctrl-C in a command, also during the import of torch: print one line, exit with 130.

This module is imported before torch, and imports nothing else.
"""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_DEFAULT = signal.default_int_handler
_received = False


def exit_during_imports() -> None:
    """Let Ctrl-C end the process at once while modules are imported, if this is the process of a
    command (``bdkd`` or ``python -m bdkd``). Imports leave nothing to clean up.

    A ``KeyboardInterrupt`` would end with a traceback, or leave torch or numpy half imported."""
    arguments = sys.orig_argv
    with contextlib.suppress(ValueError):  # this is not the main thread
        is_module = sys.argv[:1] == ["-m"] and arguments[arguments.index("-m") + 1] == "bdkd"
        is_script = os.path.basename(sys.argv[0]) == "bdkd" if sys.argv else False
        if (is_module or is_script) and signal.getsignal(signal.SIGINT) is _DEFAULT:
            signal.signal(signal.SIGINT, _exit)


@contextlib.contextmanager
def remember_interrupt() -> Iterator[None]:
    """Let Ctrl-C raise ``KeyboardInterrupt`` in the context, and remember it for
    :func:`is_interrupted`."""
    global _received
    _received = False
    previous = signal.getsignal(signal.SIGINT)
    if previous not in (_exit, _DEFAULT):  # the caller handles or ignores the signal
        yield
        return
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, _DEFAULT)


def is_interrupted() -> bool:
    """Return whether Ctrl-C was pressed during a command. Libraries can turn the
    ``KeyboardInterrupt`` into another error, for example in an import."""
    return _received


def exit_now(code: int) -> NoReturn:
    """Run ``atexit`` functions, which end child processes, flush the output and end this process
    without the exit of the interpreter.

    After a ``KeyboardInterrupt`` in code that torch runs through C++, the exit of the interpreter
    would end the process with the signal instead of the exit code.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader may be gone
            stream.flush()
    os._exit(code)


def _exit(number: int, frame: FrameType | None) -> None:
    os.write(2, b"bdkd: interrupted\n")
    os._exit(128 + number)


def _remember(number: int, frame: FrameType | None) -> None:
    global _received
    _received = True
    raise KeyboardInterrupt
