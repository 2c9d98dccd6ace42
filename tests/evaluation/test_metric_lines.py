"""The epoch in lines of metrics.jsonl has the same meaning for files of all versions."""

import json
from pathlib import Path

import pytest

from bdkd.evaluation.metric_lines import LineReader
from bdkd.evaluation.report.runs import read_run
from bdkd.runs.folder import RunFolder

# A file of the version before the key `seconds`, with three steps per epoch, logged every two
# steps. max_steps ended the run at step 8, in the middle of the third epoch. Training lines contain
# the epoch counted from 0. Evaluation lines contain the number of finished epochs.
OLD = """\
{"step": 2, "epoch": 0, "split": "train", "student": {"loss": 1.5, "top1": 0.25}}
{"step": 3, "epoch": 1, "split": "val", "student": {"top1": 0.5}}
{"step": 4, "epoch": 1, "split": "train", "student": {"loss": 1.25, "top1": 0.5}}
{"step": 6, "epoch": 1, "split": "train", "student": {"loss": 1.0, "top1": 0.5}}
{"step": 6, "epoch": 2, "split": "val", "student": {"top1": 0.75}}
{"step": 6, "epoch": 2, "split": "test", "student": {"top1": 0.75}}
{"step": 8, "epoch": 2, "split": "train", "student": {"loss": 0.5, "top1": 0.75}}
{"step": 8, "epoch": 2, "split": "val", "student": {"top1": 1.0}}
{"step": 8, "epoch": 2, "split": "test", "student": {"top1": 1.0}}
"""
EPOCHS = [1, 1, 2, 2, 2, 2, 3, 3, 3]  # epoch of each line, counted from 1


def epochs(text: str) -> list[int]:
    reader = LineReader()
    return [reader.parse(line)["epoch"] for line in text.splitlines()]


def write(folder: Path, text: str) -> RunFolder:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(text)
    return RunFolder(folder)


def test_lines_of_an_old_version_get_the_epoch_of_their_step():
    """Only the epoch changes. The time of an old line is unknown."""
    reader = LineReader()
    for line, epoch in zip(OLD.splitlines(), EPOCHS, strict=True):
        expected = {**json.loads(line), "epoch": epoch, "seconds": None}
        assert reader.parse(line) == expected


def test_a_file_that_a_resume_rewrote_is_not_converted_again(tmp_path):
    """This holds for any number of resumes, and if a resume was killed after it rewrote the
    file."""
    folder = write(tmp_path, OLD)
    folder.drop_after(8)
    once = folder.metrics.read_bytes()
    assert [line["epoch"] for line in folder.read_metrics()] == EPOCHS
    folder.drop_after(8)
    assert folder.metrics.read_bytes() == once
    folder.drop_after(6)
    assert [line["epoch"] for line in folder.read_metrics()] == EPOCHS[:6]


@pytest.mark.parametrize("rewritten", range(10))
def test_a_file_may_contain_lines_of_two_versions(rewritten):
    """The first lines are of the new version. The old version appended the other lines."""
    reader, lines = LineReader(), OLD.splitlines()
    new = [json.dumps(reader.parse(line)) for line in lines[:rewritten]]
    assert epochs("\n".join([*new, *lines[rewritten:]])) == EPOCHS


def test_a_line_of_this_version_is_not_changed():
    """This holds even if the epoch differs from that of the training line of the same step."""
    text = (
        '{"step": 4, "epoch": 2, "split": "train", "seconds": 1.5}\n'
        '{"step": 4, "epoch": 7, "split": "val", "seconds": 2.5}\n'
        '{"step": 4, "epoch": 8, "split": "val", "seconds": null}\n'
    )
    assert epochs(text) == [2, 7, 8]


@pytest.mark.parametrize("epoch", ["null", '"2"', "true", "2.5", "[]"])
def test_an_epoch_that_is_not_an_integer_is_not_changed(epoch):
    line = f'{{"step": 4, "epoch": {epoch}, "split": "train", "student": {{"loss": 1.0}}}}'
    assert LineReader().parse(line) == json.loads(line)


def test_both_evaluations_of_an_epoch_that_a_resume_shortened_belong_to_it():
    """max_steps stopped the run at step 4. The resumed run had batches larger than the rest of the
    epoch, so that the epoch ended at the same step."""
    text = (
        '{"step": 4, "epoch": 1, "split": "train"}\n'
        '{"step": 4, "epoch": 1, "split": "val"}\n'
        '{"step": 4, "epoch": 2, "split": "val"}\n'
        '{"step": 5, "epoch": 2, "split": "train"}\n'
    )
    assert epochs(text) == [2, 2, 2, 3]


def new_format(*lines: tuple[int, int, str]) -> str:
    named = ({"step": s, "epoch": e, "split": split, "seconds": 1.0} for s, e, split in lines)
    return "".join(json.dumps({**line, "student": {"top1": 0.5}}) + "\n" for line in named)


T, V = "train", "val"


@pytest.mark.parametrize(
    ("text", "config", "steps"),
    [
        (OLD, "max_steps = 8", 3),
        (OLD, "", 3),
        # Stopped in its first epoch: the length of an epoch is not known.
        (new_format((2, 1, T), (2, 1, V)), "max_steps = 2", None),
        (new_format((2, 1, T)), "", None),
        (new_format((2, 1, T), (3, 1, V)), "", 3),
        # Evaluated every 2 epochs, and stopped in the third.
        (new_format((2, 1, T), (4, 2, T), (6, 2, V), (7, 3, T), (7, 3, V)), "max_steps = 7", 3),
        # Stopped at step 2, and resumed without max_steps: the evaluation at step 2 did not end an
        # epoch.
        (new_format((2, 1, T), (2, 1, V), (3, 1, T), (4, 2, T)), "", None),
        (new_format((2, 1, T), (2, 1, V), (3, 1, T), (3, 1, V), (4, 2, T)), "", 3),
    ],
)
def test_a_report_takes_steps_per_epoch_from_finished_epochs(text, config, steps, tmp_path):
    write(tmp_path, text)
    (tmp_path / "config.toml").write_text(config)
    assert read_run(tmp_path).steps_per_epoch == steps
