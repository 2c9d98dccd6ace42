"""Test the launches of the Triton backend without a GPU.

A stub replaces ``libcuda.so.1`` and records its calls. Everything between the stub and the backend
is Triton's own code, including its launcher in C. Tensors are in CPU memory and no kernel runs. The
stub must be loaded before torch, so ``test_triton.py`` runs this file in a separate process.

From the second call of a kind on, the backend skips Triton's binding of arguments. It must then
launch the same kernel with the same arguments as Triton would, after any sequence of calls.
"""

import contextlib
import ctypes
import os
import re
import subprocess
import tempfile
from collections import namedtuple
from pathlib import Path
from unittest import mock

_STUB = """
#include <stddef.h>
typedef int (*launch_t)(void *config, void *function, void **params, void **extra);
static launch_t launched;
static size_t functions;
void on_launch(launch_t f) { launched = f; }
int cuLaunchKernelEx(void *c, void *f, void **p, void **e) { return launched(c, f, p, e); }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuCtxGetLimit(size_t *v, int l) { *v = 0; return 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuCtxSetLimit(int l, size_t v) { return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = 1 << 17; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = a == 0 ? 1024 : 0; return 0; }
int cuFuncSetAttribute(void *f, int a, int v) { return 0; }
int cuFuncSetCacheConfig(void *f, int c) { return 0; }
int cuGetErrorString(int code, const char **s) { *s = "the stub's"; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *n) { *f = (void *)++functions; return 0; }
int cuModuleLoadData(void **m, const void *data) { *m = (void *)1; return 0; }
int cuModuleUnload(void *m) { return 0; }
int cuPointerGetAttribute(size_t *v, int a, size_t p) { *v = p; return 0; }
int cuStreamIsCapturing(void *s, int *v) { *v = 0; return 0; }
"""
_folder = tempfile.TemporaryDirectory()
_library = Path(_folder.name, "libcuda.so.1")
_library.with_suffix(".c").write_text(_STUB)
subprocess.check_call(
    [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1",
     "-o", _library, _library.with_suffix(".c")]
)  # fmt: skip
_cuda = ctypes.CDLL(str(_library), mode=ctypes.RTLD_GLOBAL)
os.environ["TRITON_LIBCUDA_PATH"] = _folder.name  # the launcher is linked with this library

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from bdkd_kernels._torch_compat import fast_launch_is_tested  # noqa: E402
from bdkd_kernels.options import LossOptions  # noqa: E402
from bdkd_kernels.triton import arguments, launcher  # noqa: E402
from bdkd_kernels.triton import backend as triton_backend  # noqa: E402
from bdkd_kernels.triton.launcher import KERNELS  # noqa: E402
from bdkd_kernels.types import LossInputs, Pair  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.compiler.compiler import CompiledKernel  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
STREAM = 0x5EA
SERIALIZED = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_BYTES = {"i32": 4, "i64": 8, "fp32": 4, "fp64": 8}


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int),
                ("_rest", ctypes.c_char * 60))  # fmt: skip


class _Config(ctypes.Structure):
    _fields_ = (("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
                ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint))  # fmt: skip


class H100(CudaDriver):
    """A driver that looks to the host like that of an H100."""

    def __init__(self):
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: STREAM
        self.get_device_capability = lambda device: (9, 0)


Launch = namedtuple("Launch", "kernel grid threads stream early arguments")
LAUNCHES: list[Launch] = []
_loaded: dict[int, object] = {}  # compiled kernels by their handle


def flat(signature):
    """Yield the types of all arguments that are not compile-time constants. Flatten tuples."""
    for x in signature:
        if isinstance(x, tuple):
            yield from flat(x)
        elif x != "constexpr":
            yield x


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_size_t,
                  ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)  # fmt: skip
def _keep(config, function, parameters, _):
    c, kernel = config[0], _loaded[function]
    types = [*flat(kernel.src.signature.values()), "*", "*"]  # the last two are scratch memory
    arguments = tuple(
        ctypes.string_at(parameters[i], _BYTES.get(x, 8)) for i, x in enumerate(types)
    )
    early = [c.attributes[i].value for i in range(c.count) if c.attributes[i].id == SERIALIZED]
    LAUNCHES.append(Launch(kernel, c.grid[0], c.block[0], c.stream, early == [1], arguments))
    return 0


class _Uncompiled:
    """A kernel without compiled code, with the launcher that Triton creates for its signature."""

    def __init__(self, function: JITFunction, signature, constexprs, attrs, options, backend):
        self.src = ASTSource(function, signature, constexprs, attrs)
        self.name = function.__name__
        fields = {
            **options.__dict__, "name": self.name, "shared": 0, "tensordesc_meta": None,
            "global_scratch_size": 0, "global_scratch_align": 1,
            "profile_scratch_size": 0, "profile_scratch_align": 1,
        }  # fmt: skip
        metadata = namedtuple("Metadata", fields)(**fields)
        self.packed_metadata = backend.pack_metadata(metadata)
        self.run = driver.active.launcher_cls(self.src, metadata)
        self.function = 1000 + len(_loaded)
        _loaded[self.function] = self

    def launch_metadata(self, *_):
        return None


def _do_not_compile(self, key, signature, device, constexprs, options, attrs, warmup):
    cache, _, _, backend, _ = self.device_caches[device]
    kernel = _Uncompiled(self, signature, constexprs, attrs, options, backend)
    return cache.setdefault(key, kernel)


class MI300:
    """A driver for an AMD GPU that launches nothing. It has the methods that choose a kernel."""

    def get_current_target(self):
        return GPUTarget("hip", "gfx942", 64)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return STREAM

    def launcher_cls(self, src, metadata):
        return lambda *arguments: None


@pytest.fixture(autouse=True)
def h100():
    driver.set_active(H100())
    _cuda.on_launch(_keep)
    with (
        mock.patch.dict(triton_backend._plans, clear=True),
        mock.patch.dict(triton_backend._backward_plans, clear=True),
    ):
        yield


@pytest.fixture
def mi300(h100):
    driver.set_active(MI300())
    amd = arguments.Platform(interpreted=False, amd=True)
    with mock.patch.object(arguments, "PLATFORM", amd):
        yield


@pytest.fixture
def uncompiled():
    for kernel in KERNELS:
        kernel.device_caches.clear()
    with mock.patch.object(JITFunction, "_do_compile", _do_not_compile):
        yield
    for kernel in KERNELS:
        kernel.device_caches.clear()


def tensor(shape, dtype=FP32, off: int = 0, stride: int | None = None, device: str = "cpu"):
    """Return zeros with this row stride, ``off`` elements after a 16-byte aligned address."""
    columns = shape[1] if len(shape) == 2 else 1
    stride = columns if stride is None else stride
    count = (shape[0] - 1) * stride + columns if shape else 1
    memory = torch.zeros(count + off + 32, dtype=dtype, device=device)
    first = -memory.data_ptr() % 16 // memory.element_size() + off
    return memory.as_strided(shape, (stride, 1)[: len(shape)], first)


def call(
    rows=9, classes=100, dtypes=(FP32, FP32), target="labels", weight=False, off=(), strides=None,
    grads=(True, True), scale=1.0, scale_off=0, upstream="one", assumed=1.0, device="cpu",
    **options,
):  # fmt: skip
    """Create the tensors of a call. Return its forward and its backward pass as functions."""
    off = {**dict.fromkeys(("s", "t", "y", "w", "ds", "dt", "up"), 0), **dict.fromkeys(off, 1)}
    strides = strides or (classes,) * 4
    shape = (rows, classes)
    s = tensor(shape, dtypes[0], off["s"], strides[0], device)
    t = tensor(shape, dtypes[1], off["t"], strides[1], device)
    ds = tensor(shape, dtypes[0], off["ds"], strides[2], device) if grads[0] else None
    dt = tensor(shape, dtypes[1], off["dt"], strides[3], device) if grads[1] else None
    y = None
    if target == "labels":
        y = tensor((rows,), torch.int64, off["y"], device=device)
    elif target is not None:
        y = tensor(shape, target, off["y"], device=device)
    compute = FP64 if FP64 in dtypes else FP32
    w = tensor((rows,), compute, off["w"], device=device) if weight else None
    inputs = LossInputs(s, t, y, w, LossOptions(**options))

    def scalar(x):
        return tensor((), x, scale_off, device=device) if isinstance(x, torch.dtype) else x

    scale, assumed = scalar(scale), scalar(assumed)
    up = tensor((rows,) if upstream == "rows" else (), compute, off["up"], device=device)
    if upstream == "expanded":
        up = up.expand(rows)
    ups = Pair(*(up if has else None for has in grads))

    def forward():
        return triton_backend._forward(inputs, scale, Pair(ds, dt), False)

    def backward(state):
        triton_backend._backward(inputs, state, ups, Pair(ds, dt), assumed)

    return forward, backward


CALLS = {
    "plain": {},
    "one row": {"rows": 1},
    "rows that fill nothing": {"rows": 4097},
    "parts of the denominator": {"rows": 40_000},
    "one class": {"classes": 1},
    "few classes": {"classes": 16},
    "few classes, aligned with nothing": {"classes": 17},
    "several warps": {"classes": 4096},
    "a loop": {"classes": 4104},
    "a loop of single logits": {"classes": 4097},
    "bf16": {"dtypes": (BF16, BF16)},
    "bf16 and fp16": {"dtypes": (BF16, FP16)},
    "fp64": {"dtypes": (FP64, FP64)},
    "fp64, another temperature": {"dtypes": (FP64, FP64), "temperature": 3.0},
    "fp32 and fp64": {"dtypes": (FP32, FP64)},
    **{f"{name} not aligned": {"off": (name,)} for name in ("s", "t", "y", "ds", "dt", "up")},
    "weights": {"weight": True},
    "weights not aligned": {"weight": True, "off": ("w",)},
    "weights alone": {"weight": True, "target": None},
    "weights alone, not aligned": {"weight": True, "target": None, "off": ("w",)},
    "no target": {"target": None},
    "soft": {"target": FP32},
    "soft bf16": {"target": BF16},
    "soft, not aligned": {"target": FP32, "off": ("y",)},
    "rows apart": {"strides": (112, 112, 112, 112)},
    "rows 1 apart of alignment": {"strides": (101, 100, 100, 100)},
    "gradients apart": {"strides": (100, 100, 101, 104)},
    "the same row": {"strides": (0, 0, 100, 100)},
    "rows far apart": {"rows": 2, "strides": (2**31 + 16, 100, 100, 100), "device": "meta"},
    "very many rows": {"rows": 2**31 + 9, "classes": 16, "device": "meta"},
    # AMD's compiler uses the information whether these tensors fit into 2 GiB.
    "few rows of one class": {"classes": 1, "device": "meta"},
    "records beyond 2 GiB": {"rows": 30_000_000, "classes": 1, "device": "meta"},
    "records, almost": {"rows": 21_000_000, "classes": 1, "device": "meta"},
    "logits beyond 2 GiB": {"rows": 6_000_000, "device": "meta"},
    "state beyond 2 GiB": {"rows": 26_000_000, "classes": 16, "device": "meta"},
    "no student": {"grads": (False, True), "student_ce": 0.0, "student_kd": 0.0},
    "offline": {"grads": (True, False)},
    "no gradient": {"grads": (False, False)},
    "temperature 4": {"temperature": 4.0},
    "temperature 3": {"temperature": 3.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "upstream": "rows", "assumed": None},
    "none, several rows a program": {"classes": 16, "reduction": "none", "upstream": "rows"},
    "none, one upstream": {"reduction": "none", "upstream": "expanded", "assumed": None},
    "none, upstream not aligned": {"reduction": "none", "upstream": "rows", "off": ("up",)},
    "ignore 1": {"ignore_index": 1},
    "ignore 16": {"ignore_index": 16},
    "ignore far away": {"ignore_index": -(2**40)},
    "smooth": {"label_smoothing": 0.1},
    "another number": {"scale": 8.0, "assumed": 8.0},
    "a whole number": {"scale": 1, "assumed": 1},
    "a scale": {"scale": FP32, "assumed": FP32},
    "a scale not aligned": {"scale": FP32, "assumed": FP32, "scale_off": 1},
    "a scale fp16": {"scale": FP16, "assumed": FP16},
    "a scale fp64": {"scale": FP64, "assumed": FP64},
    "nothing assumed": {"assumed": None},
}


class Reused:
    """Replace ``torch.empty``: the n-th allocation of every call returns the same memory."""

    def __init__(self):
        self.memory, self.used, self.real = {}, 0, torch.empty

    def again(self):
        self.used = 0

    def __call__(self, *shape, **kwargs):
        self.used += 1
        key = self.used, str(shape), *kwargs.values()
        if key not in self.memory:
            self.memory[key] = self.real(*shape, **kwargs)
        return self.memory[key]


@contextlib.contextmanager
def memory():
    reused = Reused()
    with (
        mock.patch("torch.empty", reused),
        mock.patch("torch.full", lambda shape, value, **kwargs: reused(shape, **kwargs)),
    ):
        yield reused


def launches_of(forward, backward, reused: Reused, with_backward: bool) -> list[Launch]:
    LAUNCHES.clear()
    reused.again()
    state = forward().state
    if with_backward:
        backward(state)
    return list(LAUNCHES)


@pytest.mark.parametrize("name", CALLS)
def test_later_calls_launch_the_same_as_the_first(uncompiled, name):
    """Only the first call uses Triton's binding of arguments."""
    has_gradient = any(CALLS[name].get("grads", (True,)))
    forward, backward = call(**CALLS[name])
    with memory() as reused:
        first = launches_of(forward, backward, reused, has_gradient)
        assert first == launches_of(forward, backward, reused, has_gradient)
    assert all(x.stream == STREAM for x in first)
    names = [x.kernel.name for x in first]
    rows = "loop_kernel" if "loop" in name else "tile_kernel"
    reduction = CALLS[name].get("reduction", "mean")
    labelled = CALLS[name].get("target", "labels") == "labels" or CALLS[name].get("weight")
    assert names == [
        *["denominator_kernel"] * (reduction == "mean" and bool(labelled)), rows,
        *["sum_kernel"] * (reduction != "none"), *["gradient_kernel"] * has_gradient,
    ]  # fmt: skip
    # A launch begins early if it follows another launch of the same call. The first launch of a
    # call waits for all earlier launches.
    assert [x.early for x in first] == [
        i > 0 and x != "gradient_kernel" for i, x in enumerate(names)
    ]


def of_other_arguments(*arguments):
    raise TypeError("function takes exactly 3 arguments (40 given)")


@pytest.mark.parametrize("why", ["untested version", "other arguments", "launch hooks"])
def test_without_the_fast_launch_every_launch_is_the_same(uncompiled, monkeypatch, why):
    """``kernel[grid]`` passes the same arguments to the driver as the fast launch."""
    forward, backward = call(weight=True, temperature=4.0)
    with memory() as reused:
        launches_of(forward, backward, reused, True)
        fast = launches_of(forward, backward, reused, True)
        if why == "untested version":
            triton_backend._plans.clear()
            triton_backend._backward_plans.clear()
            monkeypatch.setattr(launcher, "fast_launch_is_tested", lambda version: False)
        elif why == "other arguments":
            monkeypatch.setattr(launcher, "launch_compiled", of_other_arguments)
        watched = []
        hook = knobs.runtime.launch_enter_hook
        if why == "launch hooks":
            hook.add(watched.append)
        bound = []
        run = JITFunction.run

        def count(self, *args, **kwargs):
            bound.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        try:
            with mock.patch.object(JITFunction, "run", count):
                for _ in range(2):
                    assert launches_of(forward, backward, reused, True) == fast
        finally:
            if why == "launch hooks":
                hook.remove(watched.append)
    assert len(bound) == 2 * len(fast)
    assert len(watched) == (len(bound) if why == "launch hooks" else 0)


def test_versions_with_a_tested_fast_launch():
    assert fast_launch_is_tested("3.6.0")
    assert fast_launch_is_tested(triton.__version__)
    assert not fast_launch_is_tested("3.5.1")
    assert not fast_launch_is_tested("99.0.0+git")


@pytest.mark.parametrize("gpu", ["h100", "mi300"])
def test_no_call_runs_the_kernel_of_another_kind(uncompiled, gpu, request):
    """Each launch uses the kernel that Triton itself would choose for its arguments.

    All kinds of calls run in turn, three times, so that most calls are not the first of their kind.
    """
    request.getfixturevalue(gpu)
    plain = launcher.Launcher.__call__
    wrong, checked = [], 0

    def check(self, programs, stream, tensors, addresses, numbers):
        nonlocal checked
        if self.compiled is not None:
            checked += 1
            chosen = self.kernel.run(
                *tensors, *numbers, grid=(programs,), warmup=True, **self.options
            )
            if chosen is not self.compiled:
                wrong.append((name, self.kernel.__name__))
        plain(self, programs, stream, tensors, addresses, numbers)

    made = {name: call(**options) for name, options in CALLS.items()}
    with mock.patch.object(launcher.Launcher, "__call__", check):
        for _ in range(3):
            for name, (forward, backward) in made.items():
                state = forward().state
                if any(CALLS[name].get("grads", (True,))):
                    backward(state)
                    dense = state.contiguous() if state.device.type == "cpu" else state
                    backward(dense)  # operators of torch.library pass a dense state
    assert checked > 3 * len(CALLS)
    assert not wrong


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"classes": 4104}])
def test_compiled_kernels_take_these_arguments(options):
    """The parameters of the compiled code have the number and the widths of the passed arguments.

    A launch that begins early contains a wait. A launch allows the next one to begin early only if
    there is a next one.
    """
    init = CompiledKernel._init_handles

    def load(self):
        init(self)
        _loaded[self.function] = self

    forward, backward = call(**options)
    with mock.patch.object(CompiledKernel, "_init_handles", load), memory() as reused:
        for _ in range(2):
            launched = launches_of(forward, backward, reused, True)
    for launch, follower in zip(launched, (*launched[1:], None), strict=True):
        entry = launch.kernel.asm["ptx"].split(".entry", 1)[1]
        widths = [int(x) // 8 for x in re.findall(r"\.param \.[a-z](\d+)", entry)]
        assert widths == [len(x) for x in launch.arguments]
        assert ("griddepcontrol.wait" in entry) == launch.early
        assert ("griddepcontrol.launch" in entry) == bool(follower and follower.early)
