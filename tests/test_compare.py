"""``bdkd compare``: its runs and tables, stopping and continuing, and refused command lines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import bdkd

from bdkd.cli import main
from bdkd.cli.compare_plan import (
    chosen_methods,
    chosen_seeds,
    plan_runs,
    recipe_of_method,
    room_for,
    run_name,
)
from bdkd.config import load_recipe, to_toml
from bdkd.errors import RunError, UsageError
from bdkd.registry import OBJECTIVES
from bdkd.runs.checkpoint import load_checkpoint

TINY = [
    "digits", "--networks.teacher.model", "resnet8", "--max-steps", "3", "--train.batch-size", "32",
    "--log-every", "1", "--jobs", "1", "--log", "--train.deterministic",
]  # fmt: skip
TWO = ["--methods", "independent", "bdkd", "--seeds", "2"]
LONGER = ["--methods", "independent", "bdkd", "--seeds", "1", "--max-steps", "60",
          "--train.epochs", "3"]  # fmt: skip


def compare(folder: Path, *arguments: str) -> None:
    """Run a comparison in this process. Its runs are separate processes."""
    main(["compare", *TINY, *arguments, "--folder", str(folder)])


def fail(capsys, *arguments: str) -> tuple[int, str]:
    """Return the exit code and stderr of a comparison that must fail."""
    with pytest.raises(SystemExit) as exit_:
        main(["compare", *arguments])
    return exit_.value.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """Return the folder of a finished comparison."""
    folder = tmp_path_factory.mktemp("compare") / "a folder"
    compare(folder, *TWO)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(sorted((run / "checkpoints").glob("step-*"))[-1])[1]["networks"]


def assert_same_weights(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


# --- runs and tables -----------------------------------------------------------------------------


def test_compare_writes_a_folder_for_each_run_and_the_tables(compared):
    runs = [f"{method}-seed{seed}" for method in ("independent", "bdkd") for seed in (0, 1)]
    for name in runs:
        summary = json.loads((compared / name / "summary.json").read_text())
        assert name == f"{summary['method']}-seed{summary['seed']}"
        assert " 3/3 " in (compared / name / "output.log").read_text()
        student = summary["networks"]["student"]
        assert student.keys() >= {"temperature", "ece_scaled", "nll_scaled", "brier_scaled"}
    assert sorted(p.name for p in compared.iterdir()) == sorted(
        [*runs, ".lock", *(f"comparison.{kind}" for kind in ("csv", "json", "md", "png"))]
    )
    content = json.loads((compared / "comparison.json").read_text())
    assert content["methods"] == ["independent", "bdkd"]
    assert [(run["method"], run["seed"]) for run in content["runs"]] == [
        ("independent", 0), ("bdkd", 0), ("independent", 1), ("bdkd", 1),
    ]  # fmt: skip
    row = content["rows"][0]
    of_runs = [run["networks"]["student"]["top1"] for run in content["runs"][::2]]
    assert row["cells"]["top1"]["mean"] == pytest.approx(sum(of_runs) / 2)
    text = (compared / "comparison.md").read_text()
    assert text.startswith("# digits: independent, bdkd")
    assert "bdkd compare digits" in text  # its command
    assert "±" in text


def test_runs_of_compare_equal_those_of_train_bit_for_bit(compared, tmp_path):
    """This holds although the runs are forked from a common server process."""
    config = str(compared / "bdkd-seed1" / "config.toml")
    done = bdkd("train", config, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "run", compared / "bdkd-seed1")


def test_a_repeated_comparison_trains_nothing_and_prints_the_same_tables(compared, capsys):
    before = {p: p.stat().st_mtime_ns for p in compared.rglob("*") if "seed" in str(p)}
    compare(compared, *TWO)
    text = capsys.readouterr().out
    assert "4 of them already finished" in text
    assert "\r" not in text
    assert "student (resnet8, student)" in text
    assert "paired t-test" in text
    assert {p: p.stat().st_mtime_ns for p in compared.rglob("*") if "seed" in str(p)} == before
    compare(compared, *TWO, "--json")
    out = capsys.readouterr()
    assert json.loads(out.out) == json.loads((compared / "comparison.json").read_text())
    assert "already finished" in out.err


def test_methods_can_be_added_and_kd_takes_its_teacher_from_the_same_seed(compared, capsys):
    compare(compared, "--methods", "kd", "bdkd:gamma=1", "--seeds", "1")
    text = capsys.readouterr().out
    assert "1 of them already finished" in text  # the run of the teacher
    assert "kd: the frozen teacher comes from the run of independent with the same seed" in text
    assert "\nindependent" not in text  # not in --methods
    config = load_recipe(str(compared / "kd-seed0" / "config.toml"))
    assert config.objective.temperature == 4.0  # the default of kd
    teachers = [
        {key: value for key, value in weights(compared / run).items() if ".teacher." in key}
        for run in ("kd-seed0", "independent-seed0")
    ]
    [best] = (compared / "independent-seed0" / "checkpoints").glob("best-*")
    assert config.networks["teacher"].weights == str(best)
    of_best = load_checkpoint(best)[1]["networks"]
    assert all(torch.equal(value, of_best[key]) for key, value in teachers[0].items())
    unweighted = load_recipe(str(compared / "bdkd-gamma=1-seed0" / "config.toml"))
    assert unweighted.objective.gamma == 1


# --- stopped and continued -----------------------------------------------------------------------


def start(folder: Path) -> subprocess.Popen:
    """Start a comparison in a new process group, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "bdkd", "compare", *TINY, *LONGER, "--folder", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def start_and_train(folder: Path) -> subprocess.Popen:
    """Start a comparison, and wait until its first run has trained a few steps."""
    process = start(folder)
    metrics = folder / "independent-seed0" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5)
    return process


def wait_until(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.01)


def saved(folder: Path) -> bool:
    return any((folder / "independent-seed0" / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the folder of a comparison that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    compare(folder, *LONGER)
    return folder


def test_after_ctrl_c_the_same_command_continues_the_runs_bit_for_bit(whole, tmp_path):
    process = start_and_train(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130, errors
    assert errors.count("\n") == 1
    assert "continue with the same command: bdkd compare digits" in errors
    assert saved(tmp_path)
    assert not (tmp_path / "comparison.md").exists()
    compare(tmp_path, *LONGER)
    assert "continuing at step" in (tmp_path / "independent-seed0" / "output.log").read_text()
    for name in ("independent-seed0", "bdkd-seed0"):
        assert_same_weights(tmp_path / name, whole / name)


def test_ctrl_c_during_the_imports_stops_the_comparison(tmp_path):
    """The server process of the runs also receives SIGINT, and must ignore it."""
    process = start(tmp_path)
    assert process.stdout is not None
    assert "2 runs in" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130, errors
    assert errors.count("\n") == 1
    assert "0 of 2 runs are finished" in errors


def test_runs_of_a_killed_comparison_save_and_end(tmp_path):
    process = start_and_train(tmp_path)
    process.kill()
    process.communicate()
    wait_until(lambda: saved(tmp_path))  # the runs get SIGTERM and save
    assert not (tmp_path / "bdkd-seed0").exists()
    assert not (tmp_path / "independent-seed0" / "summary.json").exists()


# --- failures ------------------------------------------------------------------------------------


def test_a_failed_run_does_not_stop_the_others(compared, tmp_path, capsys):
    for run in ("independent-seed0", "bdkd-seed0", "independent-seed1"):
        (tmp_path / run).symlink_to(compared / run)  # finished
    (tmp_path / "bdkd-seed1").mkdir()
    (tmp_path / "bdkd-seed1" / "checkpoints").write_text("in the way")
    code, errors = fail(capsys, *TINY, *TWO, "--folder", str(tmp_path))
    assert code == 1
    assert errors.count("\n") == 1
    assert "1 of 4 runs failed; bdkd-seed1: cannot write the run's folder" in errors
    assert "leave out the runs that failed: bdkd-seed1" in (tmp_path / "comparison.md").read_text()
    (tmp_path / "bdkd-seed1" / "checkpoints").unlink()
    compare(tmp_path, *TWO)
    assert "2" in capsys.readouterr().out
    assert_same_weights(tmp_path / "bdkd-seed1", compared / "bdkd-seed1")


def test_a_run_whose_teacher_failed_is_not_started(tmp_path, capsys):
    (tmp_path / "independent-seed0").mkdir()
    (tmp_path / "independent-seed0" / "checkpoints").write_text("in the way")
    code, errors = fail(capsys, *TINY, "--methods", "kd", "--seeds", "1", "--folder", str(tmp_path))
    assert code == 1
    assert "2 of 2 runs failed; independent-seed0: cannot write" in errors
    assert "kd-seed0" in errors
    assert not (tmp_path / "comparison.md").exists()


def test_a_changed_recipe_is_refused(compared, capsys):
    before = sorted(compared.rglob("*"))
    code, errors = fail(capsys, *TINY, *TWO, "--folder", str(compared), "--optimizer.momentum", "0")
    assert code == 1
    assert "contains a run with other optimizer.momentum" in errors
    assert "--folder" in errors
    assert sorted(compared.rglob("*")) == before


def test_a_broken_summary_is_named(compared, tmp_path, capsys):
    (tmp_path / "bdkd-seed0").mkdir()
    (tmp_path / "bdkd-seed0" / "summary.json").write_text("{")
    arguments = ["--methods", "bdkd", "--seeds", "1", "--folder", str(tmp_path)]
    code, errors = fail(capsys, *TINY, *arguments)
    assert code == 1
    assert "bdkd-seed0/summary.json" in errors
    assert "remove it" in errors


def test_an_invalid_recipe_ends_the_comparison_at_once(tmp_path, capsys):
    code, errors = fail(capsys, *TINY, *TWO, "--folder", str(tmp_path),
                        "--networks.student.model", "resnet9")  # fmt: skip
    assert code == 2
    assert "resnet9" in errors
    assert not (tmp_path / "bdkd-seed1").exists()


USAGE = {
    "no recipe": ([], ["needs a recipe", "digits"]),
    "recipe": (["digit"], ["unknown recipe 'digit'", "'digits'"]),
    "method": (["digits", "--methods", "bdk"], ["unknown objective 'bdk'", "'bdkd'"]),
    "method twice": (["digits", "--methods", "bdkd", "bdkd"], ["'bdkd' more than once"]),
    "option": (["digits", "--methods", "bdkd:gama=1"], ["no option 'gama'", "'gamma'"]),
    "option of another": (["digits", "--methods", "dml:gamma=1"], ["dml has no option 'gamma'"]),
    "no value": (["digits", "--methods", "bdkd:gamma"], ["'gamma' needs a value"]),
    "bad value": (["digits", "--methods", "bdkd:gamma=x"], ["gamma", "a number"]),
    "value out of range": (["digits", "--methods", "bdkd:gamma=0.5"], ["gamma", "0.5"]),
    "seeds": (["digits", "--seeds", "1", "1"], ["different seeds", "1 1"]),
    "negative seed": (["digits", "--seeds", "-1"], ["--seeds"]),
    "jobs": (["digits", "--jobs", "0"], ["--jobs", "at least 1"]),
    "seed": (["digits", "--seed", "1"], ["use --seeds"]),
    "run dir": (["digits", "--run-dir", "x"], ["use --folder"]),
    "networks": (
        ["digits", "--methods", "bdkd", "--networks.student.role", "teacher"],
        ["student"],
    ),
    "recipe value": (["digits", "--train.epochs", "0"], ["train.epochs", "at least 1"]),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_one_line_and_creates_no_folder(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, words = USAGE[case]
    code, errors = fail(capsys, *arguments)
    assert code == 2
    assert errors.count("\n") == 1
    for word in words:
        assert word in errors
    assert not list(tmp_path.iterdir())


def test_two_comparisons_cannot_use_the_same_folder(compared, capsys):
    import fcntl

    with open(compared / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, errors = fail(capsys, *TINY, *TWO, "--folder", str(compared))
    assert code == 1
    assert "another bdkd compare or tune works in" in errors


def test_a_folder_that_cannot_be_created_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    code, errors = fail(capsys, *TINY, *TWO, "--folder", str(tmp_path / "file" / "x"))
    assert code == 1
    assert "--folder" in errors


# --- methods, seeds and plans --------------------------------------------------------------------


def test_one_number_is_the_number_of_seeds_and_several_numbers_are_seeds():
    assert chosen_seeds([3]) == [0, 1, 2]
    assert chosen_seeds([0]) == [0]
    assert chosen_seeds([5, 3]) == [5, 3]
    for bad in ([], [2, -1]):
        with pytest.raises(UsageError):
            chosen_seeds(bad)


def test_by_default_all_objectives_are_compared_with_independent():
    methods = chosen_methods([])
    assert methods[0] == "independent"
    ours = ["bdkd", "dkd", "dml", "kd", "kdcl", "lskd", "switokd"]
    assert [method for method in methods[1:] if not OBJECTIVES.is_foreign(method)] == ours


def test_methods_that_need_a_trained_teacher_use_that_of_independent(tmp_path):
    runs = plan_runs(load_recipe("digits"), ["kd", "lskd", "dkd", "dml"], [0], tmp_path)
    teachers = {run.method: run.teachers for run in runs}
    trained = dict.fromkeys(["kd", "lskd", "dkd"], ("teacher",))
    assert teachers == {"independent": (), **trained, "dml": ()}
    assert all(run.frozen == set(run.teachers) for run in runs)


def test_options_of_the_recipes_objective_apply_only_to_that_objective(tmp_path):
    text = to_toml(load_recipe("digits")).replace("gamma = 2.0", "gamma = 3.0")
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("label_smoothing = 0.0", "label_smoothing = 0.1"))
    recipe = load_recipe(str(path))
    own = recipe_of_method("bdkd:temperature=2", recipe).objective
    assert (own.gamma, own.temperature, own.label_smoothing) == (3, 2, 0.1)
    other = recipe_of_method("kd", recipe).objective
    assert other.temperature == 4
    assert other.label_smoothing == 0.1  # a common option of all objectives


def test_runs_are_ordered_by_seed_and_include_the_teachers_runs(tmp_path):
    recipe = load_recipe("digits")
    runs = plan_runs(recipe, ["bdkd", "kd", "kd:temperature=2"], [0, 1], tmp_path)
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
    assert runs[0].method == "independent"
    assert [run.teachers for run in runs[:4]] == [(), (), ("teacher",), ("teacher",)]
    assert len({run.path for run in runs}) == 8
    assert run_name("kd:temperature=2,student_kd=1", 3) == "kd-temperature=2-student_kd=1-seed3"


def test_a_teacher_with_given_weights_is_not_trained(tmp_path):
    import dataclasses

    recipe = load_recipe("digits")
    teacher = dataclasses.replace(recipe.networks["teacher"], weights="trained.pt")
    recipe = dataclasses.replace(recipe, networks={**recipe.networks, "teacher": teacher})
    [run] = plan_runs(recipe, ["kd"], [0], tmp_path)
    assert (run.teachers, run.frozen) == ((), {"teacher"})


def test_a_folder_with_runs_of_another_recipe_is_refused(compared):
    recipe = load_recipe("digits")
    with pytest.raises(RunError, match=r"bdkd-seed0 contains a run with other .*max_steps"):
        plan_runs(recipe, ["bdkd"], [0], compared)


def test_the_number_of_concurrent_runs_depends_on_cores_threads_and_device():
    import dataclasses

    recipe = load_recipe("digits")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = dataclasses.replace(recipe, device="cpu")
    assert room_for(cpu) == cores
    assert room_for(dataclasses.replace(cpu, threads=2 * cores)) == 1
    assert room_for(dataclasses.replace(recipe, device="cuda")) == 1


def test_a_method_may_set_keys_of_the_recipe():
    recipe = load_recipe("digits")
    label = "bdkd:gamma=3,optimizer.learning_rate=0.02,schedule.name=step,schedule.milestones=[1,2]"
    own = recipe_of_method(label, recipe)
    assert (own.objective.gamma, own.optimizer.learning_rate) == (3, 0.02)
    assert (own.schedule.name, own.schedule.milestones) == ("step", (1.0, 2.0))
    assert recipe_of_method("bdkd:gamma=3", recipe).optimizer == recipe.optimizer
    for label, message in (
        ("kd:optimizer.lr=1", "unknown key optimizer.lr"),
        ("kd:optimizer.learning_rate=fast", "must be a number, got 'fast'"),
        ("kd:train.epochs=-1", "train.epochs must be at least 1"),
        ("kd:data.crop=1", "must be an option of the objective, or a key of optimizer"),
        ("kd:optimizer.learning_rate", "needs a value"),
    ):
        with pytest.raises(UsageError, match=message):
            recipe_of_method(label, recipe)


def test_only_runs_of_the_method_have_its_options(tmp_path):
    label = "kd:optimizer.learning_rate=0.02"
    runs = plan_runs(load_recipe("digits"), [label], [0], tmp_path)
    assert {run.method: run.recipe.optimizer.learning_rate for run in runs} == {
        "independent": 0.1, label: 0.02,
    }  # fmt: skip
