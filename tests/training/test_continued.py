"""A run that is killed at any step and resumed ends like a run that was never killed.

A killed run is a copy of a run's folder between two steps, because SIGKILL leaves the same files.
One run gives the copies of all steps, and the tests resume each copy in this process.
"""

import dataclasses
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import TINY_RUN, components_of, metrics, same, tiny_state
from test_step import a_batch, run_steps

from bdkd.cli import main
from bdkd.cli.train import parse
from bdkd.config import load_recipe
from bdkd.engine.optim import AdamConfig
from bdkd.engine.progress import Best
from bdkd.runs.checkpoint import load_checkpoint, save_checkpoint
from bdkd.runs.folder import RunFolder
from bdkd.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_figures")

# Three epochs of 12 steps, with a log interval of 7 steps and a checkpoint every 5. So most
# checkpoints lie within an interval and have to save its sums. Dropout draws from the saved random
# state.
OPTIONS = [
    "--log-every", "7", "--checkpoint.every-steps", "5", "--train.ema-decay", "0.9",
    "--train.clip-norm", "1", "--optimizer.name", "adamw", "--optimizer.learning-rate", "1e-3",
    "--networks.teacher.model", "wrn_10_1", "--networks.teacher.options", "dropout", "0.3",
    "--data.crop", "1", "--data.flip", "--train.precision", "bf16", "--train.accumulate", "2",
]  # fmt: skip


class CopiedRun:
    """A data source that copies the run's folder before the training batches of some steps."""

    def __init__(self, source, run: Path, copies: Path, steps: set[int]) -> None:
        self.source, self.run, self.copies, self.steps, self.done = source, run, copies, steps, 0

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    def train_batches(self, *arguments):
        for batch in self.source.train_batches(*arguments):
            if self.done in self.steps:
                for thread in threading.enumerate():
                    if thread.name == "checkpoint":
                        thread.join()
                shutil.copytree(self.run, self.copies / str(self.done))
            self.done += 1
            yield batch


# Before the first step; before the first checkpoint; at the end of an epoch, where the best
# checkpoint is the newest; three steps after a checkpoint, with a log line in between; and in the
# last epoch.
KILLED = [0, 3, 12, 23, 31]


@pytest.fixture(scope="module")
def whole(without_figures, tmp_path_factory):
    """Return a folder with the unkilled run, its copies, and the student's initial weights."""
    folder = tmp_path_factory.mktemp("whole")
    weights = folder / "weights.pt"
    stranger = components_of(parse([*TINY_RUN, "--seed", "5"], load_recipe(*TINY_RUN)).config)
    torch.save(stranger.networks.members["student"].state_dict(), weights)
    options = [*OPTIONS, "--networks.student.weights", str(weights)]
    components = components_of(parse([*TINY_RUN, *options], load_recipe(*TINY_RUN)).config)
    copied = CopiedRun(components.source, folder / "run", folder / "copies", {*KILLED})
    components = dataclasses.replace(components, source=copied)
    Trainer(components).train(RunFolder(folder / "run"), progress_bar=False)
    return folder


@pytest.mark.parametrize("step", KILLED)
def test_a_run_killed_between_two_steps_ends_like_the_whole_run(step, whole, tmp_path, capsys):
    """Compare checkpoints, metrics, summary and predictions. Without a checkpoint the run starts
    again from its initial weights. With one it does not need the file of the initial weights."""
    run = Path(shutil.copytree(whole / "copies" / str(step), tmp_path / "run"))
    assert not (run / "summary.json").exists()
    if step >= 5:
        text = (run / "config.toml").read_text()
        (run / "config.toml").write_text(text.replace("weights.pt", "gone.pt"))
    main(["train", "--resume", "--run-dir", str(run)])
    # At 12, the end of an epoch, the best checkpoint is the newest one.
    begins = step if step == 12 else step // 5 * 5
    said = capsys.readouterr().out
    assert f"continuing at step {begins}, " in said
    assert "\n  3/3  36/36  " in said
    assert_same_run(run, whole / "run")


def test_a_run_in_two_sessions_by_max_steps_equals_one_session(whole, tmp_path):
    """The schedule depends on the epochs and not on max_steps. The first session ends with an
    evaluation and a checkpoint of its own, and everything else is the same."""
    run = tmp_path / "run"
    weights = ["--networks.student.weights", str(whole / "weights.pt")]
    main(["train", *TINY_RUN, *OPTIONS, *weights, "--max-steps", "14", "--run-dir", str(run)])
    assert [line["step"] for line in metrics(run)] == [7, 12, 14, 14]
    main(["train", "--resume", "--run-dir", str(run), "--max-steps", "None"])
    came, needed = (load_checkpoint(RunFolder(r).step_path(36))[1] for r in (run, whole / "run"))
    for key in ("networks", "ema", "optimizer", "schedule", "skipped"):
        assert same(came[key], needed[key]), key
    train, of_whole = (
        [line for line in metrics(r) if line["split"] == "train"] for r in (run, whole / "run")
    )
    assert train == of_whole


def test_a_resume_of_a_finished_run_changes_nothing(whole, tmp_path):
    run = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    main(["train", "--resume", "--run-dir", str(run), "--quiet"])
    assert_same_run(run, whole / "run")
    before = (whole / "run" / "metrics.jsonl").read_bytes()
    assert (run / "metrics.jsonl").read_bytes() == before


def assert_same_run(run: Path, whole: Path) -> None:
    """Check that two runs wrote the same files, except for times."""
    names = [sorted(path.name for path in (r / "checkpoints").iterdir()) for r in (run, whole)]
    assert names[0] == names[1]
    for name in names[0]:
        came, needed = (load_checkpoint(r / "checkpoints" / name)[1] for r in (run, whole))
        del came["position"]["seconds"], needed["position"]["seconds"]
        for key in needed:
            assert same(came[key], needed[key]), (name, key)
    assert metrics(run) == metrics(whole)
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, whole)]
    for summary in summaries:
        del summary["wall_seconds"], summary["images_per_second"]
    assert summaries[0] == summaries[1]
    predictions = [load_file(r / "predictions.safetensors") for r in (run, whole)]
    assert same(*predictions)


def observed(state) -> dict:
    """Return everything that decides how a training state continues, as the training reads it."""
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    return {
        "networks": [value.clone() for value in state.networks.state_dict().values()],
        "averages": [v.clone() for a in state.ema.values() for v in a.state_dict().values()],
        "updates of the averages": (int(state.ema_updates), state.ema_copied_until),
        "moments": [
            {key: value.clone() for key, value in state.optimizer.state[p].items()}
            for p in parameters
        ],
        "loss scale": (state.scaler.get_scale(), state.scaler.state_dict()["_growth_tracker"]),
        "skipped": state.skipped.tolist(),
        "position": vars(state.progress).copy(),
        "schedule": vars(state.span).copy(),
        "best": state.best and vars(state.best).copy(),
        "log interval": {k: v.clone() for k, v in vars(state.meter).items() if k in SUMS}
        | {name: value.clone() for name, value in state.meter.statistics.items()},
        "random numbers": torch.rand(3),
    }


SUMS = {"samples", "trained", "sums", "gaps"}


def test_a_loaded_state_equals_the_saved_one_in_every_part(tmp_path):
    """Every part of the saved state differs from a new state."""
    options = {"optimizer": AdamConfig("adamw", learning_rate=1e-3), "ema_decay": 0.9,
               "precision": "fp16", "epochs": 2}  # fmt: skip
    state = tiny_state(**options)
    state.scaler.scale(torch.ones(()))  # a scaler creates its scale at its first use
    state.scaler.update(512.0)
    run_steps(state, [a_batch(seed=1), a_batch(seed=2, poisoned=True)])
    state.meter.read()  # discards the NaN of the skipped step
    run_steps(state, [a_batch(seed=3)])
    state.progress.validation_due, state.progress.seconds = True, 12.5
    state.progress.epoch = 1
    state.span.batch_size, state.span.start, state.span.phase = 8, 3.0, 0.25
    state.best = Best(2, 0.625)
    state.ema_copied_until = 1
    torch.manual_seed(77)
    torch.rand(5)
    save_checkpoint(tmp_path / "state.pt", "", state.state_dict())
    needed = observed(state)

    fresh = tiny_state(**options)
    run_steps(fresh, [a_batch(seed=9)])
    with torch.no_grad():
        for value in fresh.networks.parameters():
            value.add_(1.0)
    began = observed(fresh)
    for key in needed:
        assert not same(began[key], needed[key]), key
    fresh.load_state_dict(load_checkpoint(tmp_path / "state.pt")[1])
    came = observed(fresh)
    for key in needed:
        assert same(came[key], needed[key]), key
