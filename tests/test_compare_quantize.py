"""``bdkd compare --quantize int8`` and the table of ``bdkd report``: the results of int8 students
over methods and seeds are recomputed from the exported files."""

import csv
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_compare import TINY, fail
from test_one_line import failure

from bdkd.cli import main
from bdkd.cli.compare_plan import plan_runs
from bdkd.cli.compare_quantize import _jobs, exported_networks, quantize_all
from bdkd.cli.processes import Outcome
from bdkd.config import load_recipe
from bdkd.errors import Interrupted
from bdkd.evaluation import comparison, quantized
from bdkd.evaluation.quantized import Quantized, QuantizedRun, read_quantized

METHODS = ["bdkd", "independent"]
COMMAND = [*TINY, "--max-steps", "12", "--train.ema-decay", "0.5", "--methods", *METHODS,
           "--seeds", "2", "--quantize", "int8"]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """Return the folder of a finished comparison with int8 files."""
    folder = tmp_path_factory.mktemp("compare") / "q"
    main(["compare", *COMMAND, "--folder", str(folder)])
    return folder


def files(folder: Path) -> dict:
    """Return the comparisons of the int8 files by method and seed."""
    return {
        (method, seed): json.loads(
            (folder / f"{method}-seed{seed}/export/student_ema/model-int8.json").read_text()
        )
        for method in METHODS
        for seed in (0, 1)
    }


def test_moving_averages_are_quantised(compared):
    assert {"student_ema"} == {
        path.parent.name for path in compared.glob("*/export/*/model-int8.onnx")
    }
    summary = json.loads((compared / "bdkd-seed0" / "summary.json").read_text())
    assert exported_networks(summary) == ["student_ema"]


def test_the_int8_table_agrees_with_numpy_and_scipy(compared):
    written = (compared / "comparison.md").read_text()
    table = written.partition("## student_ema, fp32 and int8")[2].partition("##")[0]
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if line[:1] == "|"][2:]
    assert [row[:2] for row in rows] == [
        [method, label] for method in METHODS for label in ("top-1 %", "ECE %", "NLL", "Brier")
    ]
    keys = {
        "top-1 %": ("top1", 100),
        "ECE %": ("ece", 100),
        "NLL": ("nll", 1),
        "Brier": ("brier", 1),
    }
    for method, label, fp32, int8, change, interval, seeds in rows:
        key, factor = keys[label]
        found = [files(compared)[method, seed]["comparison"]["changes"][key] for seed in (0, 1)]
        before, after, difference = (
            factor * np.array([change[when] for change in found])
            for when in ("before", "after", "difference")
        )
        for text, values in ((fp32, before), (int8, after)):
            mean, std = map(float, text.split(" ± "))
            assert mean == pytest.approx(values.mean(), abs=0.006)
            assert std == pytest.approx(values.std(ddof=1), abs=0.006)
        assert float(change) == pytest.approx(difference.mean(), abs=0.006)
        if np.ptp(difference) > 1e-9:
            low, high = map(float, interval.split(" to "))
            expected = stats.t.interval(0.95, 1, difference.mean(), stats.sem(difference))
            assert [low, high] == pytest.approx(expected, abs=0.006)
        assert seeds == "2"


def test_the_changes_of_all_metrics_are_tested_in_the_table(compared):
    written = (compared / "comparison.md").read_text()
    head = "## changes of student_ema (int8 - fp32) compared with those of bdkd"
    table = written.partition(head)[2].partition("\n\nMean")[0]
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if line[:1] == "|"][2:]
    assert [row[:2] for row in rows] == [
        ["independent", label] for label in ("top-1 %", "ECE %", "NLL", "Brier")
    ]


def test_the_csv_has_the_int8_networks_and_their_changes(compared):
    lines = list(csv.DictReader((compared / "comparison.csv").open()))
    networks = {line["network"] for line in lines}
    assert networks > {f"student_ema ({label})" for label in ("fp32", "int8", "int8 - fp32")}
    [line] = [
        line for line in lines
        if (line["method"], line["network"], line["metric"])
        == ("independent", "student_ema (int8 - fp32)", "nll")
    ]  # fmt: skip
    found = files(compared)
    change = {
        key: value["comparison"]["changes"]["nll"]["difference"] for key, value in found.items()
    }
    pairs = [change["independent", seed] - change["bdkd", seed] for seed in (0, 1)]
    of_method = [change["independent", seed] for seed in (0, 1)]
    interval = stats.t.interval(0.95, 1, np.mean(of_method), stats.sem(of_method))
    assert float(line["mean"]) == pytest.approx(np.mean(of_method), rel=1e-9)
    assert [float(line["mean_low"]), float(line["mean_high"])] == pytest.approx(interval)
    assert float(line["difference"]) == pytest.approx(np.mean(pairs), rel=1e-9)
    assert float(line["p_t_holm"]) == pytest.approx(stats.ttest_1samp(pairs, 0).pvalue, rel=1e-6)


def test_a_repeated_comparison_exports_nothing(compared, capsys):
    before = {path: path.stat().st_mtime_ns for path in compared.glob("*/export/*/*")}
    capsys.readouterr()
    main(["compare", *COMMAND, "--folder", str(compared), "--json"])
    content = json.loads(capsys.readouterr().out)
    assert {row["network"] for row in content["quantized"]} == {
        "student_ema (fp32)", "student_ema (int8)", "student_ema (int8 - fp32)",
    }  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in before} == before


GAIN = {"before": 0.25, "after": 0.1, "difference": -0.15, "low": -0.2, "high": -0.1}
SCALED = {"temperature_gain": {"temperature": 0.5, "changes": {"ece": GAIN}}}


@pytest.mark.parametrize("damage", ["step", "broken", "no file", "temperature", "other file"])
def test_outdated_int8_files_are_exported_again(damage, compared, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "q")
    runs = plan_runs(load_recipe("digits"), METHODS, [0, 1], tmp_path / "none")
    runs = [
        run.__class__(run.method, run.seed, _with_folder(run.recipe, folder / run.name),
                      run.frozen, run.teachers)
        for run in runs
    ]  # fmt: skip
    assert list(_jobs(runs)) == []
    path = folder / "bdkd-seed1/export/student_ema/model-int8.json"
    if damage == "step":
        path.write_text(path.read_text().replace('"step": 12', '"step": 6'))
    elif damage == "broken":
        path.write_text("{")
    elif damage == "temperature":  # must not be averaged with other students
        path.write_text(json.dumps(json.loads(path.read_text()) | SCALED))
    elif damage == "other file":  # bdkd export --no-evaluate --force leaves the old comparison
        file = path.with_name("model-int8.onnx")
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        path.with_name("model-int8.onnx").unlink()
    [job] = _jobs(runs)
    assert job.name == "bdkd-seed1 student_ema"
    assert job.arguments()[:2] == ["export", str(folder / "bdkd-seed1")]
    assert "--force" in job.arguments()


def _with_folder(recipe, folder):
    import dataclasses

    return dataclasses.replace(recipe, run_dir=str(folder))


def test_a_signal_says_how_many_students_are_quantised(compared, tmp_path, monkeypatch):
    """The running export also gets the signal, and is not counted."""
    folder = shutil.copytree(compared, tmp_path / "q")
    runs = []
    for run in plan_runs(load_recipe("digits"), METHODS, [0, 1], tmp_path / "none"):
        shutil.rmtree(folder / run.name / "export")
        recipe = _with_folder(run.recipe, folder / run.name)
        runs.append(run.__class__(run.method, run.seed, recipe, run.frozen, run.teachers))

    def one_and_a_half(jobs, at_once, done, stop):
        done(jobs[0], Outcome(0))
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        done(jobs[1], Outcome(130, "stopped"))

    monkeypatch.setattr("bdkd.cli.compare_quantize.run_jobs", one_and_a_half)
    with pytest.raises(Interrupted, match="1 of 4 students are quantised; continue with the same"):
        quantize_all(runs, 1, "the command", None)


def test_a_failed_export_does_not_stop_the_others(compared, tmp_path, capsys):
    folder = shutil.copytree(compared, tmp_path / "q")
    for run in ("bdkd-seed0", "bdkd-seed1"):
        shutil.rmtree(folder / run / "export")
    (folder / "bdkd-seed0" / "export").write_text("in the way")
    code, message = fail(capsys, *COMMAND, "--folder", str(folder))
    last = message.splitlines()[-1]
    assert (code, "bdkd-seed0 student_ema: " in last) == (1, True), message
    assert "run the same command again" in last
    assert (folder / "bdkd-seed1/export/student_ema/model-int8.onnx").exists()
    written = (folder / "comparison.md").read_text()
    assert "The tables leave out these int8 files: bdkd seed 0 student_ema." in written
    assert "leave out the runs" not in written
    content = json.loads((folder / "comparison.json").read_text())
    assert list(content["failed"]) == ["bdkd-seed0 student_ema"]
    assert "cannot write" in content["failed"]["bdkd-seed0 student_ema"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--quantize", "int4"], 2, ["--quantize", "int8", "int4"]),
        (["--quantize", "int8", "--data.validation", "0", "--train.select", "last"], 2,
         ["--quantize needs validation images", "data.validation"]),
    ],
    ids=["int4", "no validation"],
)  # fmt: skip
def test_options_that_prevent_quantisation_are_refused_before_the_training(
    arguments, code, words, tmp_path, capsys
):
    folder = tmp_path / "q"
    came, message = failure(["compare", *TINY, *arguments, "--folder", str(folder)], capsys)
    assert came == code
    assert all(word in message for word in words), message
    assert not folder.exists()


def test_a_missing_package_is_named_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "bdkd.cli.compare_quantize.find_spec", lambda name: None if name == "onnxscript" else 1
    )
    folder = tmp_path / "q"
    code, message = failure(["compare", *COMMAND, "--folder", str(folder)], capsys)
    assert (code, "onnxscript: pip install 'bdkd[export]'" in message) == (1, True)
    assert not folder.exists()


# --- the findings --------------------------------------------------------------------------------


def runs_with(changes: dict[str, list[float]]) -> list[QuantizedRun]:
    """Return runs of methods whose ECE changes by given amounts, one for each seed."""
    made = []
    for method, values in changes.items():
        for seed, value in enumerate(values):
            change = {"before": 0.1, "after": 0.1 + value, "difference": value,
                      "low": value - 0.01, "high": value + 0.01}  # fmt: skip
            student = Quantized("student", "m", 1, 9, (300, 100), 1.0, {"ece": change})
            run = comparison.Run(method, seed, {"wall_seconds": 1.0}, frozenset())
            made.append(QuantizedRun(run, [student]))
    return made


def test_a_method_that_loses_calibration_is_found():
    noise = [0.001, -0.002, 0.0015, -0.0005, 0.0]
    runs = runs_with({"a": noise, "b": [0.05 + x for x in noise[::-1]], "c": noise[1:] + noise[:1]})
    text = " ".join(quantized.notes(runs, ["a", "b", "c"]))
    assert "In 5 of 15 files the interval over images of the change of ECE" in text
    found = r"student, ECE: the change of b \(t-test p <0\.0001\) differs from that of a\."
    assert re.search(found, text), text
    assert "int8 files are 3.0 times smaller" in text
    same = " ".join(quantized.notes([run for run in runs if run.run.method != "b"], ["a", "c"]))
    assert "ECE: no test finds that the change of a method differs from that of a (smallest" in same
    _, lines = quantized.differences(runs, ["a", "b", "c"], "student")
    assert [(line[0], line[1], line[2]) for line in lines] == [
        ("b", "ECE %", "+5.00"), ("c", "ECE %", "0.00"),
    ]  # fmt: skip


def test_a_difference_that_only_wilcoxons_test_finds_is_named():
    """All seeds change, but the t-test does not find it because of one outlier."""
    change = [0.01, 0.012, 0.009, 0.011, 0.013, 0.008, 0.014, 0.3]
    runs = runs_with({"a": [0.0] * 8, "b": change})
    t, w = stats.ttest_1samp(change, 0).pvalue, stats.wilcoxon(change, method="exact").pvalue
    assert w < 0.05 < t
    assert quantized.notes(runs, ["a", "b"])[-1] == (
        f"student, ECE: the change of b (t-test p {t:.3f}, Wilcoxon p {w:.3f}) differs from that "
        "of a."
    )


def test_runs_without_int8_files_cause_no_error():
    [run] = runs_with({"a": [0.0]})
    empty = QuantizedRun(run.run, [], ["student"])
    note = "The tables leave out these int8 files: a seed 0 student."
    assert quantized.notes([empty], ["a"]) == [note]
    assert quantized.labelled([empty], ["a"]) == []


def test_a_student_without_an_int8_file_is_named():
    [run] = runs_with({"a": [0.0]})
    text = quantized.notes([QuantizedRun(run.run, run.students, ["student2"])], ["a"])
    assert "The tables leave out these int8 files: a seed 0 student2." in text


# --- the report ----------------------------------------------------------------------------------


def report(folder: Path, output: Path) -> str:
    main(["report", str(folder), "--no-tsne", "--output", str(output)])
    return output.read_text()


def test_the_report_shows_fp32_and_int8_metrics(compared, tmp_path):
    page = report(compared, tmp_path / "r.html")
    table = page.partition("Students in fp32 and int8, on the test images")[2]
    table = table.partition("</table>")[0]
    head = re.findall(r'<th scope="col">(.*?)</th>', table)
    assert head[:4] == ["method", "network", "top-1 fp32", "top-1 int8"]
    assert "T" not in head
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in table.split("<tr>")[2:]]
    assert len(rows) == 2
    for method, row in zip(METHODS, rows, strict=True):
        found = [files(compared)[method, seed]["comparison"] for seed in (0, 1)]
        ece = np.array([compared_["changes"]["ece"]["after"] for compared_ in found])
        cell = dict(zip(head, row, strict=True))["ECE int8"]
        assert cell == f"{100 * ece.mean():.2f} ± {100 * ece.std(ddof=1):.2f}%"


def test_the_report_shows_the_ece_with_and_without_a_temperature(compared, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "q")
    for path in folder.glob("*/export/*/model-int8.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | SCALED))
    page = report(folder, tmp_path / "r.html")
    assert '<th scope="col">ECE int8 without T</th>' in page
    assert "25.00 ± 0.00%" in page


def test_the_report_has_a_note_for_each_broken_int8_file(compared, tmp_path, capsys):
    folder = shutil.copytree(compared, tmp_path / "q")
    paths = sorted(folder.glob("*/export/*/model-int8.json"))
    good = paths[0].read_text()
    texts = ("{", "[]", good.replace('"step": 12', '"step": 6'), '{"a": 1}')
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    page = report(folder, tmp_path / "r.html")
    assert "Students in fp32 and int8" not in page
    errors = capsys.readouterr().err
    assert errors.count("is not the comparison of an int8 file") == 3
    assert "weights of another step" in errors


def test_a_file_in_another_folder_does_not_count_twice(compared, tmp_path, capsys):
    folder = shutil.copytree(compared, tmp_path / "q")
    before = report(folder, tmp_path / "before.html")
    exported = folder / "bdkd-seed0" / "export"
    shutil.copytree(exported / "student_ema", exported / "scaled")
    capsys.readouterr()
    page = report(folder, tmp_path / "after.html")
    table = "Students in fp32 and int8, on the test images"
    assert (
        page.partition(table)[2].partition("</table>")[0]
        == (before.partition(table)[2].partition("</table>")[0])
    )
    left_out = "export/scaled/model-int8.json is left out: it belongs in the folder 'student_ema'"
    assert capsys.readouterr().err.count(left_out) == 1


VALUE = {"before": 0.1, "after": 0.1, "difference": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.parametrize(
    "change",
    [
        {"images": 0}, {"step": 10**400}, {"step": -1},
        {"networks": {"a": {"model": "m", "role": "r", "bytes": 0}}},
        {"comparison": {"bytes": 10**400, "agreement": {"value": 1.0}, "changes": {}}},
        {"comparison": {"bytes": 9, "agreement": {"value": 5.0}, "changes": {}}},
        {"comparison": {"bytes": 9, "agreement": {"value": 1.0},
                        "changes": {"ece": VALUE | {"after": 1e308}}}},
        {"temperature_gain": {"temperature": 0.0, "changes": {}}},
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(change, compared, tmp_path):
    """A report of untrusted folders would divide by zero or overflow."""
    path = sorted(compared.glob("*/export/*/model-int8.json"))[0]
    other = tmp_path / "model-int8.json"
    other.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="is not the comparison"):
        read_quantized(other)


@pytest.mark.parametrize(
    "change",
    [
        {"split": "val"}, {"networks": {}}, {"comparison": None}, {"step": "12"},
        {"networks": {"a": {"model": "m", "role": "r", "bytes": None}}},
    ],
)  # fmt: skip
def test_files_with_other_content_are_refused(change, compared, tmp_path):
    path = next(iter(sorted(compared.glob("*/export/*/model-int8.json"))))
    assert math.isfinite(read_quantized(path).value("ece", "after"))
    assert math.isnan(read_quantized(path).value("none", "after"))
    other = tmp_path / "model-int8.json"
    other.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="is not the comparison"):
        read_quantized(other)
