"""The parts of ``bdkd compare``: the teacher of a seed, the order of its jobs, its tables."""

import dataclasses
import json

import pytest

from bdkd.cli.compare_plan import plan_runs, warmup_warnings
from bdkd.cli.compare_report import report
from bdkd.cli.compare_train import headline, prepare
from bdkd.cli.processes import Job, Outcome, run_jobs
from bdkd.cli.table import table
from bdkd.config import load_recipe
from bdkd.errors import RunError
from bdkd.runs.folder import RunFolder


def test_the_first_column_is_aligned_to_the_left_and_the_others_to_the_right():
    lines = table(["a", "bb"], [["xxx", "1"], ["y", "1234"]]).splitlines()
    assert lines == ["a      bb", "---  ----", "xxx     1", "y    1234"]


def test_kd_loads_the_best_checkpoint_of_the_independent_run_with_its_seed(tmp_path):
    """The weights are the selected checkpoint of the independent run."""
    recipe = load_recipe("digits")
    runs = {run.name: run for run in plan_runs(recipe, ["kd"], [0, 1], tmp_path)}
    for seed in (0, 1):
        folder = RunFolder(runs[f"independent-seed{seed}"].path)
        folder.checkpoints.mkdir(parents=True)
        folder.write_config(runs[f"independent-seed{seed}"].recipe)
        for path in (folder.best_path(10 + seed), folder.step_path(20)):
            path.touch()
    for seed in (0, 1):
        planned = runs[f"kd-seed{seed}"]
        command = prepare(planned, tmp_path)
        assert command == ["train", "--resume", "require", "--run-dir", str(planned.path)]
        config = load_recipe(str(planned.path / "config.toml"))
        best = tmp_path / f"independent-seed{seed}" / "checkpoints" / f"best-{10 + seed:08d}.pt"
        assert config.networks["teacher"].weights == str(best)
        assert config.networks["student"].weights is None
        assert (config.objective.name, config.seed) == ("kd", seed)
    plan_runs(recipe, ["kd"], [0, 1], tmp_path)  # these weights do not count as a changed option
    # The weights of another teacher count as a changed option.
    planned = runs["kd-seed0"]
    stored = RunFolder(planned.path)
    networks = dict(planned.recipe.networks)
    networks["teacher"] = dataclasses.replace(networks["teacher"], weights="runs/good")
    stored.write_config(dataclasses.replace(planned.recipe, networks=networks))
    (planned.path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    with pytest.raises(RunError, match=r"contains a run with other networks.teacher.weights"):
        plan_runs(recipe, ["kd"], [0, 1], tmp_path)


NAMES = ("independent", "kd")
# Arbitrary values by method and seed
TOP1 = {("independent", 0): 0.5, ("independent", 1): 0.7, ("kd", 0): 0.6, ("kd", 1): 0.9}


def a_summary(method: str, seed: int) -> dict:
    student = {
        "model": "resnet8", "role": "student", "parameters": 10, "top1": TOP1[method, seed],
        "ece": 0.0625, "nll": 0.5, "brier": 0.25, "ece_scaled": 0.03, "nll_scaled": 0.4,
        "brier_scaled": 0.2, "temperature": 1.5,
    }  # fmt: skip
    teacher = {**student, "role": "teacher", "top1": 0.95}
    return {
        "recipe": "digits", "method": method, "seed": seed, "wall_seconds": 10.0 + 4 * seed,
        "images": 359, "torch": "2", "device": "cpu",
        "networks": {"teacher": teacher, "student": student},
    }  # fmt: skip


def test_a_warm_up_that_is_longer_than_the_runs_is_named(tmp_path):
    recipe = load_recipe("digits")  # 30 epochs
    labels = ["dkd", "dkd:warmup=31", "dkd:warmup=30.5,other_kd=4", "bdkd"]
    [first, second] = warmup_warnings(plan_runs(recipe, labels, [0, 1], tmp_path))
    assert first.startswith("dkd:warmup=31: the warm-up of 31 epochs is longer than the 30 epochs")
    assert second.startswith("dkd:warmup=30.5,other_kd=4: the warm-up of 30.5 epochs")


def test_tables_agree_with_the_summaries_of_the_runs(tmp_path, monkeypatch, capsys):
    """Tables show means over seeds, and differences of the same seed. One run of another method
    failed. This test does not draw the figure."""
    monkeypatch.setattr("bdkd.cli.compare_report.comparison_figure", lambda *_: None)
    recipe = load_recipe("digits")
    planned = plan_runs(recipe, NAMES, [0, 1], tmp_path)
    for run in planned:
        run.path.mkdir()
        RunFolder(run.path).write_summary(a_summary(run.method, run.seed))
    for as_json in (False, True):
        report(planned, NAMES, tmp_path, "the command", {"dml-seed0": Outcome(1, "why")}, as_json)
    out = capsys.readouterr().out
    tables, _, printed = out.partition("\n{")
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert json.loads("{" + printed) == content
    assert content["failed"] == {"dml-seed0": "why"}
    assert (content["methods"], content["command"]) == ([*NAMES], "the command")
    assert [(run["method"], run["seed"], run["folder"]) for run in content["runs"]] == [
        (run.method, run.seed, run.path.name) for run in planned
    ]
    [own] = [r for r in content["rows"] if (r["method"], r["network"]) == ("kd", "student")]
    assert own["cells"]["top1"]["mean"] == pytest.approx(0.75)
    assert own["cells"]["top1"]["std"] == pytest.approx(0.15 * 2**0.5)
    assert (own["seeds"], own["train_seconds"]) == ([0, 1], 12.0)
    [line] = [line for line in tables.splitlines() if line.startswith("kd ") and "75.00" in line]
    assert line.split()[-2:] == ["2", "12"]
    assert "differences of student from independent" in tables
    assert "differences of teacher" not in tables  # kd does not train it
    assert "kd: the frozen teacher comes from the run of independent" in tables.replace("\n", " ")
    assert "The tables leave out the runs that failed: dml-seed0." in tables
    assert headline(a_summary("kd", 1)).startswith(
        "teacher top-1 95.00% ECE 6.25%  student top-1 9"
    )
    assert headline(a_summary("kd", 1)).endswith("  14 s")
    text = (tmp_path / "comparison.md").read_text()
    assert text.index("## student") < text.index("## teacher")


def test_jobs_run_in_order_with_limited_concurrency_after_their_dependencies(tmp_path):
    """The second of five commands fails."""
    running, most, ended = set(), [], {}

    def job(name: str, arguments: list[str], *needs: str) -> Job:
        def starts():
            running.add(name)
            most.append(len(running))
            return arguments

        return Job(name, starts, tmp_path / name, needs)

    def done(job: Job, outcome: Outcome) -> None:
        running.discard(job.name)
        ended[job.name] = outcome

    (tmp_path / "first").write_text("before\n")
    jobs = [
        job("needs first", ["--version"], "first"),
        job("first", ["--version"]),
        job("bad", ["trian"]),
        job("needs bad", ["--version"], "bad"),
        job("last", ["--version"]),
    ]
    run_jobs(jobs, 2, done, lambda: False)
    assert {name: outcome.code for name, outcome in ended.items()} == {
        "first": 0, "needs first": 0, "bad": 2, "needs bad": 1, "last": 0,
    }  # fmt: skip
    assert max(most) == 2
    assert [*ended].index("first") < [*ended].index("needs first")
    assert "unknown command 'trian'" in ended["bad"].message
    assert ended["needs bad"].message == "not run: it needs bad, which failed"
    assert not (tmp_path / "needs bad").exists()
    assert (tmp_path / "first").read_text().startswith("before\nbdkd ")  # appended
    assert "Traceback" in (tmp_path / "bad").read_text()
    run_jobs([job("never", ["--version"])], 1, done, lambda: True)
    assert "never" not in ended
