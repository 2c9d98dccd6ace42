"""Runs of ten kinds, killed four times each at random moments, end like runs without a kill."""

import random
import signal
import subprocess
import sys
import time

import pytest
from launches import Launch, steps_done
from small_runs import TINY_RUN, metrics, same

from bdkd.cli import main
from bdkd.runs.checkpoint import load_checkpoint

KILLS = 4
COMMON = [*TINY_RUN, "--checkpoint.every-steps", "2"]
KINDS = {
    "sgd": [],
    "adamw, clipped": ["--optimizer.name", "adamw", "--optimizer.learning-rate", "1e-3",
                       "--train.clip-norm", "1"],
    "averages": ["--train.ema-decay", "0.9"],
    "bf16, accumulated": ["--train.precision", "bf16", "--train.accumulate", "2"],
    "loss scale": ["--train.precision", "fp16"],
    "dropout": ["--networks.teacher.model", "wrn_16_1", "--networks.teacher.options", "dropout",
                "0.3"],
    "a teacher that pauses": ["--objective.name", "switokd"],
    "evaluated often, checkpoints seldom": ["--checkpoint.every-steps", "500"],
    "two ranks": ["--train.ema-decay", "0.9"],
    "a shared teacher": ["--networks.teacher.shard"],
}  # fmt: skip
RANKS = {"two ranks": 2, "a shared teacher": 2}


def state_of(run):
    newest = max((run / "checkpoints").glob("step-*.pt"))
    state = load_checkpoint(newest)[1]
    del state["position"]["seconds"]
    return newest.name, state


def train_and_kill(run, rng, options, ranks) -> None:
    """Start or resume the run, and kill it up to 0.1 s after a random step."""
    resume = ["--resume", "--run-dir", str(run)] if run.exists() else [*COMMON, *options]
    step = steps_done(run) + rng.randint(1, 8)
    if ranks > 1:
        with Launch(ranks, run, *resume) as launch:
            launch.until(lambda: steps_done(run) >= step)
            time.sleep(rng.random() / 10)
        return  # leaving the block killed every process
    arguments = [*resume, *([] if run.exists() else ["--run-dir", str(run)])]
    process = subprocess.Popen(
        [sys.executable, "-m", "bdkd", "train", *arguments], stdout=subprocess.DEVNULL
    )
    while steps_done(run) < step and process.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.random() / 10)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_repeatedly_ends_like_an_unkilled_run(kind, tmp_path):
    rng, options, ranks = random.Random(kind), KINDS[kind], RANKS.get(kind, 1)
    whole, run = tmp_path / "whole", tmp_path / "run"
    if ranks > 1:
        with Launch(ranks, whole, *COMMON, *options) as launch:
            assert launch.end() == 0, launch.text()
    else:
        main(["train", *COMMON, *options, "--run-dir", str(whole), "--quiet"])
    for _ in range(KILLS):
        if not (run / "summary.json").exists():
            train_and_kill(run, rng, options, ranks)
    if ranks > 1:
        with Launch(ranks, run, "--resume", "--run-dir", str(run)) as launch:
            assert launch.end() == 0, launch.text()
    else:
        main(["train", "--resume", "--run-dir", str(run), "--quiet"])
    assert not list((run / "checkpoints").glob("*.damaged"))
    (name, came), (expected_name, expected) = state_of(run), state_of(whole)
    assert name == expected_name
    for key in expected:
        assert same(came[key], expected[key]), key
    assert metrics(run) == metrics(whole)
