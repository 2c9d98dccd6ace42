"""A killed and resumed run ends bit for bit like a run that was never killed."""

import json
import signal

import pytest
from small_runs import SMALL, bdkd, interrupt_at, metrics, same

from bdkd.runs.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Return the folder of the run that is never killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = bdkd("train", *SMALL, "--run-dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_end(run, whole_run) -> None:
    [final] = sorted((whole_run / "checkpoints").glob("step-*"))[-1:]
    _, expected = load_checkpoint(final)
    _, came = load_checkpoint(run / "checkpoints" / final.name)
    for state in (expected, came):
        del state["position"]["seconds"]
    for key in expected:
        assert same(came[key], expected[key]), key
    assert metrics(run) == metrics(whole_run)
    came, expected = (json.loads((p / "summary.json").read_text()) for p in (run, whole_run))
    assert came["networks"] == expected["networks"]


@pytest.mark.parametrize(
    "step", [13, *(pytest.param(step, marks=pytest.mark.soak) for step in range(1, 38))]
)
def test_sigkill_then_resume_gives_the_same_weights(step, whole_run, tmp_path):
    """Kill the run between two checkpoints. ``test_continued`` tests other steps."""
    run = tmp_path / "run"
    code, _ = interrupt_at(step, signal.SIGKILL, *SMALL, "--run-dir", str(run))
    assert code == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    done = bdkd("train", "--resume", "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert "continuing at step" in done.stdout
    assert_same_end(run, whole_run)


def test_a_signal_saves_a_checkpoint_and_prints_how_to_resume(whole_run, tmp_path):
    run = tmp_path / "a run"  # a path with a space
    came, errors = interrupt_at(7, signal.SIGTERM, *SMALL, "--run-dir", str(run))
    assert came == 143
    assert errors.count("\n") == 1
    assert "--resume" in errors
    saved = sorted((run / "checkpoints").glob("step-*"))
    assert saved
    assert int(saved[-1].stem.split("-")[1]) in (7, 8, 9)  # the signal arrives in one of them
    done = bdkd("train", "digits", "--resume", "auto", "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_end(run, whole_run)
