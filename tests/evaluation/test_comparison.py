"""Compare paired tests with SciPy and brute force, and check the tables over methods and seeds."""

import csv
import io
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bdkd.evaluation.comparison import (
    Run,
    compare,
    compared_metrics,
    differences,
    notes,
    results,
    to_csv,
    to_markdown,
)
from bdkd.evaluation.comparison_figure import comparison_figure
from bdkd.evaluation.paired import holm, mean_interval, paired_test, wilcoxon

# --- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30, 60])
@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0])
def test_the_t_test_agrees_with_scipy(n, shift):
    values = np.random.default_rng(n).normal(shift, 1, n)
    came, expected = paired_test(values.tolist()), stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval(0.95)
    assert came.n == n
    assert came.mean == pytest.approx(values.mean(), rel=1e-12)
    assert came.p_t == pytest.approx(expected.pvalue, rel=1e-9)
    assert (came.low, came.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert mean_interval(values.tolist()) == (came.low, came.high)


@pytest.mark.parametrize("n", [1, 2, 6, 10, 25])
def test_wilcoxon_without_ties_agrees_with_scipy(n):
    for seed in range(5):
        values = np.random.default_rng(seed).normal(0.4, 1, n)
        expected = stats.wilcoxon(values, method="exact").pvalue
        assert wilcoxon(values.tolist()) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.integers(-4, 4), max_size=9))
def test_wilcoxon_with_ties_agrees_with_all_sign_combinations(values):
    """Ties are common, because accuracies on few images are often equal."""
    sizes = np.abs([v for v in values if v])
    ranks = stats.rankdata(sizes)
    observed = sum(r for r, v in zip(ranks, [v for v in values if v], strict=True) if v > 0)
    sums = [
        sum(r for r, positive in zip(ranks, signs, strict=True) if positive)
        for signs in itertools.product((False, True), repeat=len(ranks))
    ]
    low, high = np.mean(np.array(sums) <= observed), np.mean(np.array(sums) >= observed)
    # Equal sizes still tie if they are multiples of 1/7 with rounding errors.
    assert wilcoxon([(v + 3) / 7 - 3 / 7 for v in values]) == pytest.approx(
        min(1, 2 * min(low, high)), rel=1e-12
    )


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=6))
def test_holm_agrees_with_the_closed_bonferroni_procedure(p_values):
    """A hypothesis is rejected if Bonferroni rejects every set of hypotheses that contains it."""
    known = [i for i, p in enumerate(p_values) if p is not None]
    came = holm(p_values)
    for i, p in enumerate(p_values):
        if p is None:
            assert came[i] is None
            continue
        sets = (
            subset
            for size in range(1, len(known) + 1)
            for subset in itertools.combinations(known, size)
            if i in subset
        )
        expected = max(min(1, len(s) * min(p_values[k] for k in s)) for s in sets)
        assert came[i] == pytest.approx(expected, abs=1e-15)


def test_results_that_cannot_be_computed_are_none():
    one = paired_test([0.1])
    assert (one.low, one.high, one.p_t, one.p_wilcoxon) == (None,) * 4
    same = paired_test([0.3 - 0.2, 0.2 - 0.1, 0.1])  # equal except for rounding
    assert same.p_t is None
    assert same.low is None
    assert same.p_wilcoxon is None
    none = paired_test([0.0] * 6)
    assert (none.p_t, none.p_wilcoxon) == (1.0, 1.0)
    assert [mean_interval(few) for few in ([], [0.1], [0.3 - 0.2, 0.1], [0.0, 0.0])] == [None] * 4
    for bad in ([], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="finite differences"):
            paired_test(bad)


def test_true_null_hypotheses_are_rejected_in_about_5_percent():
    """This test makes 2,000 comparisons of a method with itself, with 8 seeds each."""
    values = np.random.default_rng(0).normal(0, 1, (2000, 8))
    tests = [paired_test(row.tolist()) for row in values]
    for p in ("p_t", "p_wilcoxon"):
        share = np.mean([getattr(test, p) < 0.05 for test in tests])
        assert 0.03 < share < 0.066  # Wilcoxon's p-values are multiples of 1/128


# --- tables --------------------------------------------------------------------------------------


def summary(top1: float, ece: float = 0.05, **changes) -> dict:
    """Return the summary.json of a teacher and a student with given metrics of the student."""
    student = {
        "role": "student", "model": "small", "top1": top1, "ece": ece, "nll": 0.5, "brier": 0.1,
        "temperature": 1.5, "ece_scaled": ece / 2, "nll_scaled": 0.4, **changes,
    }  # fmt: skip
    teacher = {**student, "role": "teacher", "model": "large", "top1": 0.9}
    return {"wall_seconds": 10.0, "networks": {"teacher": teacher, "student": student}}


@pytest.fixture
def runs() -> list[Run]:
    alone = [0.80, 0.82, 0.81, 0.83, 0.79]
    gains = [0.02, 0.05, 0.01, 0.04, 0.03]
    return [
        *(Run("alone", seed, summary(top1)) for seed, top1 in enumerate(alone)),
        *(
            Run("both", s, summary(t + g))
            for s, (t, g) in enumerate(zip(alone, gains, strict=True))
        ),
        # in another order, without the seed 4, and with the seed 7 that the others lack
        *(Run("frozen", s, summary(0.8), frozenset({"teacher"})) for s in (7, 3, 2, 1, 0)),
    ]


METHODS = ["alone", "both", "frozen"]


def test_there_is_a_row_for_each_network_and_method_students_first(runs):
    rows = compare(runs, METHODS)
    assert [(r.network, r.method) for r in rows] == [
        *(("student", m) for m in METHODS), *(("teacher", m) for m in METHODS),
    ]  # fmt: skip
    cell = rows[1].cells["top1"]
    assert cell.mean == pytest.approx(0.84)
    assert cell.std == pytest.approx(np.std([0.82, 0.87, 0.82, 0.87, 0.82], ddof=1))
    expected = stats.ttest_1samp([0.02, 0.05, 0.01, 0.04, 0.03], 0).pvalue
    assert cell.test.p_t == pytest.approx(expected)
    assert cell.p_t == pytest.approx(2 * expected)  # corrected for two methods
    assert rows[0].cells["top1"].test is None
    assert rows[1].cells["temperature"].test is None


@pytest.mark.parametrize(
    ("seeds", "methods", "shown"),
    [(2, 1, False), (5, 1, False), (6, 1, True), (6, 2, False), (7, 2, True), (8, 4, True)],
)
def test_a_test_that_cannot_reach_significance_is_left_out(seeds, methods, shown):
    """The smallest p-value of Wilcoxon's test is 2 / 2**seeds, times the number of methods after
    Holm's correction. Here all differences have the same sign and different sizes, which gives this
    smallest p-value."""
    names = ["first", *map(str, range(methods))]
    runs = [
        Run(name, seed, summary(0.5 + k * (0.01 + 0.001 * seed)))
        for k, name in enumerate(names)
        for seed in range(seeds)
    ]
    rows = compare(runs, names)
    header, lines = differences(rows, "student")
    smallest = methods * stats.wilcoxon(range(1, seeds + 1), method="exact").pvalue
    assert (smallest < 0.05) == shown
    line = lines[0]
    assert line[header.index("p (Wilcoxon)")] == (f"{smallest:.3f}" if shown else "–")
    assert line[header.index("p (t)")] != "–"
    assert rows[1].cells["top1"].p_wilcoxon == (pytest.approx(smallest) if shown else None)
    text = notes("first", 100, rows)[-1]
    corrected = f" after the correction for {methods} methods" if methods > 1 else ""
    errors = stats.t.ppf(1 - 0.025 / methods, seeds - 1)
    assert f"{corrected} if a mean difference is above {errors:.1f} standard errors" in text
    if shown:
        assert text.startswith(f"With {seeds} seeds both tests can reach p < 0.05: ")
    else:
        fewest = {1: 6, 2: 7}[methods]
        assert text.startswith(
            f"With {seeds} seeds Wilcoxon's test is left out, because it needs at least {fewest} "
            f"seeds to reach p < 0.05{corrected}; the t-test ({seeds - 1} degree"
        )


def test_one_seed_has_no_test_and_a_note_says_so():
    runs = [Run(name, 0, summary(top1)) for name, top1 in (("a", 0.5), ("b", 0.6))]
    rows = compare(runs, ["a", "b"])
    assert differences(rows, "student")[1][0][4:] == ["–", "–", "1"]
    assert notes("a", 100, rows)[-1] == (
        "With 1 seed there is no test: the t-test needs at least 2 seeds, and Wilcoxon's test "
        "needs at least 6 seeds to reach p < 0.05."
    )


def test_tests_use_the_seeds_that_both_methods_have(runs):
    row = compare(runs, METHODS)[2]
    assert row.seeds == (0, 1, 2, 3, 7)
    assert row.cells["top1"].test.n == 4
    assert row.cells["top1"].test.mean == pytest.approx(0.8 - np.mean([0.80, 0.82, 0.81, 0.83]))


def test_a_frozen_network_is_shown_but_not_tested(runs):
    rows = {(r.network, r.method): r for r in compare(runs, METHODS)}
    frozen = rows["teacher", "frozen"].cells["top1"]
    assert (frozen.mean, frozen.test) == (pytest.approx(0.9), None)
    # The correction does not count "frozen".
    assert rows["teacher", "both"].cells["top1"].p_t == 1.0


def test_missing_values_are_left_out(runs):
    runs[1] = Run("alone", 1, summary(0.8, temperature=None, ece_scaled=None, nll=math.nan))
    row = compare(runs, METHODS)[0]
    assert len(row.cells["ece_scaled"].values) == 4
    assert len(row.cells["nll"].values) == 4
    assert len(row.cells["top1"].values) == 5
    nothing = [Run("alone", 0, summary(0.8, temperature=None, ece_scaled=None))]
    rows = compare(nothing, ["alone"])
    header, [line] = results(rows, "student")
    assert line[header.index("ECE % at T")] == "–"
    assert line[header.index("top-1 %")] == "80.00"  # one seed has no standard deviation
    assert differences(rows, "student")[1] == []
    assert not any("Differences" in note for note in notes("alone", 100, rows))


def test_the_tables_show_means_deviations_and_differences(runs):
    rows = compare(runs, METHODS)
    header, lines = results(rows, "student")
    assert header[:2] == ["method", "top-1 %"]
    assert lines[0][:2] == ["alone", "81.00 ± 1.58"]
    assert lines[1][-2:] == ["5", "10"]
    header, lines = differences(rows, "student")
    assert lines[0][:3] == ["both", "top-1 %", "+3.00"]
    assert lines[0][3] == "+1.04 to +4.96"
    assert {line[1] for line in lines} == {"top-1 %", "ECE %", "NLL", "Brier", "ECE % at T"}
    # a difference that rounds to 0 has no sign
    nll = next(line for line in lines if line[1] == "NLL")
    assert nll[2] == "0.0000"
    text = to_markdown(["method|", "b"], [["x", "1"]])
    assert text == "| method\\| | b |\n| --- | ---: |\n| x | 1 |"


def test_the_csv_contains_all_numbers(runs):
    rows = compare(runs, METHODS)
    lines = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert len(lines) == 2 * 3 * len(compared_metrics())
    line = next(x for x in lines if (x["method"], x["network"], x["metric"]) ==
                ("both", "student", "top1"))  # fmt: skip
    cell = rows[1].cells["top1"]
    assert float(line["mean"]) == cell.mean
    assert float(line["p_t_holm"]) == cell.p_t
    assert line["paired_seeds"] == "5"
    first = next(x for x in lines if x["method"] == "alone")
    assert first["difference"] == ""


@pytest.mark.parametrize("gain", [0.2, 0.25, 0.42, 1.0])  # p = 0.03, 0.01, 0.0005 and 0.000002
def test_small_p_values_are_not_rounded_to_zero(gain):
    noise = (0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.05, -0.05)
    runs = []
    for seed, x in enumerate(noise):
        runs += [Run("a", seed, summary(0.5)), Run("b", seed, summary(0.5 + gain + x))]
    line = differences(compare(runs, ["a", "b"]), "student")[1][0]
    p = stats.ttest_1samp(gain + np.array(noise), 0).pvalue
    if p < 0.0001:
        assert line[4] == "<0.0001"
    else:
        assert float(line[4]) == pytest.approx(p, rel=0.05)


def test_a_note_names_temperatures_at_a_bound(runs):
    runs.append(Run("alone", 9, summary(0.8, temperature=0.05)))
    runs.append(Run("both", 9, summary(0.8, temperature=100.0)))
    text = " ".join(notes("alone", 359, compare(runs, METHODS)))
    assert "4 fits" in text  # student and teacher of two runs
    assert "359 test images" in text


def test_the_figure_is_written_atomically(runs, tmp_path):
    rows = compare([*runs, Run("odd", 0, summary(0.8, ece_scaled=None))], [*METHODS, "odd"])
    rows = [row for row in rows if row.network == "student"]
    path = tmp_path / "comparison.png"
    comparison_figure(rows, path, "a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["comparison.png"]
    with pytest.raises(ValueError, match="at least one"):
        comparison_figure([], path, "a title")
    with pytest.raises(OSError, match="nowhere"):
        comparison_figure(rows, tmp_path / "nowhere" / "x.png", "a title")
