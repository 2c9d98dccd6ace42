"""The C++ CPU kernel of ``kernels/csrc``, loaded through ctypes.

With ctypes, the build needs neither torch's nor Python's headers. ctypes releases the GIL during a
call.

The library contains a hash of the sources that it was built from. If the sources of a checkout have
changed since, importing this file rebuilds the library. If the build fails, the kernel is
unavailable, and the reason says what to do.
"""

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import sys
from ctypes import c_char_p, c_int64
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import native_call, ops
from .checks import raise_bad_label
from .native_call import STORAGE, TARGET_KIND
from .options import STATISTICS, LossOptions, cpp_header, struct_format, struct_values
from .reference import compute_dtype
from .types import NONE, Availability, LossInputs, Outputs, Pair, fast_new

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_LIBRARY = Path(__file__).with_name(f"libbdkd_native{_SUFFIX}")
_CHECKOUT = Path(__file__).resolve().parents[2]
CHECKOUT_SOURCES = _CHECKOUT / "kernels" / "csrc"  # missing in an installed package
_REMEDY = "install a C++ compiler, then run pip install -e . (or pip install .)"

_STORAGE = {getattr(torch, name): index for index, name in enumerate(STORAGE)}
_NO_TARGET, _LABELS, _PROBABILITIES = map(
    TARGET_KIND.index, ("no_target", "labels", "probabilities")
)
# Templates for allocating outputs: new_empty is faster than torch.empty with a dtype, and it
# ignores the default device.
_WIDE, _NARROW = (torch.empty((), dtype=d, device="cpu") for d in (torch.float64, torch.float32))
_SCALARS = {
    (s, t): _WIDE if torch.float64 in (s, t) else _NARROW for s in _STORAGE for t in _STORAGE
}
_OPTIONS = struct.Struct(f"={struct_format()}")


def _packed(o: LossOptions) -> bytes:
    """Return the bytes of the options for the kernel.

    The bytes are stored in the options. A cache with the options as its keys would need their hash,
    which takes 1 us per call.
    """
    packed = o.__dict__.get("_packed")
    if packed is None:
        packed = o.__dict__["_packed"] = _OPTIONS.pack(*struct_values(o))
    return packed


def _run(
    inputs: LossInputs,
    scales: tuple[float, float],
    upstreams: Pair[Tensor | None],
    gradients: Pair[Tensor | None],
    losses: Pair[Any],
    stats: Tensor | None,
    check_labels: bool,
) -> None:
    """Call the kernel, which writes ``gradients``, ``losses`` and ``stats``.

    ``upstreams`` are the gradients of the losses, (N,). For None, the kernel uses ``scales``.
    """
    student, teacher, target, weight, options, _, dense = inputs
    rows, classes = student.shape
    target_kind, target_storage = _NO_TARGET, 0
    if target is not None:
        target_kind = _LABELS
        if target.ndim == 2:
            target_kind, target_storage = _PROBABILITIES, _STORAGE[target.dtype]
    assert _library is not None  # otherwise `choose` does not select this backend
    # All fields are packed into one argument: passing each through ctypes takes longer than a small
    # batch. A helper function for the addresses would take 0.9 us per call.
    invalid = _library.bdkd_run(native_call.pack(
        options=_packed(options),
        student=_network(student, classes, dense, gradients[0], upstreams[0], scales[0], losses[0]),
        teacher=_network(teacher, classes, dense, gradients[1], upstreams[1], scales[1], losses[1]),
        rows=rows,
        classes=classes,
        target_kind=target_kind,
        target_storage=target_storage,
        target=0 if target is None else target.data_ptr(),
        weight=0 if weight is None else weight.data_ptr(),
        statistics=0 if stats is None else stats.data_ptr(),
        threads=torch.get_num_threads(),
        check_labels=check_labels,
    ))  # fmt: skip
    if invalid >= 0:
        assert target is not None
        raise_bad_label(invalid, int(target[invalid]), classes, options.ignore_index)


def _network(
    logits: Tensor,
    classes: int,
    dense: bool,
    gradient: Tensor | None,
    upstream: Tensor | None,
    scale: float,
    loss: Tensor | None,
) -> tuple[float, ...]:
    gradient_stride = classes
    if gradient is not None and not gradient.is_contiguous():
        gradient_stride = gradient.stride()[0]
    return native_call.network(
        storage=_STORAGE[logits.dtype],
        logits=logits.data_ptr(),
        stride=classes if dense else logits.stride()[0],
        gradient=0 if gradient is None else gradient.data_ptr(),
        gradient_stride=gradient_stride,
        upstream=0 if upstream is None else upstream.data_ptr(),
        scale=scale,
        loss=0 if loss is None else loss.data_ptr(),
    )


def _forward(
    inputs: LossInputs,
    grad_scale: float | Tensor,
    gradients: Pair[Tensor | None],
    check_labels: bool,
) -> Outputs:
    scalar = _SCALARS[inputs.student.dtype, inputs.teacher.dtype]
    stats = scalar.new_empty(len(STATISTICS), inputs.student.shape[0])
    loss = stats[0] if inputs.options.reduction == "none" else scalar
    losses = fast_new(Pair, (torch.empty_like(loss), torch.empty_like(loss)))
    scale = float(grad_scale)
    _run(inputs, (scale, scale), NONE, gradients, losses, stats, check_labels)
    return fast_new(Outputs, (losses, stats, None))


def _backward(
    inputs: LossInputs,
    state: Tensor | None,
    upstreams: Pair[Tensor | None],
    gradients: Pair[Tensor | None],
    assumed: float | Tensor | None,
) -> None:
    dtype = compute_dtype(inputs.student, inputs.teacher)
    student_scale, student_rows, student_differs = _upstream(upstreams.student, dtype, assumed)
    teacher_scale, teacher_rows, teacher_differs = _upstream(upstreams.teacher, dtype, assumed)
    if student_differs or teacher_differs:
        rows = Pair(student_rows, teacher_rows)
        _run(inputs, (student_scale, teacher_scale), rows, gradients, NONE, None, False)


def _upstream(
    upstream: Tensor | None, dtype: torch.dtype, assumed: float | Tensor | None
) -> tuple[float, Tensor | None, bool]:
    """Return the upstream gradient, as a scale or as (N,), and whether it is not ``assumed``."""
    if upstream is None:
        return 0.0, None, False
    if upstream.ndim == 0:  # the caller has already compared a scalar with `assumed`
        return upstream.item(), None, True
    rows = upstream.to(dtype).contiguous()  # (N,)
    return 0.0, rows, assumed is None or not bool((rows == assumed).all())


def set_instruction_set(name: str | None = None) -> str:
    """Select an instruction set if this machine supports it, and return the one in use."""
    assert _library is not None
    _library.bdkd_instruction_set(None if name is None else name.encode())
    return _library.bdkd_instruction_set(None).decode()


def _sources_hash() -> str | None:
    """Return the hash of the library's sources, computed as in CMakeLists.txt.

    None if the sources are not here, as in an installed package.
    """
    recipe = _CHECKOUT / "CMakeLists.txt"
    if not (recipe.exists() and CHECKOUT_SOURCES.is_dir()):
        return None
    sources = sorted(path for path in CHECKOUT_SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    parts = [cpp_header().encode(), native_call.cpp_header().encode()]
    parts += [path.read_bytes() for path in (*sources, recipe)]
    hashes = "".join(hashlib.sha256(part).hexdigest() for part in parts)
    return hashlib.sha256(hashes.encode()).hexdigest()


def _is_built_from(sources: str) -> bool:
    return sources.encode() in _LIBRARY.read_bytes()


def _rebuild(sources: str) -> str:
    """Rebuild the library of this checkout. Return "", or one line that says why it failed."""
    import fcntl

    python = Path(sys.executable)
    cmake = shutil.which("cmake", path=f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        return "cmake was not found"
    folder = _CHECKOUT / "build" / "native"
    configure = ["-S", str(_CHECKOUT), "-B", str(folder), f"-DPython3_EXECUTABLE={python}"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several ranks or test workers import at once
        if _is_built_from(sources):
            return ""
        print("bdkd: kernels/csrc has changed, building the native kernel", file=sys.stderr)
        for step in (configure, ["--build", str(folder)]):
            done = subprocess.run([cmake, *step], capture_output=True, text=True)
            if done.returncode:
                return (done.stderr or done.stdout).strip().splitlines()[-1]
        fresh = _LIBRARY.with_suffix(f".{os.getpid()}")
        shutil.copy(folder / _LIBRARY.name, fresh)
        fresh.replace(_LIBRARY)
    return ""


def _load() -> tuple[ctypes.CDLL | None, Availability]:
    if not _LIBRARY.exists():
        return None, Availability(False, f"the native kernel was not built: {_REMEDY}")
    sources = _sources_hash()
    if sources is not None and not _is_built_from(sources):
        failure = _rebuild(sources)
        if failure:
            reason = f"the native kernel is older than kernels/csrc ({failure}): {_REMEDY}"
            return None, Availability(False, reason)
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return None, Availability(False, f"the native kernel does not load ({error}): {_REMEDY}")
    library.bdkd_run.restype = c_int64
    library.bdkd_run.argtypes = [c_char_p]
    library.bdkd_instruction_set.restype = c_char_p
    library.bdkd_instruction_set.argtypes = [c_char_p]
    return library, Availability(True, f"C++, {library.bdkd_instruction_set(None).decode()}")


_library, AVAILABILITY = _load()
_fused = ops.FusedBackend("native", _forward, _backward, state_rows=0)
loss, loss_and_grad = _fused.loss, _fused.loss_and_grad
