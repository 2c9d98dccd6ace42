"""Commands as users run them, on each device that a run can have.

``bench/gpu.sh OUT --stages 5`` runs this file on a GPU. Without a GPU, test_captured.py,
test_overlap.py and test_compiled.py test the options that need one.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from small_runs import SMALL, TINY_RUN, bdkd, interrupt_at, metrics, same

from bdkd.runs.checkpoint import load_checkpoint

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no GPU: the same test runs on cpu; test_captured.py, test_overlap.py and "
        "test_compiled.py test the options of a GPU",
    ),
)
DEVICES = [pytest.param("cpu", marks=pytest.mark.soak), pytest.param("cuda", marks=GPU)]
OPTIONS = {
    "bf16": ["--train.precision", "bf16"],
    "fp16": ["--train.precision", "fp16"],
    "channels last, accumulated": ["--train.channels-last", "--train.accumulate", "2"],
    "overlapped": ["--train.overlap"],
    "captured": ["--train.cuda-graph"],
    "overlapped and captured": ["--train.overlap", "--train.cuda-graph"],
    "bf16, captured": ["--train.precision", "bf16", "--train.cuda-graph"],
    "compiled": ["--train.compile"],
    "bf16, compiled and captured": [
        "--train.precision", "bf16", "--train.compile", "--train.cuda-graph",
    ],
}  # fmt: skip
ACCUMULATED = "channels last, accumulated"
CASES = [("cpu", "bf16"), ("cpu", ACCUMULATED), *(("cuda", way) for way in OPTIONS)]
# On the CPU, test_resume.py, test_update_bn.py, test_export.py and others do this in every run of
# the suite. ``make soak`` repeats it here, so that these tests do not fail on a GPU first.
ON_CPU = pytest.mark.soak
# Accumulated runs are left out: batch norm over half batches gives other losses.
COMPARABLE = [case for case in CASES if case[1] != ACCUMULATED]


def cases(chosen, on_cpu=()):
    marked = [pytest.param(*case, marks=GPU if case[0] == "cuda" else on_cpu) for case in chosen]
    return pytest.mark.parametrize(("device", "way"), marked)


def succeeded(*arguments: str) -> str:
    done = bdkd(*arguments, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def final_state(run) -> dict:
    [path] = sorted((run / "checkpoints").glob("step-*"))[-1:]
    _, state = load_checkpoint(path)
    del state["position"]["seconds"]
    return state


@cases(CASES, ON_CPU)
def test_a_stopped_run_ends_like_a_run_that_was_not_stopped(device, way, tmp_path):
    """The states are equal bit for bit, because SMALL is deterministic."""
    command = [*SMALL, "--device", device, *OPTIONS[way]]
    whole, run = tmp_path / "whole", tmp_path / "run"
    succeeded("train", *command, "--run-dir", str(whole))
    code, errors = interrupt_at(13, signal.SIGTERM, *command, "--run-dir", str(run))
    assert code == 143, errors
    succeeded("train", "--resume", "--run-dir", str(run))
    came, expected = final_state(run), final_state(whole)
    assert [key for key in expected if not same(came[key], expected[key])] == []
    assert metrics(run) == metrics(whole)


@cases(COMPARABLE, ON_CPU)
def test_the_first_losses_agree_with_fp32_on_the_cpu(device, way, tmp_path):
    """The losses of the first steps agree within the rounding of the precision."""
    runs = {}
    for name, options in (
        ("plain", ["--device", "cpu"]),
        (way, ["--device", device, *OPTIONS[way]]),
    ):
        run = tmp_path / name.replace(" ", "-")
        succeeded("train", *TINY_RUN, "--train.deterministic", *options, "--run-dir", str(run))
        runs[name] = [line for line in metrics(run) if line["split"] == "train"][:6]
    tolerance = 2e-1 if "bf16" in way else 2e-2 if way == "fp16" else 5e-3
    for a, b in zip(runs["plain"], runs[way], strict=True):
        assert b["skipped_steps"] == 0
        for network in ("student", "teacher"):
            assert b[network]["loss"] == pytest.approx(a[network]["loss"], rel=tolerance)


def evaluated(path, device: str) -> dict:
    return json.loads(succeeded("evaluate", str(path), "--device", device, "--json"))["networks"]


@pytest.mark.parametrize("device", DEVICES)
def test_all_commands_use_a_run_of_any_device(device, tmp_path):
    """Profile the run, evaluate it, recompute batch norm, export it and evaluate the export."""
    run = tmp_path / "run"
    succeeded("train", *SMALL, "--device", device, "--run-dir", str(run), "--profile", "3")
    here, on_cpu = (evaluated(run, where) for where in (device, "cpu"))
    assert device == "cpu" or evaluated(run, device) == here
    assert here.keys() == on_cpu.keys()
    for name in here:
        for metric in ("top1", "ece", "nll"):
            assert here[name][metric] == pytest.approx(on_cpu[name][metric], abs=0.02)
    succeeded("update-bn", str(run), "--device", device)
    succeeded("export", str(run), "--to", "safetensors")
    [exported] = (run / "export").rglob("*.safetensors")
    [of_file] = evaluated(exported, device).values()
    assert of_file["top1"] == pytest.approx(here["student_ema"]["top1"], abs=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_resumes_on_a_machine_without_a_gpu(device, tmp_path):
    run = tmp_path / "run"
    command = [*SMALL, "--device", device, "--run-dir", str(run)]
    code, errors = interrupt_at(13, signal.SIGTERM, *command)
    assert code == 143, errors
    done = subprocess.run(
        [sys.executable, "-m", "bdkd", "train", "--resume", "--device", "cpu",
         "--run-dir", str(run)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (run / "summary.json").exists()
