"""Progress is counted in images and epochs, so a resumed run follows a changed recipe."""

import itertools
import json
from pathlib import Path

import pytest
from small_runs import TINY_RUN

from bdkd.cli import main
from bdkd.config import load_recipe
from bdkd.runs.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("without_figures")

IMAGES = 48  # training images of TINY_RUN; 12 steps of 4 are an epoch


def train(run: Path, *options: str) -> list[dict]:
    """Train or resume a run, and return the training lines of its metrics."""
    begins = [*TINY_RUN] if not run.exists() else ["--resume"]
    main(["train", *begins, "--run-dir", str(run), "--quiet", *options])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def place(run: Path) -> tuple[int, int, int]:
    newest = max((run / "checkpoints").glob("step-*.pt"))
    position = load_checkpoint(newest)[1]["position"]
    return position["step"], position["epoch"], position["seen"]


@pytest.mark.parametrize(
    ("stopped", "batch_size", "unit"),
    [
        (5, 8, "epochs"),  # in the warm-up
        (5, 2, "steps"),
        (12, 16, "steps"),  # at the end of the warm-up
        (17, 5, "epochs"),  # in the decay; the rest of the epoch is not divisible by 5 images
        (17, 16, "epochs"),
    ],
)
def test_another_batch_size_trains_the_same_epochs(tmp_path, stopped, batch_size, unit):
    """The run ends with the same last epoch, and the learning rate continues without a jump."""
    warmup = ["--schedule.unit", unit, "--schedule.warmup", "1" if unit == "epochs" else "12"]
    before = train(tmp_path / "run", *warmup, "--max-steps", str(stopped))
    lines = train(tmp_path / "run", "--train.batch-size", str(batch_size), "--max-steps", "None")
    step, epoch, seen = place(tmp_path / "run")
    assert (epoch, seen) == (3, 0)
    left_in_epoch = (IMAGES - 4 * stopped % IMAGES) // batch_size
    whole_epochs = 3 - 4 * stopped // IMAGES - 1
    assert step == stopped + left_in_epoch + whole_epochs * (IMAGES // batch_size)
    assert [line["step"] for line in lines] == list(range(1, step + 1))
    rates = [line["learning_rate"] for line in lines]
    assert rates[:stopped] == [line["learning_rate"] for line in before]
    # The steepest slope over the images of one step and of a rest that fills no batch.
    slope = 0.05 / 12 * 2 * max(batch_size, 4) / 4
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= slope
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize("epochs", [2, 5])
def test_another_number_of_epochs_continues_at_the_same_rate(tmp_path, epochs):
    train(tmp_path / "run", "--max-steps", "17")
    lines = train(tmp_path / "run", "--train.epochs", str(epochs), "--max-steps", "None")
    assert place(tmp_path / "run") == (12 * epochs, epochs, 0)
    rates = [line["learning_rate"] for line in lines]
    steps = [abs(a - b) for a, b in itertools.pairwise(rates[12:])]
    assert max(steps) < 0.05 * 0.2  # a schedule that started again would jump by more
    assert abs(rates[17] - rates[16]) < 0.05 * 0.12
    assert rates[17:] == sorted(rates[17:], reverse=True)
    assert rates[-1] < 0.05 * 0.1


def test_a_second_resume_keeps_the_changed_schedule(tmp_path):
    """A run that is stopped again after the change ends like a run that is stopped only once."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    change = ["--train.epochs", "5", "--train.batch-size", "8"]
    for run in (once, twice):
        train(run, "--max-steps", "17")
    lines = train(once, *change, "--max-steps", "None")
    train(twice, *change, "--max-steps", "21")
    assert [line["learning_rate"] for line in train(twice, "--max-steps", "None")] == [
        line["learning_rate"] for line in lines
    ]


def test_an_extended_run_prints_the_rate_at_which_it_continues(tmp_path, capsys):
    """Near the end of a schedule the learning rate may be almost 0."""
    run = tmp_path / "run"
    main(["train", *TINY_RUN, "--run-dir", str(run), "--max-steps", "34"])
    main(["train", "--resume", "--run-dir", str(run), "--train.epochs", "4", "--max-steps", "35"])
    said = capsys.readouterr().out
    assert "ends with epoch 4; the learning rate continues at 0.017 of its peak" in said


@pytest.mark.parametrize(("stopped", "batch_size"), [(20, 32), (35, 8)])
def test_an_epoch_that_ends_with_a_resume_is_evaluated(tmp_path, stopped, batch_size):
    """Less than a new batch is left of the epoch, either in the middle or at the end of the run."""
    run = tmp_path / "run"
    train(run, "--max-steps", str(stopped))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(
        "".join(f"{line}\n" for line in lines if '"val"' not in line)  # not that of the stop
    )
    for _ in range(2):
        train(run, "--train.batch-size", str(batch_size), "--max-steps", "None")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [(line["step"], line["epoch"]) for line in lines if line["split"] == "val"]
    assert evaluated == ([(20, 2), (21, 3)] if stopped == 20 else [(35, 3)])
    assert place(run) == (21 if stopped == 20 else 35, 3, 0)


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulate", ["1", "2"])
@pytest.mark.parametrize("stopped", [None, 1, 12, 13, 17])
def test_lines_of_one_step_have_one_epoch(tmp_path, stopped, accumulate):
    """Lines of training, validation and test images count epochs from 1, from the first step to the
    last. max_steps may stop the run at the end of an epoch or in the middle of one."""
    run = tmp_path / "run"
    options = ["--train.accumulate", accumulate, "--watch-test"]
    train(run, *options, *(["--max-steps", str(stopped)] if stopped else []))
    epochs = {step: (step - 1) // 12 + 1 for step in range(1, (stopped or 36) + 1)}
    evaluated = sorted({12, 24, 36, stopped or 36} & epochs.keys())
    came = [(line["split"], line["step"], line["epoch"]) for line in metrics_of(run)]
    for split, steps in (("train", epochs), ("val", evaluated), ("test", evaluated)):
        assert [x for x in came if x[0] == split] == [(split, s, epochs[s]) for s in steps]
    seconds = [line["seconds"] for line in metrics_of(run)]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_an_epoch_keeps_its_number_when_a_resume_changes_the_batch(tmp_path):
    """The run stops in the second epoch after 20 of 48 images. 3 batches of 8 are left of it."""
    run = tmp_path / "run"
    train(run, "--max-steps", "17")
    train(run, "--train.batch-size", "8", "--max-steps", "None")
    came = [(line["split"], line["step"], line["epoch"]) for line in metrics_of(run)]
    epochs = {**dict.fromkeys(range(1, 13), 1), **dict.fromkeys(range(13, 21), 2)}
    epochs |= dict.fromkeys(range(21, 27), 3)
    assert [x for x in came if x[0] == "train"] == [("train", s, e) for s, e in epochs.items()]
    assert [x for x in came if x[0] == "val"] == [("val", s, epochs[s]) for s in (12, 17, 20, 26)]


def test_a_resume_converts_the_epochs_of_an_older_version(tmp_path):
    """The older version wrote the index of the epoch for training, the number of whole epochs for
    evaluations, and no time. max_steps stopped the run in the second epoch."""
    run = tmp_path / "run"
    train(run, "--max-steps", "14")
    before = metrics_of(run)
    old = [
        {"step": 1, "epoch": 0, "split": "train", "student": {"loss": 1.5, "top1": 0.25}},
        {"step": 12, "epoch": 0, "split": "train", "student": {"loss": 1.25, "top1": 0.5}},
        {"step": 12, "epoch": 1, "split": "val", "student": {"top1": 0.5}},
        {"step": 13, "epoch": 1, "split": "train", "student": {"loss": 1.0, "top1": 0.5}},
        {"step": 14, "epoch": 1, "split": "train", "student": {"loss": 0.5, "top1": 0.75}},
        {"step": 14, "epoch": 1, "split": "val", "student": {"top1": 0.75}},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    expected = [
        {**line, "epoch": epoch, "seconds": None}
        for line, epoch in zip(old, [1, 1, 1, 2, 2, 2], strict=True)
    ]
    train(run, "--max-steps", "15")
    came = metrics_of(run)
    assert came[:6] == expected
    assert [(line["step"], line["epoch"]) for line in came[6:]] == [(15, 2), (15, 2)]
    assert came[6]["seconds"] > before[-1]["seconds"]  # the time of the checkpoint continues
    train(run, "--max-steps", "None")  # a second resume does not convert them again
    assert metrics_of(run)[:6] == expected
    page = tmp_path / "report.html"
    main(["report", str(run), "--output", str(page), "--no-tsne"])
    assert "epoch" in page.read_text("utf-8")


def test_a_finished_run_with_more_epochs_says_that_the_rate_rises(tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", *TINY_RUN, "--run-dir", str(run), "--train.epochs", "2"])
    main(["train", "--resume", "--run-dir", str(run), "--train.epochs", "3"])
    said = capsys.readouterr().out
    assert "the schedule of 2 epochs had ended: for train.epochs 3" in said
    # In a run of 3 epochs with one epoch of warm-up, half of the decay is left
    assert "rises again, from 0 to 0.5 of its peak" in said
    assert place(run) == (36, 3, 0)


@pytest.mark.parametrize(
    "options",
    [
        ["--train.epochs", "1"],
        ["--max-steps", "10"],
        ["--max-steps", "1000", "--train.epochs", "1", "--train.batch-size", "24"],
        ["--train.epochs", "1", "--profile"],
    ],
)
def test_a_resume_at_or_past_the_end_prints_the_final_table(tmp_path, capsys, options):
    run = tmp_path / "run"
    main(["train", *TINY_RUN, "--run-dir", str(run), "--max-steps", "17"])
    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    main(["train", "--resume", "--run-dir", str(run), *options])
    said = capsys.readouterr().out
    assert "nothing is left to train" in said
    assert "top-1" in said
    assert (run / "metrics.jsonl").read_bytes() == before
    assert place(run)[0] == 17


def test_the_tiny_recipe_has_the_values_that_these_tests_assume():
    recipe = load_recipe(TINY_RUN[0])
    assert (recipe.train.epochs, recipe.train.batch_size) == (3, 4)
    assert (recipe.optimizer.learning_rate, recipe.schedule.name) == (0.05, "cosine")
