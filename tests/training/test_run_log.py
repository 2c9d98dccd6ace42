"""The content of metrics.jsonl, the terminal and summary.json, with given times and results."""

import dataclasses
import json
import math
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import TINY_RUN, components_of, shown_step

from bdkd.cli import main
from bdkd.cli.train import parse
from bdkd.config import load_recipe
from bdkd.data import Batch
from bdkd.engine import throughput
from bdkd.engine.components import Components
from bdkd.errors import Interrupted, RunError
from bdkd.evaluation.predict import Evaluator
from bdkd.runs import checkpointer, log
from bdkd.runs import folder as run_folder
from bdkd.runs.checkpoint import load_checkpoint
from bdkd.runs.folder import RunFolder
from bdkd.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_figures")

# 48 training images in batches of 16: three steps an epoch.
SMALL = [
    *TINY_RUN, "--train.batch-size", "16", "--networks.teacher.options", "width", "0.13",
    "--networks.student.options", "width", "0.13", "--schedule.warmup", "1",
]  # fmt: skip


def set_up(*options: str) -> Components:
    return components_of(parse([*SMALL, *options], load_recipe(*TINY_RUN)).config)


def with_source(components: Components, source, *arguments) -> Components:
    return dataclasses.replace(components, source=source(components.source, *arguments))


def train(components: Components, run: Path, resume: str = "never") -> dict:
    return Trainer(components).train(RunFolder(run), resume=resume, progress_bar=False)


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def lines_of(run: Path, split: str) -> list[dict]:
    return [line for line in metrics_of(run) if line["split"] == split]


# --- logging, evaluation and checkpoint steps -----------------------------------------------------


def test_when_a_run_logs_evaluates_and_saves(tmp_path):
    """The run has five epochs and one step of a sixth. It logs every 6 steps, evaluates every 2
    epochs, saves every 5 steps, and does all three at the last step."""
    run = tmp_path / "run"
    main(["train", *SMALL, "--run-dir", str(run), "--quiet", "--train.epochs", "7", "--max-steps",
          "16", "--log-every", "6", "--evaluate-every", "2", "--checkpoint.keep", "9"])  # fmt: skip
    train, val = lines_of(run, "train"), lines_of(run, "val")
    # A line has the epoch of its step, counted from 1.
    assert [(line["step"], line["epoch"]) for line in train] == [(6, 2), (12, 4), (16, 6)]
    assert [(line["step"], line["epoch"]) for line in val] == [(6, 2), (12, 4), (16, 6)]
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*.pt"))
    assert saved == [f"step-{step:08d}.pt" for step in (5, 10, 15, 16)]
    # A line has the rate of its step: a linear warm-up of 3 steps, then a cosine to step 21.
    for line in train:
        done = (line["step"] - 1 - 3) / (21 - 3)
        assert line["learning_rate"] == pytest.approx(0.05 * (1 + math.cos(math.pi * done)) / 2)
    summary = json.loads((run / "summary.json").read_text())
    rates = sorted(line["images_per_second"] for line in train)
    assert summary["images_per_second"] == rates[1]  # the median of three


@pytest.mark.parametrize("validation", [0.0, 0.1])
def test_watched_test_images_are_logged_and_do_not_affect_selection(
    validation, tmp_path, monkeypatch
):
    """The selection is the same even if the results on test images are better in another epoch."""
    evaluate, top1 = Evaluator.evaluate, iter([0.2, 0.9, 0.1, 1.0, 0.3, 1.0])

    def prescribed(self, split):
        value = next(top1) if validation else 0.5
        return {k: dataclasses.replace(v, top1=value) for k, v in evaluate(self, split).items()}

    monkeypatch.setattr(Evaluator, "evaluate", prescribed)
    select = "best" if validation else "last"
    summary = train(
        set_up(
            "--train.epochs", "3", "--data.validation", str(validation), "--watch-test",
            "--train.select", select,
        ),
        tmp_path,
    )  # fmt: skip
    watched, validated = lines_of(tmp_path, "test"), lines_of(tmp_path, "val")
    assert len(watched) == 3
    assert len(validated) == (3 if validation else 0)
    assert watched[-1].keys() >= {"step", "epoch", "split", "teacher", "student"}
    steps = [line["step"] for line in watched]
    assert summary["selected_step"] == (steps[2] if validation else steps[-1])
    best = load_checkpoint(RunFolder(tmp_path).step_path(steps[-1]))[1]["best"]
    assert best == ({"step": steps[2], "top1": 0.3} if validation else None)


# --- times ----------------------------------------------------------------------------------------


class Clock:
    """A fake clock that advances only with the work of a run; see ``timed``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def takes(self, seconds: float, function):
        """Return the function with a duration of so many seconds on this clock."""

        def call(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return call


# Seconds of a step, of a wait for a batch, of an evaluation and of a checkpoint
STEP, WAIT, EVALUATION, SAVING = 3.0, 1.0, 100.0, 50.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (log, checkpointer, throughput):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(Trainer, "train_step", clock.takes(STEP, Trainer.train_step))
    monkeypatch.setattr(Evaluator, "evaluate", clock.takes(EVALUATION, Evaluator.evaluate))
    monkeypatch.setattr(checkpointer, "snapshot", clock.takes(SAVING, checkpointer.snapshot))
    return clock


class SlowSource:
    """A data source that takes ``WAIT`` seconds for each batch. It yields half of a batch,
    like one of two ranks, because the log must count the images of all ranks."""

    def __init__(self, source, clock: Clock) -> None:
        self.source, self.clock = source, clock

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    def train_batches(self, *arguments):
        for batch in self.source.train_batches(*arguments):
            self.clock.now += WAIT
            yield next(batch.micro_batches(2))[0]


def timed(clock: Clock, run: Path, resume: str, *options: str) -> dict:
    components = with_source(set_up(*options), SlowSource, clock)
    return train(components, run, resume)


def test_throughput_counts_only_training_and_wall_time_counts_everything(
    clock, tmp_path, monkeypatch, capsys
):
    """Evaluations and checkpoints fall into log intervals, but do not count for the throughput. The
    wall time counts them. It covers both sessions of a stopped run to their ends, although the
    first evaluation selects the best student."""
    evaluate, top1 = Evaluator.evaluate, iter((0.9, 0.5, 0.1))

    def worse_each_time(*arguments):
        value = next(top1)
        return {
            name: dataclasses.replace(result, top1=value)
            for name, result in evaluate(*arguments).items()
        }

    monkeypatch.setattr(Evaluator, "evaluate", worse_each_time)
    options = ["--train.epochs", "4", "--log-every", "2", "--checkpoint.every-steps", "2"]
    summary = timed(clock, tmp_path, "never", *options, "--max-steps", "6")
    # Epochs end at steps 3 and 6. Checkpoints are saved at steps 2, 3 (the best student), 4 and 6.
    # The wall time in the checkpoint of step 6 cannot include the time of that checkpoint.
    assert summary["selected_step"] == 3
    first = summary["wall_seconds"]
    assert first == pytest.approx(6 * (STEP + WAIT) + 2 * EVALUATION + 3 * SAVING)
    for line in lines_of(tmp_path, "train"):
        assert line["images_per_second"] == pytest.approx(16 / (STEP + WAIT))
        assert line["data_wait"] == pytest.approx(WAIT / (STEP + WAIT))
        assert line["mfu"] is None
    assert summary["images_per_second"] == pytest.approx(16 / (STEP + WAIT))
    # After four steps and two checkpoints, the estimate for a step is 4 seconds of training and 25
    # seconds of checkpoints. Two steps and an evaluation are left.
    [said] = [line for line in capsys.readouterr().out.splitlines() if shown_step(line) == 4]
    assert said.endswith(" 0:02:38")
    # ``seconds`` is the time until the line, with evaluations and earlier checkpoints.
    seconds = [(line["split"], line["step"], line["seconds"]) for line in metrics_of(tmp_path)]
    done = {step: step * (STEP + WAIT) for step in range(7)}
    assert seconds == [
        ("train", 2, done[2]),
        ("val", 3, done[3] + SAVING + EVALUATION),
        ("train", 4, done[4] + 2 * SAVING + EVALUATION),
        ("train", 6, done[6] + 3 * SAVING + EVALUATION),
        ("val", 6, done[6] + 3 * SAVING + 2 * EVALUATION),
    ]
    clock.now += 10_000  # the time between two sessions does not count
    summary = timed(clock, tmp_path, "require", *options, "--max-steps", "8")
    assert summary["wall_seconds"] - first == pytest.approx(2 * (STEP + WAIT) + EVALUATION)


def test_a_checkpoint_every_minute(clock, tmp_path):
    """Minutes count from the last checkpoint of any kind. A minute is 15 steps of this clock."""
    timed(clock, tmp_path, "never", "--train.epochs", "12", "--checkpoint.every-steps", "1000",
          "--checkpoint.every-minutes", "1", "--checkpoint.keep", "9", "--evaluate-every", "50",
          "--log-every", "1000")  # fmt: skip
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*.pt"))
    assert saved == [f"step-{step:08d}.pt" for step in (15, 30, 36)]


# --- messages -------------------------------------------------------------------------------------


class PoisonedSource:
    """A data source with a NaN in the training batches of some steps."""

    def __init__(self, source, steps: set[int]) -> None:
        self.source, self.steps, self.step = source, steps, 0

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    def train_batches(self, *arguments):
        for batch in self.source.train_batches(*arguments):
            self.step += 1
            if self.step in self.steps:
                batch = Batch(tuple(v * torch.nan for v in batch.views), batch.target)
            yield batch


def test_skipped_steps_are_counted_and_only_a_long_row_stops_the_run(tmp_path, capsys, monkeypatch):
    """Three times two skipped steps in a row, with good steps in between, are below the limit of
    three in a row."""
    poisoned = {2, 3, 5, 6, 9, 10}
    options = ["--train.epochs", "4", "--train.max-skipped", "3", "--checkpoint.every-steps", "1",
               "--checkpoint.keep", "20"]  # fmt: skip
    run = tmp_path / "run"
    train(with_source(set_up(*options), PoisonedSource, poisoned), run)
    for line in lines_of(run, "train"):
        assert line["skipped_steps"] == sum(step <= line["step"] for step in poisoned)
    said = capsys.readouterr().out.splitlines()
    rows = [int(line.split()[3]) for line in said if line.startswith("skipped up to")]
    assert rows == [1, 2, 2] * 3  # every step is logged, also the good step that ends a row
    # No checkpoint is saved within a row of skipped steps.
    saved = {int(path.stem[5:]) for path in (run / "checkpoints").glob("step-*.pt")}
    assert saved == {*range(1, 13)} - poisoned
    components = with_source(set_up(*options), PoisonedSource, {7, 8, 9})
    save = RunFolder.save

    def save_slowly(*arguments):  # the last good checkpoint is still being written at step 9
        time.sleep(0.3)
        return save(*arguments)

    monkeypatch.setattr(RunFolder, "save", save_slowly)
    with pytest.raises(RunError, match=r"3 steps in a row: the last good .*step-00000006\.pt"):
        train(components, tmp_path / "bad")


class SignallingSource(PoisonedSource):
    """A data source that sends a signal to this process before the fourth batch."""

    def __init__(self, source, number: int) -> None:
        super().__init__(source, set())
        self.number = number

    def train_batches(self, *arguments):
        for batch in super().train_batches(*arguments):
            if self.step == 4:
                signal.raise_signal(self.number)
            yield batch


@pytest.mark.parametrize("names", [("teacher", "student"), ("a_network" * 4, "b_network" * 4)])
def test_all_lines_of_a_run_fit_80_columns(names, tmp_path, capsys):
    """The run prints rows and evaluations of two networks and an average, students first."""
    components = set_up("--train.ema-decay", "0.5", "--watch-test", "--train.epochs", "2")
    recipe = components.recipe
    networks = dict(zip(names, recipe.networks.values(), strict=True))
    train(components_of(dataclasses.replace(recipe, networks=networks)), tmp_path)
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if not line.startswith("folder ")]
    assert max(map(len, lines)) <= 80
    for epoch in ("1/2", "2/2"):
        for title in ("val", "test (not used for selection)"):
            begins = re.escape(f"epoch {epoch}  {title}")
            [line] = re.findall(rf"^{begins}(?:  .*)?\n(?:    \S.*\n)*", said, re.M)
            order = re.findall(r"(\S+) top-1 [\d.]+% ECE [\d.]+%", line)
            teacher, student = names
            assert [name.endswith("_ema") for name in order] == [False, True, False]
            assert order == [student, f"{student}_ema", teacher]


def test_a_signal_in_the_last_step_leaves_a_finished_run(tmp_path):
    components = with_source(set_up("--max-steps", "4"), SignallingSource, signal.SIGTERM)
    summary = train(components, tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())


def test_a_stopped_run_does_not_say_saved_if_the_disk_is_full(tmp_path, monkeypatch):
    def save(path, *_):
        raise RunError(f"cannot write {path}")

    monkeypatch.setattr(run_folder, "save_checkpoint", save)
    components = with_source(set_up(), SignallingSource, signal.SIGTERM)
    with pytest.raises(RunError, match="cannot write"):
        train(components, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_in_which_it_arrives(number, tmp_path):
    """The exit code is 128 plus the number of the signal. The lines of metrics up to this step are
    written."""
    before = signal.getsignal(number)
    run = tmp_path / "a run"
    components = with_source(set_up("--log-every", "1"), SignallingSource, number)
    with pytest.raises(Interrupted) as stopped:
        train(components, run)
    assert stopped.value.exit_code == 128 + number
    assert f"--resume --run-dir '{run}'" in str(stopped.value)
    assert f"stopped at step 4, saved in {RunFolder(run).step_path(4)}" in str(stopped.value)
    position = load_checkpoint(RunFolder(run).step_path(4))[1]["position"]
    assert (position["step"], position["epoch"], position["seen"]) == (4, 1, 16)
    assert [line["step"] for line in lines_of(run, "train")] == [1, 2, 3, 4]
    assert signal.getsignal(number) == before
    RunFolder(run).open_for_training("require")  # the lock is free again


# --- the summary ----------------------------------------------------------------------------------


def test_the_summary_evaluates_the_selected_weights_on_the_test_images(tmp_path):
    """Compare each network with a plain evaluation of the selected checkpoint."""
    run = tmp_path / "run"
    options = ["--train.ema-decay", "0.5", "--train.epochs", "2", "--train.batch-size", "8",
               "--networks.teacher.options", "width", "0.25"]  # fmt: skip
    main(["train", *SMALL, *options, "--run-dir", str(run), "--quiet"])
    summary = json.loads((run / "summary.json").read_text())
    lines = lines_of(run, "val")
    best = max(lines, key=lambda line: (line["student_ema"]["top1"], line["step"]))["step"]
    assert summary["selected_step"] == best
    saved = load_checkpoint(RunFolder(run).best_path(best))[1]
    components = set_up(*options)
    weights = {
        name: {
            key.removeprefix(f"members.{name}."): value
            for key, value in saved["networks"].items()
            if key.startswith(f"members.{name}.")
        }
        for name in ("teacher", "student")
    } | saved["ema"]
    assert summary["networks"].keys() == weights.keys()
    (batch,) = components.source.eval_batches("test", 1000)
    for name, own in weights.items():
        network = components.networks.members[name.removesuffix("_ema")]
        network.load_state_dict(own)
        network.eval()
        with torch.no_grad():
            p = network(batch.views[0]).double().softmax(-1)
        came = summary["networks"][name]
        truth = torch.nn.functional.one_hot(batch.target, 3)
        nll = -p[torch.arange(len(p)), batch.target].log().mean()
        assert came["top1"] == (p.argmax(-1) == batch.target).double().mean()
        assert came["nll"] == pytest.approx(nll.item(), rel=1e-5)
        assert came["brier"] == pytest.approx((p - truth).square().sum(-1).mean().item(), rel=1e-5)
        assert came["entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)
        assert came["parameters"] == sum(value.numel() for value in network.parameters())
        assert came["role"] == name.removesuffix("_ema")
        assert came["model"] == "resnet8"
    assert len({network["nll"] for network in summary["networks"].values()}) == 3
    assert (summary["split"], summary["images"]) == ("test", len(batch.target))
    facts = [summary[key] for key in ("recipe", "method", "seed", "device")]
    assert facts == ["tiny", "bdkd", 0, "cpu"]
    assert summary["objective"]["name"] == "bdkd"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 12
    main(["train", "--resume", "--run-dir", str(run), "--train.select", "last", "--quiet"])
    assert json.loads((run / "summary.json").read_text())["selected_step"] == 12
