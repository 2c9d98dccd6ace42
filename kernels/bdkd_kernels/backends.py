"""Which implementations of the loss this machine has, and which one a call takes."""

from dataclasses import dataclass
from types import ModuleType

from . import reference
from .types import Problem

NAMES = ("auto", "triton", "native", "reference")


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here, and the reason where it can't. True where it can."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return self.reason


def available_backends() -> dict[str, Availability]:
    """Every backend by name; each value is true where it can run here and says why where not."""
    return {
        "triton": Availability(False, "not built yet"),
        "native": Availability(False, "not built yet"),
        "reference": Availability(True, "eager PyTorch, any device"),
    }


def check_name(backend: str) -> None:
    """Raise ``ValueError`` for a backend that does not exist."""
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {backend!r}")


def choose(backend: str, problem: Problem) -> ModuleType:
    """The module whose ``loss`` and ``loss_and_grad`` serve this call."""
    check_name(backend)
    return reference
