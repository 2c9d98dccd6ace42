"""The backends that this machine can run, and the choice of one for a call."""

import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch

from . import native, reference
from ._torch_compat import is_dtensor, needs_torch_operators
from .options import shown
from .types import Availability, LossInputs

NAMES = ("auto", "triton", "native", "reference")

_triton: Availability | None = None  # None until it is needed: importing triton is slow
_warned = False


def available_backends() -> dict[str, Availability]:
    """Return the availability of every backend on this machine, by name.

    A value is truthy if the backend can run. ``str(value)`` describes the backend, or explains why
    it cannot run.
    """
    return {
        "triton": _triton_availability(),
        "native": native.AVAILABILITY,
        "reference": Availability(True, "eager PyTorch, any device"),
    }


def check_name(backend: str) -> None:
    """Raise ``ValueError`` for a backend that does not exist."""
    if not isinstance(backend, str) or backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {shown(backend)}")


def choose(backend: str, inputs: LossInputs) -> ModuleType:
    """Return the module whose ``loss`` and ``loss_and_grad`` compute this call.

    Calls under a transform that supports only torch's own operators always run the reference.

    Raises:
        RuntimeError: If the named backend cannot run on this machine, or with tensors on this
            device.
    """
    student = inputs.student
    if not inputs.plain and backend != "reference":
        check_name(backend)
        if needs_torch_operators():
            return reference
        if is_dtensor(student):
            if backend == "auto":
                return reference
            raise RuntimeError(
                f"backend {backend!r} takes no DTensor in student_logits: pass .to_local() of each "
                "tensor, or use backend='auto'"
            )
    if backend == "auto":
        if student.is_cpu:
            return native if native.AVAILABILITY.available else reference
        if student.is_cuda:
            availability = _triton_availability()
            if availability:
                return _triton_module()
            _warn_once(availability)
        return reference
    check_name(backend)
    device = student.device.type
    if backend == "native":
        _require("native", native.AVAILABILITY)
        if device != "cpu":
            raise RuntimeError(
                f"backend 'native' takes CPU tensors, got {device}: use backend='auto'"
            )
        return native
    if backend == "triton":
        if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            raise RuntimeError(
                f"backend 'triton' takes CUDA or ROCm tensors, got {device}: use backend='auto' "
                "(with TRITON_INTERPRET=1 in the environment, triton interprets CPU tensors)"
            )
        _require("triton", _triton_availability())
        return _triton_module()
    return reference


def _require(name: str, availability: Availability) -> None:
    if not availability:
        raise RuntimeError(f"backend {name!r} is not available: {availability}")


def _triton_availability() -> Availability:
    global _triton
    if _triton is None:
        if importlib.util.find_spec("triton") is None:
            _triton = Availability(False, "triton is not installed: pip install 'bdkd[triton]'")
        else:
            try:
                too_old = _too_old_triton()
                _triton = _triton_module().availability() if too_old is None else too_old
            except ImportError as error:
                _triton = Availability(False, f"the triton kernel cannot be imported: {error}")
    return _triton


def _too_old_triton() -> Availability | None:
    """Return the reason if triton is older than 3.6, where importing the kernel fails."""
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) >= (3, 6):
        return None
    return Availability(
        False, f"triton {version} is too old: 3.6 is needed, which torch 2.10 or newer installs"
    )


def _triton_module() -> ModuleType:
    from .triton import backend as triton_backend

    return triton_backend


def _warn_once(availability: Availability) -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"bdkd runs its eager reference on the GPU: the triton backend is not available "
            f"({availability})",
            stacklevel=4,
        )
