"""The Triton kernels compiled ahead for GPUs that are not here: that they compile, that no register
spills, and how many issue slots a class pair takes on sm_90. Twin of what a GPU's profiler shows.

In processes of their own: nothing compiles where TRITON_INTERPRET=1, and two compile at a time.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton for this platform: native and reference tests run")

_SCRIPT = Path(__file__).parents[2] / "bench" / "compiled.py"
_RUNS = (
    # Every shape of the launch table; 21841 aligns with nothing, 262144 pads nothing.
    "--targets sm_90 --dtypes bf16 --classes 10 11 17 33 66 100 101",
    "--targets sm_90 --dtypes bf16 --classes 1000 4096 8192 21841 32000 262144",
    "--targets sm_90 --dtypes fp32 --classes 1000 4096 21841 32000 262144 --backward",
    "--targets sm_90 --dtypes fp16 fp64 --classes 1000 128256",
    "--targets sm_80 sm_100 --dtypes bf16 fp32 --classes 1000 262144",
    "--targets sm_80 sm_100 --dtypes fp16 --classes 10 11 17 40 65 66 129 4096",
    "--targets sm_80 --dtypes fp32 --classes 3 16 17 40 66 100",
    "--targets sm_90 --dtypes fp32 --classes 1000 32000 --variants",
    "--targets gfx942 --dtypes bf16 --classes 1000",  # 15 s: AMD's compiler
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    found = []

    def run(arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(_SCRIPT), "--json", *arguments.split()]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as two_at_a_time:
        for done in two_at_a_time.map(run, _RUNS):
            assert done.returncode == 0, done.stderr[-3000:]
            found += [json.loads(line) for line in done.stdout.splitlines()]
    return found


def test_all_compile(compiled):
    assert {x["target"] for x in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {x["kernel"] for x in compiled} == {"tile_kernel", "loop_kernel", "gradient_kernel"}


def test_no_register_spills_on_nvidia(compiled):
    for x in compiled:
        if x["target"].startswith("sm_") and x["dtype"] != "fp64":
            assert x["stack"] == 0, x
            assert x["registers"] * 32 * x["warps"] <= 65536, x


def test_issue_slots_of_the_row_kernel(compiled):
    """At most 55 in bf16 at temperature 4, from 1000 classes to the end of the regime."""
    slots = {x["classes"]: x["slots"] for x in compiled
             if x["target"] == "sm_90" and x["dtype"] == "bf16"}  # fmt: skip
    assert slots[1000] <= 55
    assert slots[4096] <= 55


def test_issue_slots_of_few_classes(compiled):
    """What a row's own values cost; with no two logits in one access, more threads share a row."""
    slots = {x["classes"]: x["slots"] for x in compiled
             if x["target"] == "sm_90" and x["dtype"] == "bf16"}  # fmt: skip
    assert slots[10] <= 80
    assert slots[100] <= 65
    assert slots[101] <= 110
    assert slots[11] <= 205


def test_issue_slots_of_the_loop_kernel(compiled):
    """At most 65 where rows are aligned. Where they are not (21841), logits are read one by one:
    72, which leaves 75% of the bandwidth of an H200."""
    slots = {x["classes"]: x["slots"] for x in compiled
             if x["target"] == "sm_90" and x["dtype"] == "bf16"}  # fmt: skip
    assert slots[8192] <= 65
    assert slots[32000] <= 65
    assert slots[262144] <= 65
    assert slots[21841] <= 74


def test_float64_is_computed_in_float64():
    """No option is rounded to float32 on its way: ``tl.where`` of two Python numbers would do that.
    (Constants of float32 that are 0, 1, NaN or infinite are exact.)"""
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(_SCRIPT), "--constants"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["float32 constants in float64 kernels: none"]
