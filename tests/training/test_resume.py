"""A killed run, continued, ends where the run that was never killed ends: bit for bit."""

import json
import signal

import pytest
from small_runs import SMALL, bdkd, interrupt_at, metrics, same

from bdkd.training.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The run that is never killed."""
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


# before the first checkpoint; between two; at an epoch's end, where evaluation and best are written
@pytest.mark.parametrize(
    "step",
    [2, 13, 19, *(pytest.param(step, marks=pytest.mark.soak) for step in range(1, 38))],
)
def test_sigkill_then_resume_gives_the_same_weights(step, whole_run, tmp_path):
    run = tmp_path / "run"
    code, _ = interrupt_at(step, signal.SIGKILL, *SMALL, "--run-dir", str(run))
    assert code == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    done = bdkd("train", "--resume", "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert "continuing at step" in done.stdout
    assert_same_end(run, whole_run)


VARIANTS = {
    "adamw, bf16, accumulated, dropout": [
        "--optimizer.name", "adamw", "--optimizer.learning-rate", "1e-3",
        "--train.precision", "bf16", "--train.accumulate", "2",
        "--networks.teacher.model", "wrn_16_1", "--networks.teacher.options", "dropout", "0.3",
    ],
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_state_comes_back(variant, tmp_path):
    """Moments of AdamW, the random state of dropout, the parts of a batch, low precision."""
    short = [*SMALL, "--max-steps", "12", *VARIANTS[variant]]
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = bdkd("train", *short, "--run-dir", str(whole))
    assert done.returncode == 0, done.stderr
    interrupt_at(8, signal.SIGKILL, *short, "--run-dir", str(run))
    done = bdkd("train", "--resume", "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_end(run, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_names_the_way_on(number, code, whole_run, tmp_path):
    run = tmp_path / "a run"  # its folder has a space
    came, errors = interrupt_at(7, number, *SMALL, "--run-dir", str(run))
    assert came == code
    assert errors.count("\n") == 1
    assert "--resume" in errors
    saved = sorted((run / "checkpoints").glob("step-*"))
    assert saved
    assert int(saved[-1].stem.split("-")[1]) in (7, 8, 9)  # the step it was in
    done = bdkd("train", "digits", "--resume", "auto", "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_end(run, whole_run)


def test_resume_of_a_finished_run_changes_nothing(whole_run):
    before = (whole_run / "metrics.jsonl").read_bytes()
    done = bdkd("train", "--resume", "--run-dir", str(whole_run))
    assert done.returncode == 0, done.stderr
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_max_steps_stops_early_and_the_rest_follows(whole_run, tmp_path):
    """The schedule spans the epochs, so a run in two parts is the run in one."""
    run = tmp_path / "run"
    done = bdkd("train", *SMALL, "--max-steps", "12", "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    done = bdkd("train", "--resume", "--max-steps", "None", "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert "resuming with changed max_steps" in done.stdout
    [final] = sorted((whole_run / "checkpoints").glob("step-*"))[-1:]
    expected = load_checkpoint(final)[1]["networks"]
    assert same(load_checkpoint(run / "checkpoints" / final.name)[1]["networks"], expected)


def test_a_cut_checkpoint_falls_back_to_the_one_before(whole_run, tmp_path):
    run = tmp_path / "run"
    interrupt_at(13, signal.SIGKILL, *SMALL, "--run-dir", str(run))
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    done = bdkd("train", "--resume", "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert str(newest) in done.stdout  # said which one was left out
    assert_same_end(run, whole_run)
