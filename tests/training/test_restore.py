"""Messages of a resume about its checkpoint, and the checkpoints that a resume refuses."""

from functools import partial

import pytest
import torch
from small_runs import Tiny, tiny_state
from test_step import a_batch, run_steps

from bdkd.distributed.context import DistributedContext
from bdkd.engine.optim import SGDConfig
from bdkd.engine.progress import Progress
from bdkd.errors import RunError
from bdkd.registry import OPTIMIZERS
from bdkd.runs.folder import RunFolder
from bdkd.runs.resume import print_changes, restore


@pytest.fixture
def path(tmp_path):
    return RunFolder(tmp_path).step_path(7)


def saved_state(**options) -> dict:
    """Return the state of a run of 1000 images in batches of 16 after two steps."""
    state = tiny_state(**options)
    run_steps(state, [a_batch(seed=1), a_batch(seed=2)])
    return dict(state.state_dict())


def test_progress_is_described_in_epochs_and_images():
    state = tiny_state()
    for epoch, seen, said in (
        (0, 0, "0 epochs done"),
        (1, 0, "1 epoch done"),
        (2, 320, "2 epochs and 320 of 1,000 images done"),
    ):
        state.progress = Progress(step=99, epoch=epoch, seen=seen)
        assert state.progress.describe(state.train_images) == said


@pytest.mark.parametrize("images", [999, 1001])
def test_another_number_of_training_images_is_refused(images, path):
    saved = {**saved_state(), "train_images": images}
    with pytest.raises(RunError, match=f"trained on {images} images, the data now has 1000"):
        restore(tiny_state(), path, saved)


@pytest.mark.parametrize("lost", ["networks", "optimizer", "position", "ranks", "train_images"])
def test_a_checkpoint_without_a_part_of_the_state_is_refused(lost, path):
    saved = saved_state()
    del saved[lost]
    with pytest.raises(RunError, match="contains other networks or another optimizer"):
        restore(tiny_state(), path, saved)


def test_wider_networks_are_refused(path):
    with pytest.raises(RunError, match="other networks"):
        restore(tiny_state(partial(Tiny, 8)), path, saved_state())


@pytest.mark.parametrize(("before", "now"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_moments_of_another_optimizer_are_refused(before, now, path):
    """torch itself loads AdamW's moments into SGD, which ignores them."""
    saved = saved_state(optimizer=OPTIMIZERS.configure(before))
    with pytest.raises(RunError, match="another optimizer"):
        restore(tiny_state(optimizer=OPTIMIZERS.configure(now)), path, saved)


def test_a_resumed_run_uses_the_rates_and_decays_of_its_recipe(path):
    """The moments come from the checkpoint, and the options come from the changed recipe."""
    saved = saved_state()
    new = SGDConfig("sgd", learning_rate=0.03, weight_decay=0.25, momentum=0.5)
    state = tiny_state(optimizer=new)
    restore(state, path, saved)
    for group in state.optimizer.param_groups:
        assert group["peak_rate"] == 0.03
        assert group["momentum"] == 0.5
        assert group["weight_decay"] in (0.25, 0.0)
    assert {group["weight_decay"] for group in state.optimizer.param_groups} == {0.25, 0.0}
    moments = [value["momentum_buffer"] for value in saved["optimizer"]["state"].values()]
    came = [value["momentum_buffer"] for value in state.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(came, moments, strict=True))


@pytest.mark.parametrize(
    ("until", "updates", "warned"),
    [
        (100, 100, True),  # no update since the copy
        (100, 143, True),  # 0.9^43 is 1.08%
        (100, 144, False),  # 0.9^44 is 0.97%
        (None, 0, False),  # a run of this version
    ],
)
def test_averages_with_copied_statistics_are_warned_about(until, updates, warned, path, capsys):
    """Old versions copied the students' batch norm statistics into the averages. The copied values
    fade with the decay of the averages."""
    saved = saved_state(ema_decay=0.9)
    saved |= {"ema_copied_until": until, "ema_updates": torch.tensor(updates)}
    restore(tiny_state(ema_decay=0.9), path, saved)
    said = capsys.readouterr().err
    assert ("bdkd update-bn" in said) == warned
    assert (str(path) in said) == warned


def test_averages_missing_in_the_checkpoint_start_from_the_students(path):
    """Their updates are counted from the resume, so that their decay warms up."""
    saved = saved_state()
    state = tiny_state(ema_decay=0.9)
    restore(state, path, saved)
    assert int(state.ema_updates) == 0
    student = state.networks.members["student"].state_dict()
    average = state.ema["student_ema"].state_dict()
    assert all(torch.equal(average[key], student[key]) for key in student)


def test_a_changed_number_of_ranks_is_printed(capsys):
    state = tiny_state()
    saved = saved_state()
    print_changes(state, saved)
    assert capsys.readouterr().out == ""
    print_changes(state, {**saved, "ranks": saved["ranks"] * 4})
    said = capsys.readouterr().out
    assert said.startswith("resuming on 1 rank a run that trained on 4: ")
    assert "normalises over 16 images" in said
    state.context = DistributedContext(0, 2)
    print_changes(state, saved)
    said = capsys.readouterr().out
    assert said.startswith("resuming on 2 ranks a run that trained on 1: ")
    assert "normalises over 8 images" in said
