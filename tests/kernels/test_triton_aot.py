"""Compile the Triton kernels ahead of time, without a GPU.

They compile for every target, no loop accesses a spilled register, and no kernel needs more
registers, stack or issue slots than are recorded for the installed version of triton. On a GPU, a
profiler shows the same numbers.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_limits import ALWAYS, MORE, compile_ahead, exceeded, minor_version

# The compilers may share two cores with other tests.
pytestmark = pytest.mark.timeout(1800)

pytest.importorskip(
    "triton", minversion="3.6", reason="no triton here: native and reference tests run"
)


# With other versions of triton, kernels are compared only with the records for that version.
_CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text("utf-8")
IS_PINNED = f"\ntriton=={minor_version()}." in _CONSTRAINTS


def all_compile(compiled: list[dict]):
    assert {x["target"] for x in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {x["kernel"] for x in compiled} == {"tile_kernel", "loop_kernel", "gradient_kernel"}


def no_register_spills_on_nvidia(compiled: list[dict]):
    """No register is spilled on sm_90, for which the launch table was measured.

    On sm_80 and sm_100, a few are spilled outside of the loops. This happens once per row, which is
    cheaper than fewer warps.
    """
    for x in compiled:
        if x["target"].startswith("sm_") and x["dtype"] != "fp64":
            assert x["stack"] <= (0 if x["target"] == "sm_90" else 24), x
            assert x["spills_in_loops"] == 0, x
            assert x["registers"] * 32 * x["warps"] <= 65536, x


def issue_slots_of_the_row_kernel(compiled: list[dict]):
    """The tile kernel needs at most 82 issue slots per pair of logits in bf16 at temperature 4.

    This is for 1000 to 4096 classes, with 16 pairs per thread, so that 16 warps fit on a
    multiprocessor. (With 32 pairs it needs 55, but only 8 warps fit.)
    """
    slots = {x["classes"]: x["slots"] for x in compiled
             if x["target"] == "sm_90" and x["dtype"] == "bf16"}  # fmt: skip
    assert slots[1000] <= 82
    assert slots[4096] <= 82


def few_classes_leave_room_for_warps(compiled: list[dict]):
    """Up to 512 classes, at least 12 programs of one warp fit on a multiprocessor.

    With 32 pairs per thread, 8 programs fit, and an H200 took 1.2 to 1.5 times as long
    (bench/results/2026-11-27-gpu-h200/autotune.txt).
    """
    few = [x for x in compiled
           if x["target"] == "sm_90" and x["classes"] <= 512 and x["dtype"] != "fp64"]  # fmt: skip
    assert few
    for x in few:
        assert x["warps"] == 1, x
        assert x["registers"] <= 160, x
        assert x["slots"] <= 280, x


def issue_slots_of_the_loop_kernel(compiled: list[dict]):
    """The loop kernel needs at most 56, also for rows that are not aligned (21841 classes)."""
    slots = {x["classes"]: x["slots"] for x in compiled
             if x["target"] == "sm_90" and x["dtype"] == "bf16"}  # fmt: skip
    for classes in (8192, 21841, 262144):
        assert slots[classes] <= 56, classes


def warps_of_the_loop_kernel(compiled: list[dict]):
    """At least 24 warps fit on a multiprocessor. With 16, an H200 had to wait for loads."""
    for x in compiled:
        if x["target"] == "sm_90" and x["kernel"] == "loop_kernel" and x["dtype"] != "fp64":
            programs = 65536 // (-(-x["registers"] // 8) * 8 * 32 * x["warps"])
            assert programs * x["warps"] >= 24, x


def test_compiled_kernels(tmp_path):
    """All checks are one test, because each pytest worker with one of them would compile all."""
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
    """With 40 registers per thread, the loop kernel spills, because it needs 64."""
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
    """No option is rounded to float32 before it is used.

    ``tl.where`` of two Python numbers and ``tl.fma`` of one would round them. (The float32
    constants 0, 1, NaN and inf are exact.)
    """
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "bench" / "compiled.py"
    command = [sys.executable, str(script), "--constants"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["float32 constants in float64 kernels: none"]
