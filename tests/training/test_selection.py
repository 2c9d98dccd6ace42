"""Which checkpoints a run keeps, which one it selects, and from which one it resumes."""

import dataclasses
import json
import os
import random
from pathlib import Path

import pytest
from small_runs import TINY_RUN, components_of

from bdkd.cli import main
from bdkd.cli.train import parse
from bdkd.config import NetworkConfig, load_recipe
from bdkd.errors import RunError
from bdkd.evaluation.predict import Evaluator
from bdkd.runs.checkpoint import load_checkpoint
from bdkd.runs.folder import RunFolder, default_run_dir, run_of, selected_checkpoint
from bdkd.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_figures")

TINY = load_recipe(*TINY_RUN)


# --- which files are kept -------------------------------------------------------------------------


def a_state(step: int, best: int | None) -> dict:
    """Return the parts of a state that ``RunFolder`` reads."""
    return {"networks": {}, "ema": {}, "position": {"step": step}, "best": best}


def best_in(path: Path) -> int | None:
    return load_checkpoint(path)[1]["best"]


def numbers(folder: RunFolder, kind: str) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in folder.path.glob(f"*/{kind}-*.pt"))


@pytest.mark.parametrize("seed", range(8))
def test_a_kept_checkpoint_has_the_best_student_that_it_refers_to(seed, tmp_path, monkeypatch):
    """Save at random steps and with random best students. A run may resume from any checkpoint that
    is kept, and then needs the best student that this checkpoint refers to."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    rng, folder = random.Random(seed), RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    keep, best, saved = 1 + seed % 3, None, []
    for step in range(1, 40):
        state = a_state(step, best)
        if rng.random() < 0.3:
            best = state["best"] = step
            folder.save_best(step, TINY, state)
        if rng.random() < 0.5:
            saved.append(step)
            folder.save(step, TINY, state, keep)
            kept = numbers(folder, "step")
            assert kept == saved[-keep:]
            older = [number for number in numbers(folder, "best") if number <= kept[0]]
            assert len(older) <= 1  # otherwise the folder would grow without limit
        needed = {best_in(path) for path in folder.checkpoints.glob("step-*.pt")} | {best}
        assert needed - {None} <= {*numbers(folder, "best")}
        newest = max([*numbers(folder, "step"), *numbers(folder, "best")], default=None)
        if newest is not None:
            folder.write_config(TINY)
            found = folder.newest_state(pytest.fail)
            assert found is not None
            assert found[1]["position"]["step"] == newest


# --- the best student -----------------------------------------------------------------------------

# Top-1 on the validation images after each of five epochs of three steps. Every network is best in
# another epoch. Of two equal epochs the later one is best, because its learning rate is lower.
TOP1 = {
    "teacher": [0.1, 0.2, 0.3, 0.4, 0.9],
    "student": [0.5, 0.8, 0.6, 0.6, 0.1],
    "student_ema": [0.2, 0.3, 0.7, 0.7, 0.6],
    "second": [0.9, 0.1, 0.6, 0.2, 0.1],
    "second_ema": [0.9, 0.9, 0.1, 0.1, 0.1],
}


@pytest.mark.parametrize(
    ("networks", "options", "epoch"),
    [
        (("teacher", "student"), [], 2),
        (("teacher", "student"), ["--train.ema-decay", "0.9"], 4),
        (("teacher", "student", "second"), [], 1),
        (("teacher", "student", "second"), ["--train.ema-decay", "0.9"], 2),
    ],
    ids=["one student", "its average", "the mean of two students", "the mean of their averages"],
)
def test_the_best_student_is_chosen_by_its_average_if_there_is_one(
    networks, options, epoch, tmp_path, monkeypatch
):
    real, epochs = Evaluator.evaluate, iter(range(5))

    def with_prescribed_top1(*arguments):
        done = next(epochs)
        return {
            name: dataclasses.replace(result, top1=TOP1[name][done])
            for name, result in real(*arguments).items()
        }

    monkeypatch.setattr(Evaluator, "evaluate", with_prescribed_top1)
    roles = {name: "teacher" if name == "teacher" else "student" for name in networks}
    model = {"model": "resnet8", "options": {"width": 0.13}}
    recipe = dataclasses.replace(
        TINY, networks={name: NetworkConfig(role=role, **model) for name, role in roles.items()}
    )
    arguments = ["tiny", *options, "--train.epochs", "5", "--train.batch-size", "16",
                 "--objective.name", "dml", "--log-every", "100"]  # fmt: skip
    components = components_of(parse(arguments, recipe).config)
    summary = Trainer(components).train(RunFolder(tmp_path), progress_bar=False)
    assert summary["selected_step"] == 3 * epoch
    judged = [name for name in TOP1 if name.endswith("_ema") and options] or networks[1:]
    judged = [name for name in judged if name.removesuffix("_ema") in networks]
    top1 = sum(TOP1[name][epoch - 1] for name in judged) / len(judged)
    saved = load_checkpoint(selected_checkpoint(tmp_path))[1]
    assert saved["position"]["step"] == 3 * epoch
    assert saved["best"] == {"step": 3 * epoch, "top1": pytest.approx(top1)}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if line["split"] == "val"]
    assert [line["student"]["top1"] for line in validated] == TOP1["student"]


def test_the_selected_checkpoint_of_a_folder(tmp_path):
    """It is the best one by default, and the newest one with ``train.select = "last"``. The
    selected checkpoint of a file is the file."""
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.write_config(TINY)
    with pytest.raises(RunError, match="no checkpoint yet"):
        selected_checkpoint(folder.path)
    for step in (5, 10):
        folder.save(step, TINY, a_state(step, None), 3)
    assert selected_checkpoint(folder.path) == folder.step_path(10)
    for step in (6, 7):
        folder.save_best(step, TINY, a_state(step, step))
    assert selected_checkpoint(folder.path) == folder.best_path(7)
    assert selected_checkpoint(folder.step_path(5)) == folder.step_path(5)
    last = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, select="last"))
    folder.write_config(last)
    assert selected_checkpoint(folder.path) == folder.step_path(10)
    assert run_of(folder.step_path(5)) == folder.path
    folder.config.unlink()
    assert run_of(folder.step_path(5)) == folder.checkpoints


# --- which run ------------------------------------------------------------------------------------


def test_resume_auto_takes_the_newest_of_several_runs(tmp_path, monkeypatch, capsys):
    """Each run without ``--run-dir`` has its own folder, whose name ends in a number. The resumed
    run keeps the values that it started with."""
    monkeypatch.chdir(tmp_path)
    train = ["train", *TINY_RUN, "--quiet", "--train.select", "last"]
    for rate in ("0.01", "0.02"):
        main([*train, "--max-steps", "1", "--optimizer.learning-rate", rate])
    main([*train, "--resume", "auto", "--max-steps", "2"])
    assert capsys.readouterr().out.split() == [
        "runs/tiny-bdkd-seed0", "runs/tiny-bdkd-seed0-2", "runs/tiny-bdkd-seed0-2",
    ]  # fmt: skip
    steps = [numbers(RunFolder(Path("runs") / name), "step")[-1]
             for name in ("tiny-bdkd-seed0", "tiny-bdkd-seed0-2")]  # fmt: skip
    assert steps == [1, 2]
    assert load_recipe("runs/tiny-bdkd-seed0-2/config.toml").optimizer.learning_rate == 0.02


def test_the_folder_of_a_run_without_run_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = dataclasses.replace(TINY, seed=4)
    assert default_run_dir(recipe, "auto") == Path("runs/tiny-bdkd-seed4")
    names = ["tiny-bdkd-seed4", *(f"tiny-bdkd-seed4-{number}" for number in range(2, 11))]
    for name in names:
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "tiny-bdkd-seed0-20").mkdir()  # of another seed
    for resume in ("auto", "require"):
        assert default_run_dir(recipe, resume) == Path("runs/tiny-bdkd-seed4-10")
    assert default_run_dir(recipe, "never") == Path("runs/tiny-bdkd-seed4-11")
    (tmp_path / "runs" / names[2]).rmdir()
    assert default_run_dir(recipe, "never") == Path("runs") / names[2]


def test_no_best_checkpoint_is_written_if_the_last_weights_are_selected(tmp_path, capsys):
    """If a resume changes ``train.select`` to ``best``, the run says that there is none."""
    run = tmp_path / "run"
    command = ["train", *TINY_RUN, "--train.select", "last", "--train.epochs", "2"]
    main([*command, "--run-dir", str(run)])
    folder = RunFolder(run)
    assert numbers(folder, "best") == []
    assert load_checkpoint(folder.step_path(24))[1]["best"] is None
    assert selected_checkpoint(run) == folder.step_path(24)
    capsys.readouterr()
    main(["train", "--resume", "--run-dir", str(run), "--train.select", "best"])
    assert "no best checkpoint exists: the last weights are evaluated" in capsys.readouterr().out
    assert json.loads(folder.summary.read_text())["selected_step"] == 24


def test_a_run_with_a_best_checkpoint_can_change_to_the_last_weights(tmp_path):
    """Older versions wrote a best checkpoint in every run."""
    run = tmp_path / "run"
    main(["train", *TINY_RUN, "--train.epochs", "1", "--run-dir", str(run), "--quiet"])
    folder = RunFolder(run)
    assert numbers(folder, "best") == [12]
    command = ["train", "--resume", "--run-dir", str(run), "--train.epochs", "2"]
    main([*command, "--train.select", "last", "--quiet"])
    assert json.loads(folder.summary.read_text())["selected_step"] == 24
    assert numbers(folder, "best") in ([], [12])
    assert selected_checkpoint(run) == folder.step_path(24)
