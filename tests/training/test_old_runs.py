"""Runs of an older commit, resumed with today's code, continue as with the older commit.

``old_runs/`` contains runs that were killed at commit 0b69d99, and the results that 0b69d99 itself
reached some steps later (``old_runs/make.py`` wrote both). These tests resume the runs on the
command line, as users do, and compare the files that the runs write.

Steps, epochs, learning rates, skipped steps, the loss scale and the state of the random generators
must be equal. For weights, batch norm statistics and moments, the tests compute a ratio: the
distance from the old code's values, divided by the distance that those moved since the checkpoint.
Rounding differs between machines and versions of torch: with the reference loss, without AVX in
torch and oneDNN, the ratio is at most 4e-6 in float32 and 4e-2 with fp16 autocast. With deliberate
faults (lost or exchanged moments, lost statistics, another random state, a warm-up of 0.1 epochs
more, another loss scale) it is 5e-2 to 2 in float32 and 0.6 to 0.9 with fp16.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from launches import Launch
from safetensors.torch import load_file
from saved_vectors import read_state, vectors

from bdkd.cli import main

OLD_RUNS = Path(__file__).parent / "old_runs"
NAMES = sorted(path.parent.name for path in OLD_RUNS.glob("*/next.json"))
IN_FLOAT32 = 1e-3
TOLERANCE = {"fp16": 0.2, "two-ranks": 2e-2}  # the two ranks round gradients to bf16

# Rounding changes these metrics in jumps, when a sample changes its class or its bin.
BY_STEPS = {"top1", "top5", "ece", "mce", "forward_weight", "reverse_weight"}
CLOCKED = {"images_per_second", "data_wait", "memory_mib", "mfu", "seconds"}


@pytest.fixture
def run(request, tmp_path) -> Path:
    """Return a copy of an old run, which the test can resume."""
    folder = tmp_path / "run"
    shutil.copytree(OLD_RUNS / request.param, folder)
    for name in ("next.json", "next.safetensors"):
        (folder / name).unlink()
    return folder


def resume(folder: Path, ranks: int) -> None:
    if ranks == 1:
        main(["train", "--resume", "--run-dir", str(folder)])
        return
    with Launch(ranks, folder, "--resume") as launch:
        assert launch.end() == 0, launch.text()


@pytest.mark.parametrize(("name", "run"), [(n, n) for n in NAMES], indirect=["run"])
def test_an_old_run_continues_as_the_old_code_would(name, run):
    expected = json.loads((OLD_RUNS / name / "next.json").read_text())
    saved, last = (f"step-{expected[key]:08d}.pt" for key in ("saved", "last"))
    resume(run, expected["ranks"])

    lines = read_lines(run)
    before, after = in_new_format(read_lines(OLD_RUNS / name), expected["metrics"])
    assert lines[: len(before)] == before
    for came, needed in zip(lines[len(before) :], after, strict=True):
        assert came["seconds"] > 0
        assert_same_line(came, needed, name)

    state = read_state(run / "checkpoints" / last)
    assert state["scaler"] == expected["scaler"]
    assert state["skipped"].tolist() == expected["skipped"]
    if comparable_draws(name):
        assert [digest(rank["rng"]["cpu"]) for rank in state["ranks"]] == expected["rng"]
        before = vectors(read_state(OLD_RUNS / name / "checkpoints" / saved))
        needed = load_file(OLD_RUNS / name / "next.safetensors")
        assert_moved_alike(before, vectors(state), needed, TOLERANCE.get(name, IN_FLOAT32))


def read_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def in_new_format(*parts: list[dict]) -> list[list[dict]]:
    """Return metrics of 0b69d99 in today's format. That commit counted the epochs of training lines
    from 0. Its evaluations, here all at the end of an epoch or of the run, come after a training
    line of the same step."""
    epochs = {x["step"]: x["epoch"] + 1 for part in parts for x in part if x["split"] == "train"}
    return [
        [{**x, "epoch": epochs.get(x["step"], x["epoch"]), "seconds": None} for x in part]
        for part in parts
    ]


def assert_moved_alike(before: dict, came: dict, needed: dict, tolerance: float) -> None:
    """Check that vectors differ by at most ``tolerance`` times the distance that the old code moved
    them since the checkpoint."""
    assert came.keys() == needed.keys() == before.keys()
    off = {}
    for key, value in needed.items():
        way = torch.linalg.vector_norm(value - before[key])
        distance = torch.linalg.vector_norm(came[key] - value)
        if "_ema." in key:  # HEAD may average differently: check only how far the average moves
            moved = torch.linalg.vector_norm(came[key] - before[key])
            assert 0.1 * way < moved < 10 * way, key
        elif distance > tolerance * way:
            off[key] = f"{distance / way:.1e}"
    assert not off


def assert_same_line(came: dict, needed: dict, name: str) -> None:
    """Compare two lines of metrics.jsonl. For an averaged network, compare only metric names."""
    assert came.keys() == needed.keys()
    for key, value in needed.items():
        if isinstance(value, dict) and not key.endswith("_ema"):
            assert_same_line(came[key], value, name)
        elif isinstance(value, dict):
            assert came[key].keys() == value.keys()
        elif isinstance(value, float) and key not in CLOCKED | BY_STEPS | {"learning_rate"}:
            assert came[key] == pytest.approx(value, rel=TOLERANCE.get(name, IN_FLOAT32)), key
        elif key not in CLOCKED | BY_STEPS:
            assert came[key] == value, key


def comparable_draws(name: str) -> bool:
    """Return whether the draws of a run can be compared. Dropout on a CPU draws other numbers if
    torch has no MKL, for example on ARM."""
    return name != "dropout" or torch.backends.mkl.is_available()


def digest(state: torch.Tensor) -> str:
    plain = (str(state.dtype), tuple(state.shape), state.tolist())
    return hashlib.sha256(repr(plain).encode()).hexdigest()


@pytest.mark.parametrize("run", ["mid-epoch"], indirect=True)
def test_the_commands_read_an_old_run(run, capsys):
    """The best checkpoint has the results of 0b69d99, and it can be exported and reported."""
    [validated] = [line for line in read_lines(run) if line["split"] == "val"]
    main(["evaluate", str(run), "--json"])
    came = json.loads(capsys.readouterr().out)
    assert came["step"] == validated["step"]
    for name in ("teacher", "student"):
        assert came["networks"][name]["nll"] == pytest.approx(validated[name]["nll"], rel=1e-4)
    main(["export", str(run), "--to", "safetensors"])
    assert (run / "export" / "student" / "model.safetensors").exists()
    page = run.parent / "report.html"
    main(["report", str(run), "--output", str(page)])
    assert "old-run" in page.read_text("utf-8")
