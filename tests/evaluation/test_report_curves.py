"""Read the curves of a report from its page, and compare them with plain loops over the runs."""

import json
import math
from array import array
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import SEEDS_OF, STEPS, STEPS_PER_EPOCH, a_run, body, page_of, told_apart
from svg_marks import Axes, cards_of, classes, points_of, rows_of, with_class, words

from bdkd.evaluation.report.charts import number, percent
from bdkd.evaluation.report.groups import POINTS, average, group_runs
from bdkd.evaluation.report.runs import Run, Series, find_runs, read_run

__all__ = ["body"]  # a fixture


@pytest.fixture(scope="module")
def cards(body):
    return cards_of(body, "accuracy", "calibration", "balance", "time")


def averaged(method: str, value) -> tuple[list, list, list]:
    """Return the mean, minimum and maximum over seeds at each step."""
    columns = [value(seed) for seed in SEEDS_OF[method]]
    return tuple([f(column) for column in zip(*columns, strict=True)] for f in (mean, min, max))


OF_STUDENTS = {"Student accuracy": "top1", "Student calibration error": "ece",
               "Student NLL": "nll"}  # fmt: skip
OF_STEPS = {
    "Weight of the forward KL": "forward_weight", "Weight of the reverse KL": "reverse_weight",
    "Forward KL (teacher ‖ student)": "forward_kl", "Reverse KL (student ‖ teacher)": "reverse_kl",
    "Training speed (images/s)": "images_per_second",
    "Waiting for data (share of the time)": "data_wait",
}  # fmt: skip
OF_NETWORKS = {"Top-1": "top1", "Entropy H (nats)": "entropy"}
IN_PERCENT = ("Student accuracy", "Student calibration error", "Waiting for", "Top-1", "Accuracy")


def validated(method: str, network: str, metric: str):
    return lambda seed: [told_apart(method, network, metric, "val", seed, s) for s in STEPS[3::4]]


def curves_of(title: str) -> list[tuple[str, bool, list, tuple[list, list, list]]]:
    """Return for each line of a card its name, whether it shows the training, and its points."""
    training, validation = list(STEPS), list(STEPS[3::4])
    if title in OF_STUDENTS:
        return [
            (m, False, validation, averaged(m, validated(m, "student_ema", OF_STUDENTS[title])))
            for m in SEEDS_OF
        ]
    if title in OF_STEPS:
        metric = OF_STEPS[title]
        return [
            (m, False, training,
             averaged(m, lambda s, m=m: [told_apart(m, metric, s, t) for t in training]))
            for m in SEEDS_OF
        ]  # fmt: skip
    if title.startswith("Accuracy gap"):
        return [
            (m, False, validation, averaged(m, lambda s, m=m: [
                a - b for a, b in zip(validated(m, "teacher", "top1")(s),
                                      validated(m, "student_ema", "top1")(s), strict=True)]))
            for m in SEEDS_OF
        ]  # fmt: skip
    kind, method = title.rsplit(": ", 1)
    metric, lines = OF_NETWORKS[kind], []
    # Students come first, so that they have the same colour in all charts.
    for name in ("student", "student_ema", "teacher"):
        if name != "student_ema":
            lines.append((name, True, training, averaged(method, lambda s, n=name: [
                told_apart(method, n, metric, "train", s, t) for t in training])))  # fmt: skip
        lines.append((name, False, validation, averaged(method, validated(method, name, metric))))
    return lines


CURVES = [*OF_STUDENTS, *OF_STEPS, "Accuracy gap between teacher and student",
          *(f"{kind}: {method}" for kind in OF_NETWORKS for method in SEEDS_OF)]  # fmt: skip


@pytest.mark.parametrize("title", CURVES)
def test_a_curve_is_the_mean_over_seeds_in_a_band_from_minimum_to_maximum(title, cards):
    card = cards[title]
    chart = with_class(card, "svg", "chart")[0]
    axes = Axes(chart)
    assert words(with_class(chart, "text", "label")[0]) == "epoch"
    expected = curves_of(title)
    named = list(dict.fromkeys(name for name, *_ in expected))
    paths = with_class(chart, "path", "line")
    bands = with_class(chart, "path", "band")
    for path, band, (name, thin, steps, (y, low, high)) in zip(paths, bands, expected, strict=True):
        x = np.array(steps) / STEPS_PER_EPOCH
        axes.assert_drawn(path, x, np.array(y))
        assert classes(path) == {"line", f"c{named.index(name)}"} | ({"thin"} if thin else set())
        [outline] = points_of(band)
        np.testing.assert_allclose(
            axes.y(outline[:, 1]), [*high, *low[::-1]], atol=2 * axes.near[1]
        )
    # The legend shows each name with the style of its line.
    [legend] = with_class(card, "ul", "legend")
    items = [item for item in legend if item.find("svg") is not None]
    assert [words(item) for item in items] == named
    for item, name in zip(items, named, strict=True):
        line = next(
            p for p, (of, thin, *_) in zip(paths, expected, strict=True) if of == name and not thin
        )
        swatch = item.find("svg/line")
        assert classes(swatch) == classes(line)
        assert swatch.get("stroke-dasharray") == line.get("stroke-dasharray")
    form = percent if title.startswith(IN_PERCENT) else number
    head, *lines = rows_of(card)
    assert head[1:] == ["first", "least", "greatest", "last"]
    assert lines == [
        [name + (" (training)" if thin else ""), *map(form, (y[0], min(y), max(y), y[-1]))]
        for name, thin, _, (y, _, _) in expected
    ]


def test_the_axis_shows_steps_if_a_run_has_no_finished_epoch():
    runs = [a_run("bdkd", 0), a_run("dkd", 0)]
    runs[1].steps_per_epoch = None
    body = page_of(runs)
    chart = with_class(cards_of(body)["Student accuracy"], "svg", "chart")[0]
    assert words(with_class(chart, "text", "label")[0]) == "step"
    for path in with_class(chart, "path", "line"):
        np.testing.assert_allclose(Axes(chart).x(points_of(path)[0][:, 0]), STEPS[3::4], atol=0.1)


def test_the_accuracy_gap_is_between_the_means_of_teachers_and_students():
    """There are two teachers and two students. The gap exists at the steps at which all were
    validated."""
    run = a_run("bdkd", 0)
    run.config["networks"] = {
        "t1": {"role": "teacher"}, "t2": {"role": "teacher"}, "a": {"role": "student"},
        "b": {"role": "student"},
    }  # fmt: skip
    run.summary.clear()
    run.series = {
        (name, "val", "top1"): Series(array("d", steps), array("d", values))
        for name, steps, values in (
            ("t1", [10, 20, 40], [0.5, 0.6, 0.7]), ("t2", [10, 20, 40], [0.6, 0.8, 1.0]),
            ("a", [20, 40, 60], [0.3, 0.4, 0.5]), ("b", [20, 40, 60], [0.4, 0.5, 0.9]),
        )
    }  # fmt: skip
    body = page_of([run])
    chart = with_class(
        cards_of(body)["Accuracy gap between teacher and student"], "svg", "chart"
    )[0]  # fmt: skip
    [path] = with_class(chart, "path", "line")
    Axes(chart).assert_drawn(path, [1, 2], np.array([0.7 - 0.35, 0.85 - 0.45]))


VALUE = st.floats(-1, 1) | st.just(math.nan)


@given(st.lists(st.dictionaries(st.integers(0, 9), VALUE, min_size=1), min_size=1, max_size=4))
def test_seeds_are_averaged_at_each_step_that_any_of_them_has(seeds):
    line = average("", [(np.array([*s], float), np.array([*s.values()])) for s in seeds], 0)
    steps = sorted({step for seed in seeds for step in seed})
    assert line.x.tolist() == steps
    for k, step in enumerate(steps):
        known = [s[step] for s in seeds if step in s and not math.isnan(s[step])]
        if not known:
            assert math.isnan(line.y[k])
            continue
        assert line.y[k] == pytest.approx(mean(known), abs=1e-12)
        if len(seeds) > 1:
            assert (line.low[k], line.high[k]) == (min(known), max(known))


def test_the_band_of_a_thinned_line_contains_outliers_and_the_end_is_kept():
    x = np.arange(10_000.0)
    up, down = np.zeros(10_000), np.ones(10_000)
    up[1234], down[4321] = 7, -7
    line = average("", [(x, up), (x, down)], 0)
    assert len(line.x) == POINTS
    assert (line.x[-1], line.y[-1]) == (9999, 0.5)
    assert (line.high.max(), line.low.min()) == (7, -7)
    at = line.high.argmax()
    assert abs(line.x[at] - 1234) < 10_000 / POINTS
    assert (np.diff(line.x) > 0).all()


# --- folders -------------------------------------------------------------------------------------


def test_all_numbers_of_a_folder_are_read(tmp_path):
    lines = [
        {"step": 10, "epoch": 0, "split": "train", "student": {"loss": 2.5, "top1": 0.25},
         "forward_weight": 1.5, "unknown": 3.0},
        {"step": 19, "epoch": 1, "split": "val", "student": {"top1": 0.5, "nll": None}},
        {"step": 30, "epoch": 1, "split": "train", "student": {"loss": -1e31, "top1": True}},
        {"step": 38, "epoch": 2, "split": "val", "student": {"top1": 0.75, "nll": 0.5}},
        {"step": 50, "epoch": 2, "split": "train", "student": {"loss": 1.5}},
        {"step": 50, "epoch": 2, "split": "val", "student": {"top1": 0.8}},  # stopped here
    ]  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines)
    odd = ["broken", *(json.dumps({**lines[-1], "step": step}) for step in (-1, 1e12, None))]
    (tmp_path / "metrics.jsonl").write_text("\n".join([text, *odd]) + '\n{"step": 60, "spl')
    run = read_run(tmp_path)
    nan = pytest.approx(math.nan, nan_ok=True)
    assert {key: (list(s.steps), list(s.values)) for key, s in run.series.items()} == {
        ("student", "train", "loss"): ([10, 30, 50], [2.5, nan, 1.5]),
        ("student", "train", "top1"): ([10, 30], [0.25, nan]),
        ("", "train", "forward_weight"): ([10], [1.5]),
        ("student", "val", "top1"): ([19, 38, 50], [0.5, 0.75, 0.8]),
        ("student", "val", "nll"): ([19, 38], [nan, 0.5]),
    }
    assert run.steps_per_epoch == 19  # only finished epochs count
    assert run.notes == [
        "4 lines of metrics.jsonl cannot be read and are left out",
        "not finished: there is no summary.json yet",
    ]


def test_roles_come_from_the_recipe_and_averages_have_the_role_of_their_network():
    run = a_run("bdkd", 0)
    run.config["networks"] = {
        "net": {"role": "teacher"}, "net2": {"role": "student"}, "net23": {"role": "teacher"},
    }  # fmt: skip
    run.summary["networks"] = {
        name: {"role": "student"} for name in ("net", "net2", "net23", "net2_ema", "other")
    } | {"old_teacher": {}}
    run.series = {}
    assert {name: run.role(name) for name in run.networks} == {
        "net": "teacher", "net2": "student", "net23": "teacher", "net2_ema": "student",
        "other": "student", "old_teacher": "teacher",
    }  # fmt: skip
    assert run.networks_with_role("student") == ["net2_ema", "other"]
    assert run.networks_with_role("teacher") == ["net", "net23", "old_teacher"]


def test_different_paths_of_a_folder_are_one_run(tmp_path, monkeypatch):
    for name in ("c", "a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "b")
    monkeypatch.chdir(tmp_path)
    found = find_runs([Path("link"), Path("runs"), tmp_path / "runs" / "a"])
    assert found == [Path("link"), Path("runs/a"), Path("runs/c")]


def test_runs_that_differ_only_in_seed_folder_or_initial_weights_are_one_group():
    def of(**changes) -> Run:
        run = a_run("bdkd", 0)
        run.config |= changes
        return run

    plain = of(data={"seed": 1})
    alike = [
        of(data={"seed": 1}, seed=5), of(data={"seed": 1}, run_dir="x"),
        of(data={"seed": 1}, device="cuda"), of(data={"seed": 1}, checkpoint={"every_steps": 7}),
    ]  # fmt: skip
    weights = of(data={"seed": 1})
    weights.config["networks"]["teacher"]["weights"] = "best.pt"
    other = of(data={"seed": 2})  # a different selection of images is a different experiment
    groups = group_runs([plain, other, *alike, weights])
    assert [len(group.runs) for group in groups] == [6, 1]
    assert groups[0].runs[0] is plain
    assert [group.label for group in groups] == ["bdkd (seed = 1)", "bdkd (seed = 2)"]
