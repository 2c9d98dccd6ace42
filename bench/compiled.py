"""Compile the Triton kernels for GPUs that this machine does not have, and print their resources.

    python bench/compiled.py            # a table: registers, spills, issue slots per class pair
    python bench/compiled.py --json     # the same values, one JSON object per line

The calls are those of the backend, on meta tensors. The compiler therefore gets the same arguments,
specialised in the same way, as on a GPU. See issue_slots.py for issue slots. Do not set
TRITON_INTERPRET=1, because the interpreter compiles nothing.
"""

import argparse
import json
import re
import struct
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from bdkd_kernels.options import LossOptions
from bdkd_kernels.triton import arguments, launch_table
from bdkd_kernels.triton import backend as triton_backend
from bdkd_kernels.triton.launcher import KERNELS
from bdkd_kernels.types import LossInputs, Pair
from issue_slots import loop_slots, resources, spills_in_loops, tile_slots
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "fp64": torch.float64}  # fmt: skip


class _Absent(NamedTuple):
    """A driver that answers the compiler's questions for a GPU that this machine does not have."""

    target: GPUTarget

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target. A stack above 0 means that registers are spilled. Issue
    slots are counted for sm_90 only."""

    target: str
    dtype: str
    classes: int
    kernel: str
    warps: int
    registers: int | None = None
    stack: int | None = None
    shared: int | None = None  # bytes of dynamic shared memory per program
    slots: float | None = None  # issue slots per class pair, on the hot path
    spills_in_loops: int | None = None  # instructions that access spilled registers
    variant: str = ""


# Options that compile to different code, by name. The defaults (temperature 4) are not listed.
VARIANTS: dict[str, dict] = {
    "tau 1": {"temperature": 1.0},
    "tau 3, entropies at 1": {"temperature": 3.0, "soften_entropy": False},
    "smoothed": {"label_smoothing": 0.1},
    "soft labels": {"soft": True, "label_smoothing": 0.1},
    "forward, one loss a row": {"teacher_divergence": "forward", "reduction": "none"},
    "no labels": {"student_ce": 0.0, "teacher_ce": 0.0},
    "no divergence": {"student_kd": 0.0, "teacher_kd": 0.0},
    "no gradients": {"gradients": False},
}


def compile_kernels(target: str, call) -> dict[str, object]:
    """Compile the kernels that ``call`` launches. Return them by name."""
    kernels = {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[self.fn.__name__] = kernel
        return kernel

    run = JITFunction.run
    for function in KERNELS:
        function.device_caches.clear()  # keyed by device number, which is equal for all targets
    driver.set_active(_Absent(TARGETS[target]))
    platform = arguments.Platform(interpreted=False, amd=TARGETS[target].backend == "hip")
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(arguments, "PLATFORM", platform),
        mock.patch.dict(triton_backend._plans, clear=True),
        mock.patch.dict(triton_backend._backward_plans, clear=True),
    ):
        call()
    return kernels


def problem(dtype: str, classes: int, soft: bool = False, **options) -> LossInputs:
    """Return the inputs of a call with 64 rows, as meta tensors."""
    logits = torch.empty((64, classes), dtype=DTYPES[dtype], device="meta")
    target = torch.empty(64, dtype=torch.int64, device="meta")
    if soft:
        target = torch.empty((64, classes), device="meta")
    return LossInputs(logits, logits.clone(), target, None, LossOptions(**options))


def compile_forward(
    target: str, dtype: str, classes: int, gradients: bool = True, **kwargs
) -> Compiled:
    """Compile the row kernel that the launch table chooses."""
    call = problem(dtype, classes, **{"temperature": 4.0, **kwargs})
    ds = torch.empty_like(call.student) if gradients else None
    dt = torch.empty_like(call.teacher) if gradients else None
    kernels = compile_kernels(
        target, lambda: triton_backend._forward(call, 1.0, Pair(ds, dt), False)
    )
    (name,) = kernels.keys() & {"tile_kernel", "loop_kernel"}
    return _described(target, dtype, classes, name, kernels[name], call, ds, dt)


def compile_backward(target: str, dtype: str, classes: int, **kwargs) -> Compiled:
    call = problem(dtype, classes, **{"temperature": 4.0, **kwargs})
    ds, dt = (torch.empty_like(x) for x in (call.student, call.teacher))
    state = torch.empty((triton_backend._FIELDS, 64), device="meta")
    upstream = torch.empty((), device="meta")
    kernels = compile_kernels(
        target,
        lambda: triton_backend._backward(call, state, Pair(upstream, upstream), Pair(ds, dt), 1.0),
    )
    name = "gradient_kernel"
    return _described(target, dtype, classes, name, kernels[name], call, ds, dt)


def _described(target, dtype, classes, name, kernel, call, ds, dt) -> Compiled:
    warps = kernel.metadata.num_warps
    if TARGETS[target].backend == "hip":
        keys = ("vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size")
        counts = [int(re.search(rf"\.{key}:\s+(\d+)", kernel.asm["amdgcn"])[1]) for key in keys]
        return Compiled(target, dtype, classes, name, warps, *counts)
    cubin = kernel.asm["cubin"]
    used = resources(cubin)._replace(shared=kernel.metadata.shared)
    slots = None
    if target == "sm_90" and dtype != "fp64" and ds is not None and name != "gradient_kernel":
        launch = arguments.launch_of(call, Pair(ds, dt))
        if isinstance(launch, launch_table.Tile):
            slots = tile_slots(cubin) * 32 * warps / (launch.rows * launch.block)
        else:
            slots = sum(loop_slots(cubin)) * 32 * warps / launch.block
    spills = spills_in_loops(cubin) if used.stack else 0
    return Compiled(target, dtype, classes, name, warps, *used, slots, spills)


def float32_constants() -> list[str]:
    """Return the constants that were rounded to float32 in kernels that compute in float64.

    Each is an option that lost digits. Some constants are float32 in the kernel. Others were
    converted back to float64, so their last 29 bits are 0. No option of this call has such a value.
    """
    found = set()
    for classes in (10, 21841):  # sizes of the tile kernel and of the loop kernel
        for variant in ({}, VARIANTS["smoothed"], VARIANTS["soft labels"]):
            options = {"temperature": 1.7, "gamma": 1.7, "student_ce": 0.3, **variant}
            call = problem("fp64", classes, **options)
            ds, dt = torch.empty_like(call.student), torch.empty_like(call.teacher)
            state = torch.empty((triton_backend._FIELDS, 64), dtype=torch.float64, device="meta")
            above = torch.empty((), dtype=torch.float64, device="meta")
            forward = partial(triton_backend._forward, call, 1.1, Pair(ds, dt), False)
            kernels = compile_kernels("sm_90", forward)
            if classes == 10:
                arguments = (call, state, Pair(above, above), Pair(ds, dt), 1.1)
                backward = partial(triton_backend._backward, *arguments)
                kernels |= compile_kernels("sm_90", backward)
            for name, kernel in kernels.items():
                pattern = r"arith\.constant (?:dense<)?([^ >]+)>? : (?:tensor<[^>]*x)?f(32|64)\b"
                for value, bits in re.findall(pattern, kernel.asm["ttir"]):
                    if not value.startswith("0x") and _was_rounded(float(value), bits):
                        found.add(f"{name}: {value}")
    return sorted(found)


def _was_rounded(value: float, bits: str) -> bool:
    """Return whether a constant has exactly the digits of float32. Constants of 12 bits or less do
    not count, because float32 represents them exactly."""
    if bits == "32":
        return value not in (0.0, 1.0)
    low = struct.unpack("<Q", struct.pack("<d", value))[0]
    return low % 2**29 == 0 and low % 2**40 != 0


# A number of classes for every shape of the launch table, and an odd one for unaligned rows.
CLASSES = (10, 100, 1000, 2048, 4096, 21841, 32000, 128256, 262144)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--targets", nargs="+", default=["sm_90"], choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--classes", nargs="+", type=int, default=CLASSES)
    parser.add_argument(
        "--backward", action="store_true", help="also compile the recomputing backward"
    )
    parser.add_argument("--variants", action="store_true", help="compile other options of the loss")
    parser.add_argument("--constants", action="store_true",
                        help="only print float32 constants in float64 kernels")  # fmt: skip
    options = parser.parse_args()
    if options.constants:
        print(f"float32 constants in float64 kernels: {', '.join(float32_constants()) or 'none'}")
        return
    if not options.json:
        print(f"{'target':8}{'dtype':6}{'classes':>8}  {'kernel':16}{'warps':>5}{'registers':>10}"
              f"{'stack':>6}{'shared':>7}{'slots a pair':>13}")  # fmt: skip
    for target in options.targets:
        for dtype in options.dtypes:
            for classes in options.classes:
                if options.variants:
                    for name, variant in VARIANTS.items():
                        if not options.json:
                            print(name)
                        found = compile_forward(target, dtype, classes, **variant)
                        _print(replace(found, variant=name), options.json)
                    continue
                _print(compile_forward(target, dtype, classes), options.json)
                if options.backward:
                    _print(compile_backward(target, dtype, classes), options.json)


def _print(x: Compiled, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(x)), flush=True)
        return
    shown = ["-" if v is None else v for v in (x.registers, x.stack, x.shared)]
    slots = "-" if x.slots is None else f"{x.slots:.1f}"
    print(f"{x.target:8}{x.dtype:6}{x.classes:>8}  {x.kernel:16}{x.warps:>5}{shown[0]:>10}"
          f"{shown[1]:>6}{shown[2]:>7}{slots:>13}", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
