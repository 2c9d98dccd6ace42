"""The Triton kernels compiled ahead for GPUs that are not here.

They compile for every target, no loop accesses a spilled register, and no kernel needs more
registers, stack or issue slots than are recorded for the installed version of triton. Twin of what
a GPU's profiler shows.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_limits import ALWAYS, MORE, compile_ahead, exceeded, minor_version

# The compilers may share two cores with the rest of the suite.
pytestmark = pytest.mark.timeout(1800)

pytest.importorskip(
    "triton", minversion="3.6", reason="no triton here: native and reference tests run"
)


# Other versions of triton compile otherwise: their kernels are held to their records alone.
_CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text("utf-8")
IS_PINNED = f"\ntriton=={minor_version()}." in _CONSTRAINTS


def all_compile(compiled: list[dict]):
    assert {x["target"] for x in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {x["kernel"] for x in compiled} == {"tile_kernel", "loop_kernel", "gradient_kernel"}


def no_register_spills_on_nvidia(compiled: list[dict]):
    """None on sm_90, which the launch table is for. On sm_80 and sm_100 a few outside of the loops:
    once a row, which is cheaper than fewer warps."""
    for x in compiled:
        if x["target"].startswith("sm_") and x["dtype"] != "fp64":
            assert x["stack"] <= (0 if x["target"] == "sm_90" else 24), x
            assert x["spills_in_loops"] == 0, x
            assert x["registers"] * 32 * x["warps"] <= 65536, x


def issue_slots_of_the_row_kernel(compiled: list[dict]):
    """At most 82 in bf16 at temperature 4, from 1000 classes to the end of the regime: 16 pairs
    a thread, so that 16 warps fit on a multiprocessor (32 pairs take 55, and only 8 warps fit)."""
    slots = {x["classes"]: x["slots"] for x in compiled
             if x["target"] == "sm_90" and x["dtype"] == "bf16"}  # fmt: skip
    assert slots[1000] <= 82
    assert slots[4096] <= 82


def few_classes_leave_room_for_warps(compiled: list[dict]):
    """At least 12 programs of one warp fit on a multiprocessor up to 512 classes: with 32 pairs a
    thread 8 did, and an H200 took 1.2 to 1.5 times as long (autotune.txt)."""
    few = [x for x in compiled
           if x["target"] == "sm_90" and x["classes"] <= 512 and x["dtype"] != "fp64"]  # fmt: skip
    assert few
    for x in few:
        assert x["warps"] == 1, x
        assert x["registers"] <= 160, x
        assert x["slots"] <= 280, x


def issue_slots_of_the_loop_kernel(compiled: list[dict]):
    """At most 56, also where rows are not aligned to 16 bytes (21841 classes)."""
    slots = {x["classes"]: x["slots"] for x in compiled
             if x["target"] == "sm_90" and x["dtype"] == "bf16"}  # fmt: skip
    for classes in (8192, 21841, 262144):
        assert slots[classes] <= 56, classes


def warps_of_the_loop_kernel(compiled: list[dict]):
    """At least 24 warps fit on a multiprocessor: with 16, an H200 waited for loads."""
    for x in compiled:
        if x["target"] == "sm_90" and x["kernel"] == "loop_kernel" and x["dtype"] != "fp64":
            programs = 65536 // (-(-x["registers"] // 8) * 8 * 32 * x["warps"])
            assert programs * x["warps"] >= 24, x


def test_compiled_kernels(tmp_path):
    """One test, because each worker that has a part of them would compile everything."""
    compiled = compile_ahead(ALWAYS, tmp_path)
    assert not exceeded(compiled)
    all_compile(compiled)
    for check in (
        ()
        if not IS_PINNED
        else (
            no_register_spills_on_nvidia,
            issue_slots_of_the_row_kernel,
            few_classes_leave_room_for_warps,
            issue_slots_of_the_loop_kernel,
            warps_of_the_loop_kernel,
        )
    ):
        check(compiled)


@pytest.mark.soak
def test_more_compiled_kernels(tmp_path):
    compiled = compile_ahead(MORE, tmp_path)
    assert not exceeded(compiled)
    if IS_PINNED:
        no_register_spills_on_nvidia(compiled)
        few_classes_leave_room_for_warps(compiled)
        warps_of_the_loop_kernel(compiled)


def test_spills_in_loops_are_counted():
    """With 40 registers a thread, where the loop kernel needs 64."""
    code = (
        "import sys; sys.path.insert(0, 'bench')\n"
        "from dataclasses import replace\n"
        "import compiled\n"
        "from bdkd_kernels.triton import launch_table\n"
        "choose = launch_table.choose\n"
        "launch_table.choose = lambda *shape: replace(choose(*shape), registers=40)\n"
        "print(compiled.compile_forward('sm_90', 'bf16', 32000).spills_in_loops)"
    )
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0


def test_float64_is_computed_in_float64():
    """No option is rounded to float32 on its way: ``tl.where`` of two Python numbers and ``tl.fma``
    of one would do that. (Constants of float32 that are 0, 1, NaN or infinite are exact.)"""
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "bench" / "compiled.py"
    command = [sys.executable, str(script), "--constants"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["float32 constants in float64 kernels: none"]
