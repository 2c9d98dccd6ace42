"""``bdkd tune``: the candidates, the choice on validation images only, and stopping a search."""

import json
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from bdkd.cli import main
from bdkd.cli.compare_plan import plan_runs, refuse_equal, run_name
from bdkd.cli.tune import _compare_command
from bdkd.cli.tune_search import (
    Found,
    Result,
    Search,
    parse_searches,
    shortest_label,
    validation_of,
)
from bdkd.config import load_recipe
from bdkd.errors import UsageError
from bdkd.runs.folder import RunFolder

TINY = [
    "digits", "--networks.teacher.model", "resnet8", "--max-steps", "4", "--train.batch-size", "32",
    "--seeds", "5", "7", "--jobs", "2", "--log",
]  # fmt: skip
METHODS = ["independent:optimizer.learning_rate=0.02/0.1,label_smoothing=0/0.5"]
RATE = "optimizer.learning_rate"


def tune(folder: Path, *methods: str) -> None:
    main(["tune", *TINY, "--methods", *methods, "--folder", str(folder)])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tune") / "t"
    tune(folder, *METHODS)
    return folder


def validation_top1(run: Path) -> float:
    """Return the last validation accuracy of the student, read without the code under test."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("split") == "val"][-1]["student"]["top1"]


def test_the_candidate_with_the_highest_validation_accuracy_is_chosen(tuned):
    content = json.loads((tuned / "tuning.json").read_text())
    assert content["seeds"] == [5, 7]
    for method, chosen in zip(content["methods"], content["chosen"], strict=True):
        means = {}
        for candidate in method["candidates"]:
            name = candidate["method"].replace(":", "-").replace(",", "-")
            found = [validation_top1(tuned / f"{name}-seed{seed}") for seed in (5, 7)]
            means[candidate["method"]] = statistics.fmean(found)
            assert candidate["top1"] == pytest.approx(means[candidate["method"]])
        assert means[chosen] == max(means.values())
        assert method["chosen"] == chosen


def test_options_are_searched_one_after_another(tuned):
    """The search tries two values of the first option. It then tries the other value of the second
    option with the better value of the first."""
    [independent] = json.loads((tuned / "tuning.json").read_text())["methods"]
    tried = [candidate["method"] for candidate in independent["candidates"]]
    assert tried[:2] == [f"independent:{RATE}=0.02", "independent"]  # the recipe has 0.1
    first = {c["method"]: (c["top1"], -c["nll"]) for c in independent["candidates"][:2]}
    better = max(first, key=first.get)
    smoothed = "label_smoothing=0.5"
    assert tried[2:] == [f"{better},{smoothed}" if ":" in better else f"{better}:{smoothed}"]


def test_compare_accepts_the_printed_command(tuned):
    text = (tuned / "tuning.md").read_text()
    chosen = json.loads((tuned / "tuning.json").read_text())["chosen"]
    kept = shlex.join([*TINY[:7], "--log"])  # without the seeds and jobs of the search
    assert f"`bdkd compare {kept} --methods {' '.join(chosen)}`" in text


def test_a_repeated_search_trains_nothing_and_chooses_the_same(tuned, capsys):
    before = (tuned / "tuning.json").read_text()
    runs = {path: path.stat().st_mtime_ns for path in tuned.glob("*/summary.json")}
    tune(tuned, *METHODS)
    assert {path: path.stat().st_mtime_ns for path in tuned.glob("*/summary.json")} == runs
    assert json.loads((tuned / "tuning.json").read_text()) == json.loads(before)
    assert "chosen" in capsys.readouterr().out


def test_a_candidate_that_fails_is_not_chosen(tmp_path, capsys):
    """A run ends if the loss is infinite in several consecutive steps."""
    labels = ["independent:optimizer.learning_rate=0.1/1e30"]
    arguments = ["--train.max-skipped", "1", "--max-steps", "6", "--seeds", "5"]
    main(["tune", *TINY, *arguments, "--methods", *labels, "--folder", str(tmp_path)])
    content = json.loads((tmp_path / "tuning.json").read_text())
    assert content["chosen"] == ["independent"]
    assert content["failed"]
    assert "failed" in capsys.readouterr().out
    labels = ["independent:optimizer.learning_rate=1e29/1e30"]
    with pytest.raises(SystemExit) as exit_:
        main(["tune", *TINY, *arguments, "--methods", *labels, "--folder", str(tmp_path)])
    assert exit_.value.code == 1
    assert "no candidate of independent:optimizer.learning_rate=1e29/1e30" in (
        capsys.readouterr().err
    )


def test_a_later_stage_replaces_the_choice_only_by_a_better_candidate():
    """The values of the second option need not include the default."""
    found = Found(Search("", "kd", {}))
    found.add(Result("kd", 0.5, 1.0, 0.1, 2), {"first": "1"})
    found.add(Result("kd:a=1", 0.4, 0.5, 0.1, 2), {"first": "2"})
    found.add(Result("kd:a=2", 0.5, 1.5, 0.1, 2), {"first": "3"})
    found.add(Result("kd:a=3", math.inf, 0.0, 0.1, 0), {"first": "4"})  # a failed candidate
    assert found.best == Result("kd", 0.5, 1.0, 0.1, 2)
    assert found.options == {"first": "1"}
    found.add(Result("kd:a=4", 0.5, 0.9, 0.1, 2), {"first": "5"})
    assert found.options == {"first": "5"}


def test_a_diverged_run_makes_its_candidate_fail(tmp_path, capsys):
    """The NLL is not finite, although too few steps were skipped to end the run."""
    label = "independent:optimizer.learning_rate=0.1/1e30"
    main(["tune", *TINY, "--seeds", "5", "--methods", label, "--folder", str(tmp_path)])
    content = json.loads((tmp_path / "tuning.json").read_text())
    assert content["chosen"] == ["independent"]
    assert [c["method"] for c in content["methods"][0]["candidates"]] == ["independent"]
    out = capsys.readouterr().out
    assert "validation top-1 %" in out
    assert "failed" in out


def test_the_metrics_of_a_moving_average_are_used(tmp_path):
    """The metrics are those of the selected step."""
    [run] = plan_runs(load_recipe("digits"), ["independent"], [0], tmp_path)
    folder = RunFolder(run.path)
    folder.path.mkdir()
    networks = {"student": {}}
    folder.write_summary({"selected_step": 20, "networks": networks, "wall_seconds": 1.0})
    values = {"top1": 0.5, "nll": 1.0, "ece": 0.25}
    other = dict.fromkeys(values, 0.0)
    lines = [
        {"step": 10, "split": "val", "student": other, "student_ema": other, "teacher": other},
        {"step": 20, "split": "train", "student": other, "student_ema": other, "teacher": other},
        {"step": 20, "split": "val", "student": other, "student_ema": values, "teacher": other},
        {"step": 30, "split": "val", "student": other, "student_ema": other, "teacher": other},
    ]
    folder.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert validation_of(run) == values


def test_the_printed_command_keeps_the_options_of_the_recipe():
    given = [
        "my.toml", "--methods", "a", "b", "--seeds", "1", "2", "--train.epochs", "3", "--json",
        "--folder=x", "--data.crop", "0", "--log",
    ]  # fmt: skip
    found = Found(Search("", "kd", {}))
    found.add(Result("kd:temperature=2", 0.5, 1.0, 0.1, 2), {})
    assert _compare_command(given, [found]) == (
        "bdkd compare my.toml --train.epochs 3 --data.crop 0 --log --methods kd:temperature=2"
    )


def test_ctrl_c_saves_the_runs_and_names_the_command(tmp_path):
    """The printed command continues and finishes the search."""
    command = [
        sys.executable, "-m", "bdkd", "tune", *TINY, "--methods", f"independent:{RATE}=0.1/0.2",
        "--folder", str(tmp_path / "t"), "--max-steps", "400", "--train.epochs", "20",
        "--jobs", "1",
    ]  # fmt: skip
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE,"
        " text=True)\n"
        "child.stdout.readline(); __import__('time').sleep(6); child.send_signal(signal.SIGINT)\n"
        "out, err = child.communicate(); print(err); sys.exit(child.returncode % 256)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 130, done.stdout + done.stderr
    assert "continue with the same command: bdkd tune digits" in done.stdout


# --- refused command lines -----------------------------------------------------------------------


REFUSED = {
    "kd": "has nothing to choose",
    "kd:temperature=2": "has nothing to choose",
    f"kd:{RATE}=0.1/0.1": "more than once",
    f"kd:{RATE}=0.1/1e-1": "has the value '1e-1' more than once",
    "kd:temperature=1/2,temperature=3/4": "has 'temperature' more than once",
    "kd:temperature=-1/2": "--methods 'kd:temperature=-1': objective.temperature must be",
    f"kd:{RATE}=0.1/0.2 # best": "must be a number",
    f"kd:{RATE}=0.1/x": "must be a number",
    f"kd:{RATE}=0.1/-1": "must be above 0",
    "kd:optimizer.rate=1/2": "unknown key optimizer.rate",
    "kd:data.crop=1/2": "must be an option of the objective, or a key of",
    "kd:gamma=1/2": "kd has no option 'gamma'",
    "kb:gamma=1/2": "kb",
}


@pytest.mark.parametrize("label", REFUSED)
def test_wrong_methods_are_refused_before_the_training(label):
    with pytest.raises(UsageError, match=REFUSED[label]):
        parse_searches([label], load_recipe("digits"))


def test_tune_needs_methods_and_validation_images(tmp_path, capsys):
    for arguments, message in (
        ([], "--methods is missing"),
        (["--methods", METHODS[0], METHODS[0]], "more than once"),
        (["--methods", METHODS[0], "--data.validation", "0", "--train.select", "last"],
         "needs validation images"),
        (["--methods", METHODS[0], "--seed", "3"], "use --seeds"),
        (["--methods", METHODS[0], "--jobs", "0"], "--jobs must be at least 1"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as exit_:
            main(["tune", "digits", *arguments, "--folder", str(tmp_path)])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_methods_that_are_equal_or_have_the_same_folder_are_refused(tmp_path):
    recipe = load_recipe("digits")
    for methods, message in (
        (["kd", "kd:"], "are the same method"),
        (["kd", "kd:temperature=4"], "are the same method"),
        (["dkd:temperature=4." + "0" * 300], "is too long for the name of a folder"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_runs(recipe, methods, [0], tmp_path)
    with pytest.raises(UsageError, match="would have the same folder"):
        refuse_equal({"a:x=1/2": recipe, "a:x=1-2": load_recipe("digits-hard")})
    assert run_name("a:path=../../x", 1) == "a-path=..-..-x-seed1"


def test_equal_recipes_have_the_same_name():
    recipe = load_recipe("digits")  # the learning rate of the recipe is 0.1
    assert shortest_label("kd", {}, recipe) == "kd"
    assert shortest_label("kd", {RATE: "0.1", "student_kd": "0.9"}, recipe) == "kd"
    assert shortest_label("kd", {RATE: "0.05", "student_kd": "0.90"}, recipe) == f"kd:{RATE}=0.05"


def test_stages_beyond_the_last_option_have_no_candidates():
    search = Search("", "kd", {RATE: ("0.1", "0.2"), "temperature": ("2",)})
    assert search.stages == 1
    assert search.candidates({}, 0) == [
        {"temperature": "2", RATE: "0.1"}, {"temperature": "2", RATE: "0.2"},
    ]  # fmt: skip
    assert search.candidates({RATE: "0.1"}, 1) == []
