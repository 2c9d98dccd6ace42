"""The C++ CPU kernel of ``kernels/csrc``, loaded through ctypes: it needs neither torch's headers
nor Python's, and other Python threads run while it does.

In a source checkout the library carries a hash of its sources. Where they have changed since, it is
built again at import; where that fails, the kernel counts as missing, with the remedy.
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

import torch
from torch import Tensor

from . import ops
from .checks import raise_bad_label
from .reference import compute_dtype
from .types import Availability, LossInputs, LossOptions

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_LIBRARY = Path(__file__).with_name(f"libbdkd_native{_SUFFIX}")
_CHECKOUT = Path(__file__).resolve().parents[2]
CHECKOUT_SOURCES = _CHECKOUT / "kernels" / "csrc"  # there, or installed without
_REMEDY = "with a C++ compiler, run: pip install -e . (or pip install . for a copy)"

_STORAGE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# Templates of the outputs: new_empty of one is faster than torch.empty with a dtype, and on the CPU
# whatever the default device is.
_WIDE, _NARROW = (torch.empty((), dtype=d, device="cpu") for d in (torch.float64, torch.float32))
_SCALARS = {
    (s, t): _WIDE if torch.float64 in (s, t) else _NARROW for s in _STORAGE for t in _STORAGE
}
_NO_TARGET, _LABELS = -2, -1  # or the storage of soft labels


_OPTIONS = struct.Struct("=7dq4i")  # csrc/call.h: Options
_CALL = struct.Struct("=2d17q5i")  # csrc/kernel.cpp: Arguments


def _packed(o: LossOptions) -> bytes:
    """The options as the kernel reads them. Kept with the options, whose hash, for a cache keyed by
    them, would take 1 us of every call."""
    packed = o.__dict__.get("_packed")
    if packed is None:
        packed = o.__dict__["_packed"] = _OPTIONS.pack(
            o.temperature, o.gamma, o.student_ce, o.student_kd, o.teacher_ce, o.teacher_kd,
            o.label_smoothing, o.ignore_index, o.teacher_divergence == "forward",
            o.soften_entropy, o.reduction == "mean", o.reduction == "none",
        )  # fmt: skip
    return packed


def _run(
    problem: LossInputs,
    scales: tuple[float, float],
    upstreams: tuple[Tensor | None, Tensor | None],
    gradients: tuple[Tensor | None, Tensor | None],
    losses: tuple[Tensor, Tensor] | None,
    stats: Tensor | None,
    check_labels: bool,
) -> None:
    student, teacher, target, weight, options, _, dense = problem
    (ds, dt), (student_upstream, teacher_upstream) = gradients, upstreams
    rows, classes = student.shape
    if target is None:
        target_kind = _NO_TARGET
    elif target.ndim == 1:
        target_kind = _LABELS
    else:
        target_kind = _STORAGE[target.dtype]
    assert _library is not None  # or `choose` would not have come here
    # One packed argument: as many by themselves would take ctypes longer than a small batch takes.
    bad = _library.bdkd_run(_packed(options) + _CALL.pack(
        *scales, rows, classes,
        student.data_ptr(), classes if dense else student.stride()[0],
        teacher.data_ptr(), classes if dense else teacher.stride()[0],
        0 if target is None else target.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if stats is None else stats.data_ptr(),
        *((0, 0) if ds is None else (ds.data_ptr(), _row_stride(ds, classes))),
        *((0, 0) if dt is None else (dt.data_ptr(), _row_stride(dt, classes))),
        0 if student_upstream is None else student_upstream.data_ptr(),
        0 if teacher_upstream is None else teacher_upstream.data_ptr(),
        0 if losses is None else losses[0].data_ptr(),
        0 if losses is None else losses[1].data_ptr(),
        _STORAGE[student.dtype], _STORAGE[teacher.dtype], target_kind,
        torch.get_num_threads(), check_labels,
    ))  # fmt: skip
    if bad >= 0:
        assert target is not None
        raise_bad_label(bad, int(target[bad]), classes, options.ignore_index)


def _row_stride(rows: Tensor, classes: int) -> int:
    return classes if rows.is_contiguous() else rows.stride()[0]


def _forward(
    problem: LossInputs,
    grad_scale: float | Tensor,
    ds: Tensor | None,
    dt: Tensor | None,
    check_labels: bool,
) -> ops.Outputs:
    scalar = _SCALARS[problem.student.dtype, problem.teacher.dtype]
    stats = scalar.new_empty(12, problem.student.shape[0])
    loss = stats[0] if problem.options.reduction == "none" else scalar
    student, teacher = torch.empty_like(loss), torch.empty_like(loss)
    scale = float(grad_scale)
    _run(problem, (scale, scale), (None, None), (ds, dt), (student, teacher), stats, check_labels)
    return student, teacher, stats, None


def _backward(
    problem: LossInputs,
    state: Tensor | None,
    student_upstream: Tensor | None,
    teacher_upstream: Tensor | None,
    ds: Tensor | None,
    dt: Tensor | None,
    announced: float | Tensor | None,
) -> None:
    dtype = compute_dtype(problem.student, problem.teacher)
    student_scale, student_rows, student_differs = _upstream(student_upstream, dtype, announced)
    teacher_scale, teacher_rows, teacher_differs = _upstream(teacher_upstream, dtype, announced)
    if student_differs or teacher_differs:
        scales, rows = (student_scale, teacher_scale), (student_rows, teacher_rows)
        _run(problem, scales, rows, (ds, dt), None, None, False)


def _upstream(
    upstream: Tensor | None, dtype: torch.dtype, announced: float | Tensor | None
) -> tuple[float, Tensor | None, bool]:
    """As one number, or one a row; and whether it is not what was announced."""
    if upstream is None:
        return 0.0, None, False
    if upstream.ndim == 0:  # one that was announced does not come here
        return upstream.item(), None, True
    rows = upstream.to(dtype).contiguous()  # (N,)
    return 0.0, rows, announced is None or not bool((rows == announced).all())


def set_instruction_set(name: str | None = None) -> str:
    """The instruction set in use; with the name of one that this machine has, that one now."""
    assert _library is not None
    _library.bdkd_instruction_set(None if name is None else name.encode())
    return _library.bdkd_instruction_set(None).decode()


def _sources_hash() -> str | None:
    """Of what the library is built from, as CMakeLists.txt makes it; None without a checkout."""
    recipe = _CHECKOUT / "CMakeLists.txt"
    if not (recipe.exists() and CHECKOUT_SOURCES.is_dir()):
        return None
    sources = sorted(path for path in CHECKOUT_SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    hashes = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (*sources, recipe))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _is_built_from(sources: str) -> bool:
    return sources.encode() in _LIBRARY.read_bytes()


def _rebuild(sources: str) -> str:
    """Build the library of this checkout again; '' or why that did not work, in one line."""
    import fcntl

    beside_python = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=f"{beside_python}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        return "there is no cmake here"
    folder = _CHECKOUT / "build" / "native"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several ranks or test workers import at once
        if _is_built_from(sources):
            return ""
        print("bdkd: kernels/csrc has changed, building the native kernel", file=sys.stderr)
        for step in (["-S", str(_CHECKOUT), "-B", str(folder)], ["--build", str(folder)]):
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
