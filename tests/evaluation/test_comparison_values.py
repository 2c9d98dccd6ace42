"""Compare every number in the tables and the figure of a comparison with plain loops and SciPy. All
numbers of all methods, seeds and networks differ."""

import csv
import io
import math

import numpy as np
import pytest
from report_runs import told_apart
from scipy import stats

from bdkd.evaluation import comparison_figure as comparison_figure_module
from bdkd.evaluation.comparison import Run, compare, compared_metrics, differences, results, to_csv
from bdkd.evaluation.comparison_figure import comparison_figure

SEEDS_OF = {"first": (0, 1, 2, 3, 4, 5), "second": (5, 4, 3, 2, 1, 0), "third": (1, 2, 3, 4, 7)}
NETWORKS = {"big": "teacher", "s1": "student", "fixed": "teacher", "s2": "student"}
# "fixed" is frozen under the first method, and "big" under the third: those pairs are not tested.
FROZEN = {"first": {"fixed"}, "third": {"big"}}


def full_runs() -> list[Run]:
    """Return runs with a different number for each method, seed, network and metric. One NLL is
    NaN."""
    runs = []
    for method, seeds in SEEDS_OF.items():
        for seed in seeds:
            networks = {
                name: {"role": role, "model": f"model of {name}",
                       **{m.key: told_apart(method, seed, name, m.key) for m in compared_metrics()}}
                for name, role in NETWORKS.items()
            }  # fmt: skip
            seconds = 100 * told_apart(method, seed)
            frozen = frozenset(FROZEN.get(method, ()))
            runs.append(Run(method, seed, {"wall_seconds": seconds, "networks": networks}, frozen))
    runs[2].summary["networks"]["s1"]["nll"] = math.nan
    return runs


def expected_tests(runs: list[Run], network: str, metric: str) -> dict:
    """Return by method the difference from the first method and both p-values with Holm's
    correction."""
    values = {m: {} for m in SEEDS_OF}
    for run in runs:
        value = run.summary["networks"][network][metric]
        if math.isfinite(value):
            values[run.method][run.seed] = value
    found = {}
    for method in ("second", "third"):
        if network in FROZEN.get(method, ()) or network in FROZEN["first"]:
            continue
        seeds = sorted(values[method].keys() & values["first"].keys())
        ours, theirs = ([values[m][s] for s in seeds] for m in (method, "first"))
        t, w = stats.ttest_rel(ours, theirs), stats.wilcoxon(ours, theirs, method="exact")
        interval = t.confidence_interval(0.95)
        # With five pairs or fewer, the p-value of Wilcoxon's test cannot be below 0.05.
        p_w = w.pvalue if len(seeds) > 5 else None
        found[method] = [np.mean(ours) - np.mean(theirs), *interval, len(seeds), t.pvalue, p_w]
    for column in (-2, -1):
        known = [m for m in found if found[m][column] is not None]
        ordered, largest = sorted(known, key=lambda m: found[m][column]), 0.0
        for rank, method in enumerate(ordered):
            largest = max(largest, min(1.0, found[method][column] * (len(ordered) - rank)))
            found[method][column] = largest
    return {"values": values, "tests": found}


def test_the_csv_agrees_with_plain_loops_and_scipy():
    runs = full_runs()
    lines = list(csv.DictReader(io.StringIO(to_csv(compare(runs, [*SEEDS_OF])))))
    order = [
        (n, m, k.key)
        for n in ("s1", "s2", "big", "fixed")
        for m in SEEDS_OF
        for k in compared_metrics()
    ]
    assert [(x["network"], x["method"], x["metric"]) for x in lines] == order
    for line in lines:
        network, method, metric = line["network"], line["method"], line["metric"]
        expected = expected_tests(runs, network, metric)
        values = list(expected["values"][method].values())
        assert (line["role"], line["model"]) == (NETWORKS[network], f"model of {network}")
        assert int(line["seeds"]) == len(values)
        assert float(line["mean"]) == pytest.approx(np.mean(values), rel=1e-12)
        assert float(line["std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-9)
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        ends = [float(line["mean_low"]), float(line["mean_high"])]
        assert ends == pytest.approx([*interval], rel=1e-9)
        seconds = [100 * told_apart(method, seed) for seed in SEEDS_OF[method]]
        assert line["train_seconds"] == f"{round(np.mean(seconds), 3)}"
        columns = ("difference", "difference_low", "difference_high", "paired_seeds", "p_t_holm",
                   "p_wilcoxon_holm")  # fmt: skip
        test = expected["tests"].get(method) if metric != "temperature" else None
        if test is None:
            assert [line[c] for c in columns] == [""] * 6
        else:
            numbers = [float(line[c] or "nan") for c in columns]
            wanted = [math.nan if x is None else x for x in test]
            assert numbers == pytest.approx(wanted, rel=1e-8, nan_ok=True)


def test_the_tables_agree_with_plain_loops_and_scipy():
    runs = full_runs()
    rows = compare(runs, [*SEEDS_OF])
    shown = {"top1": (100, 2), "ece": (100, 2), "nll": (1, 4), "brier": (1, 4),
             "ece_scaled": (100, 2), "nll_scaled": (1, 4), "temperature": (1, 2)}  # fmt: skip
    names = {"top1": "top-1 %", "ece": "ECE %", "nll": "NLL", "brier": "Brier",
             "ece_scaled": "ECE % at T"}  # fmt: skip
    for network in NETWORKS:
        found = {key: expected_tests(runs, network, key) for key in shown}
        header, lines = results(rows, network)
        assert header == ["method", "top-1 %", "ECE %", "NLL", "Brier", "ECE % at T", "NLL at T",
                          "T", "seeds", "train s"]  # fmt: skip
        expected = []
        for method, seeds in SEEDS_OF.items():
            cells = []
            for key, (scale, digits) in shown.items():
                values = scale * np.array([*found[key]["values"][method].values()])
                cells.append(f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}")
            seconds = np.mean([100 * told_apart(method, seed) for seed in seeds])
            expected.append([method, *cells, str(len(seeds)), f"{seconds:.0f}"])
        assert lines == expected
        expected = []
        for method in ("second", "third"):
            for key, name in names.items():
                if method not in found[key]["tests"]:
                    continue
                mean, low, high, n, p_t, p_w = found[key]["tests"][method]
                scale, digits = shown[key]
                mean, low, high = (f"{scale * v:+.{digits}f}" for v in (mean, low, high))
                expected.append([method, name, mean, f"{low} to {high}", f"{p_t:.3f}",
                                 "–" if p_w is None else f"{p_w:.3f}", str(n)])  # fmt: skip
        assert differences(rows, network)[1] == expected


def test_the_figure_has_a_dot_for_every_seed_and_a_line_at_every_mean(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: saved.append(figure) or path.touch()
    )
    runs, methods = full_runs(), [*SEEDS_OF]
    comparison_figure(compare(runs, methods), tmp_path / "c.png", "a title")
    [figure] = saved
    labels = {"top1": "top-1 %", "ece": "ECE %", "nll": "NLL", "brier": "Brier",
              "ece_scaled": "ECE % at T"}  # fmt: skip
    heads = {"s1": "s1 (student)", "s2": "s2 (student)", "big": "big (teacher)",
             "fixed": "fixed (teacher)"}  # fmt: skip
    panels = iter(figure.axes)
    for network, head in heads.items():
        for metric, label in labels.items():
            axes, scale = next(panels), 1 if metric in ("nll", "brier") else 100
            assert axes.get_title(loc="left") == f"{head}: {label}"
            assert list(axes.get_yticks()) == [0, 1, 2]
            assert axes.yaxis_inverted()  # the first method is at the top
            if metric == "top1":
                assert [t.get_text() for t in axes.get_yticklabels()] == methods
            values = expected_tests(runs, network, metric)["values"]
            colours = set()
            for k, method in enumerate(methods):
                dots, line = axes.lines[2 * k : 2 * k + 2]
                of_seeds = [scale * values[method][s] for s in sorted(values[method])]
                np.testing.assert_allclose(dots.get_xdata(), of_seeds)
                y = np.array(dots.get_ydata())
                assert np.abs(y - k).max() < 0.3
                assert (np.diff(y) > 0).all()
                assert y.mean() == pytest.approx(k)
                np.testing.assert_allclose(line.get_xdata(), [np.mean(of_seeds)] * 2)
                assert np.mean(line.get_ydata()) == pytest.approx(k)
                colours.add(dots.get_color())
            assert len(colours) == 3
    assert next(panels, None) is None
    assert figure.get_suptitle() == "a title"
    assert "one seed of up to 6" in figure.get_supxlabel()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_method_far_from_the_others_is_a_number_at_the_edge(sign):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    near = {0: [1.0, 1.2], 1: [1.1, 1.3], 3: [0.9, 1.0]}
    comparison_figure_module._draw(axes, {**near, 2: [sign * 50.0, sign * 51.0]})
    low, high = axes.get_xlim()
    assert 0.8 < low < 0.9 < 1.3 < high < 1.4
    assert len(axes.lines) == 2 * len(near)
    [text] = axes.texts
    assert text.get_text() == ("50.5 \N{RIGHTWARDS ARROW}" if sign > 0
                               else "\N{LEFTWARDS ARROW} -50.5")  # fmt: skip
    assert text.get_position() == ((high if sign > 0 else low), 2)


@pytest.mark.parametrize("values", [
    [[1.0, 1.2], [1.1, 1.3], [2.0, 2.1]],  # not far
    [[1.0, 1.2], [50.0, 51.0]],  # of two methods, neither is the odd one
    [[1.0], [1.0], [2.0]],  # no range to compare with
    [[1.0, 1.2], [1.1, math.nan], [50.0, 51.0]],
])  # fmt: skip
def test_otherwise_every_method_is_drawn(values):
    assert comparison_figure_module._shown_range(values) is None
