"""Named ranges: labels for the parts of a step in the trace of ``bdkd train --profile``."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch.profiler import record_function

_NOTHING: AbstractContextManager = contextlib.nullcontext()
_recorded: set[str] | None = None  # names of the recorded ranges; None: not recording


def start_recording() -> None:
    """Start recording named ranges."""
    global _recorded
    _recorded = set()


def stop_recording() -> set[str]:
    """Stop recording, and return the names of the ranges since :func:`start_recording`."""
    global _recorded
    names, _recorded = _recorded or set(), None
    return names


def named_range(name: str) -> AbstractContextManager:
    """Return a context manager that labels its body in the trace. It does nothing if no profiler
    is recording, or inside a compiled graph."""
    if torch.compiler.is_compiling() or _recorded is None:
        return _NOTHING
    _recorded.add(name)
    return record_function(name)


@contextlib.contextmanager
def in_range(name: str) -> Iterator[None]:
    """Decorate a function so that it runs inside :func:`named_range`."""
    with named_range(name):
        yield
