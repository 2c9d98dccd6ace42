"""The marks in the charts of a report are at the positions of the given values."""

import math
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from svg_marks import Axes, at, classes, parse, points_of, value_of, with_class, words

from bdkd.evaluation.report.charts import (
    Line,
    bar_list,
    dash,
    histogram,
    legend,
    line_chart,
    number,
    percent,
    scatter,
)
from bdkd.evaluation.report.markup import macros, printable, tag
from bdkd.evaluation.report.reliability import bin_images, draw


class Elements(HTMLParser):
    """Collect start tags with their attributes, texts and end tags, as a browser parses them."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.found: list = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, attrs))

    def handle_endtag(self, tag):
        self.found.append(tag)

    def handle_data(self, data):
        self.found.append(data)


@example("a \"b\" 'c' <d> &amp; e=f/", 0.0)
@example("\x00\x1b\ud800", 120.0)
@given(st.text(st.characters() | st.sampled_from(" \"'<>&=/`\n")), st.floats(-1e4, 1e4))
def test_texts_and_attributes_are_escaped_and_read_back_unchanged(anything, length):
    """Without quotes, an attribute would end at the first space, and the rest would become another
    attribute."""
    markup = tag("p", anything, "end", title=anything, x=length, class_="a b", none=None)
    start, *texts, end = Elements(markup).found
    name, attributes = start
    assert (name, end) == ("p", "p")
    given_back = dict(attributes)
    assert list(given_back) == ["title", "x", "class"]
    assert given_back["title"] == printable(anything)
    assert float(given_back["x"]) == pytest.approx(length, abs=0.00501)
    assert given_back["class"] == "a b"
    assert "".join(texts) == printable(anything) + "end"
    assert not any(0xD800 <= ord(c) <= 0xDFFF or ord(c) < 9 for c in markup)


def test_tables_have_column_and_row_headers():
    rows = parse(macros.table(["a", "b", "c"], [[1, 2, 3], [4, 5, 6]], "caption", head_rows=2))
    head, *lines = rows.iter("tr")
    assert [(c.tag, c.get("scope"), c.text) for c in head] == [("th", "col", n) for n in "abc"]
    for line, numbers in zip(lines, ([1, 2, 3], [4, 5, 6]), strict=True):
        assert [(c.tag, c.get("scope")) for c in line] == [
            ("th", "row"), ("th", "row"), ("td", None),
        ]  # fmt: skip
        assert [int(words(c)) for c in line] == numbers


def waves(gap: bool = True) -> list[Line]:
    """Return three lines with different steps and ranges. One has a band, and one has a gap."""
    x = np.arange(3.0, 40)
    upper = Line(
        "upper", x, 0.5 + 0.3 * np.sin(x / 5), 0, low=0.4 + 0 * x, high=0.3 * np.sin(x) + 1
    )
    y = np.cos(x / 7) ** 2
    if gap:
        y[10:14] = math.nan
    return [
        upper,
        Line("lower", x[:20] * 2, y[:20] / 3, 1),
        Line("training", x, y / 2, 1, thin=True),
    ]


@pytest.mark.parametrize("form", [number, percent])
def test_every_point_of_a_line_is_at_its_value_on_the_axes(form):
    lines = waves()
    chart = parse(line_chart("Title", lines, "step", form, marks=True))
    axes = Axes(chart)
    paths = with_class(chart, "path", "line")
    for line, path in zip(lines, paths, strict=True):
        axes.assert_drawn(path, line.x, line.y)
        assert classes(path) == {"line", f"c{line.style}"} | ({"thin"} if line.thin else set())
        assert path.get("stroke-dasharray") == (None if line.thin else dash(line.style))
    # Ticks are in percent only if the values are in percent.
    beside = [words(e) for e in with_class(chart, "text", "tick", "end")]
    assert all(label.endswith("%") == (form is percent) for label in beside)
    [label] = with_class(chart, "text", "label")
    assert words(label) == "step"
    # The outline of a band follows the upper edge, and then the lower edge backwards.
    [band] = with_class(chart, "path", "band", "c0")
    [outline] = points_of(band)
    x, low, high = lines[0].x, lines[0].low, lines[0].high
    np.testing.assert_allclose(axes.x(outline[:, 0]), [*x, *x[::-1]], atol=axes.near[0])
    np.testing.assert_allclose(axes.y(outline[:, 1]), [*high, *low[::-1]], atol=axes.near[1])
    # All points are inside the frame.
    width, height = (float(v) for v in chart.get("viewBox").split()[2:])
    drawn = np.concatenate([p for path in chart.iter("path") for p in points_of(path)])
    [frame] = [at(line, "x1", "x2", "y1") for line in with_class(chart, "line", "axis")]
    assert drawn[:, 0].min() >= frame[0]
    assert drawn[:, 0].max() <= frame[1] < width
    assert 0 < drawn[:, 1].min() < drawn[:, 1].max() <= frame[2] < height
    # The lines fill the frame.
    assert (drawn[:, 0].min(), drawn[:, 0].max()) == pytest.approx(tuple(frame[:2]), abs=0.1)
    assert drawn[:, 1].max() - drawn[:, 1].min() > 0.85 * (frame[2] - 12)
    # Every point has a dot with its value.
    dots = [(at(e, "cx", "cy"), words(e)) for e in chart.iter("circle")]
    told = [(line, y) for line in lines for y in line.y if np.isfinite(y)]
    assert [text for _, text in dots] == [f"{line.label}: {form(y)}" for line, y in told]
    places = np.concatenate([p for path in paths for p in points_of(path)])
    np.testing.assert_allclose([place for place, _ in dots], places)
    # The description contains the last value of each validation line.
    last = [line.y[np.isfinite(line.y)][-1] for line in lines]
    assert words(chart.find("desc")) == (
        f"Line chart over step. upper ends at {form(last[0])}; lower ends at {form(last[1])}."
    )
    only = parse(line_chart("Title", lines[2:], "step", form))
    assert words(only.find("desc")) == f"Line chart over step. training ends at {form(last[2])}."


def test_points_on_a_logarithmic_axis_have_their_names_above_them():
    x, y = np.array([1.2e5, 4e5, 2.3e6]), np.array([0.7, 0.75, 0.72])
    line = Line("student", x, y, 2, low=y - 0.01, high=y + 0.02, names=("small", "middle", "large"))
    chart = parse(line_chart("T", [line], "parameters", percent, marks=True, log_x=True))
    axes = Axes(chart, log_x=True)
    [path] = with_class(chart, "path", "line")
    axes.assert_drawn(path, x, y)
    below = [words(e) for e in with_class(chart, "text", "tick", "middle")]
    inside = [number(v) for v in (1e5, 2e5, 5e5, 1e6, 2e6)]
    assert [x for x in below if x not in line.names] == inside
    names = with_class(chart, "text", "halo")
    assert [words(e) for e in names] == ["small", "middle", "large"]
    dots = [at(e, "cx", "cy") for e in chart.iter("circle")]
    for name, (a, b) in zip(names, dots, strict=True):
        assert at(name, "x")[0] == a
        assert b - 20 < at(name, "y")[0] < b - 4  # above a dot with a radius of 4 px
    assert [words(e) for e in chart.iter("circle")] == [
        "student, small: 70.00%", "student, middle: 75.00%", "student, large: 72.00%",
    ]  # fmt: skip


def test_ticks_of_steps_and_epochs_are_integers():
    """There is no tick for half an epoch."""
    line = Line("a", np.array([1.0, 2.0]), np.array([0.1, 0.2]))
    chart = parse(line_chart("T", [line], "epoch"))
    below = with_class(chart, "text", "tick", "middle")
    assert [words(e) for e in below] == ["1", "2"]
    [path] = with_class(chart, "path", "line")
    assert classes(path) == {"line", "c0"}  # by default the first colour and no dashes
    assert path.get("stroke-dasharray") is None


def test_a_single_point_has_a_dot_and_a_flat_line_has_ticks():
    lone = Line("a", np.array([3.0, 5.0]), np.array([math.nan, 0.25]))
    flat = Line("b", np.array([3.0, 5.0]), np.array([0.25, 0.25]))
    chart = parse(line_chart("T", [lone, flat], "step"))
    axes = Axes(chart)
    [dot] = chart.iter("circle")
    x, y = at(dot, "cx", "cy")
    assert axes.x(x) == pytest.approx(5, abs=axes.near[0])
    assert axes.y(y) == pytest.approx(0.25, abs=axes.near[1])
    [top, *_, bottom] = sorted(at(line, "y1")[0] for line in with_class(chart, "line", "grid"))
    assert top < y < bottom  # in the middle of the frame


def test_sixteen_series_have_different_styles():
    """Colours repeat after eight series. Series with the same colour have different dashes."""
    items = list(parse(legend([(f"series {k}", k) for k in range(16)])))
    drawn = [item.find("svg/line") for item in items]
    assert len({(line.get("class"), line.get("stroke-dasharray")) for line in drawn}) == 16
    assert [words(item) for item in items] == [f"series {k}" for k in range(16)]
    for k, line in enumerate(drawn):
        assert classes(line) == {"line", f"c{k % 8}"}
        assert line.get("stroke-dasharray") == dash(k)


def test_the_heights_of_a_histogram_are_the_shares():
    edges = np.linspace(-2, 2, 9)
    shares = [np.array([0.05, 0.1, 0.3, 0.2, 0.15, 0.1, 0.06, 0.04]), np.full(8, 0.125)]
    lines = [Line(f"m{k}", edges, y, k) for k, y in enumerate(shares)]
    chart = parse(histogram("T", lines, "gap", marker=0.0))
    axes = Axes(chart)
    outlines = with_class(chart, "path", "line")
    for line, path in zip(lines, outlines, strict=True):
        assert f"c{line.style}" in classes(path)
        start, *steps, end = path.get("d").replace("V", "|V").split("|")
        x0, y0 = (float(v) for v in start[1:].split())
        assert (axes.x(x0), axes.y(y0)) == pytest.approx((-2, 0), abs=max(axes.near))
        assert axes.y(float(end[1:])) == pytest.approx(0, abs=axes.near[1])
        read = [[float(v) for v in step[1:].split("H")] for step in steps]
        np.testing.assert_allclose([axes.y(a) for a, _ in read], line.y, atol=axes.near[1])
        np.testing.assert_allclose([axes.x(b) for _, b in read], edges[1:], atol=axes.near[0])
    assert [p.get("d") for p in with_class(chart, "path", "area")] == [p.get("d") for p in outlines]
    [reference] = with_class(chart, "line", "reference")
    a, b = (axes.x(v) for v in at(reference, "x1", "x2"))
    assert (a, b) == pytest.approx((0, 0), abs=axes.near[0])
    assert histogram("T", [], "gap") is None


def test_bars_are_as_long_as_their_values():
    rows = [("backward", 8.0), ("forward", 4.0), ("a name of more than 24 letters", 2.0)]
    chart = parse(bar_list("T", rows, lambda value: f"{value:.1f} ms"))
    bars = [at(e, "x", "width", "y", "height") for e in chart.iter("rect")]
    np.testing.assert_allclose([w / bars[0][1] for _, w, _, _ in bars], [1, 0.5, 0.25], atol=1e-3)
    assert len({x for x, *_ in bars}) == 1
    names = with_class(chart, "text", "tick", "end")
    values = [e for e in with_class(chart, "text", "tick") if "end" not in classes(e)]
    assert [words(e) for e in values] == ["8.0 ms", "4.0 ms", "2.0 ms"]
    assert [words(e) for e in names][:2] == ["backward", "forward"]
    assert words(names[2])[:23] == rows[2][0][:23]
    for (x, wide, top, high), name, value in zip(bars, names, values, strict=True):
        for label in (name, value):
            assert top < at(label, "y")[0] < top + high + 3
        assert x + wide < at(value, "x")[0] < x + wide + 10
    ends = [top + high for _, _, top, high in bars]
    assert all(a < b for a, b in zip(ends, [bar[2] for bar in bars[1:]], strict=False))
    assert float(chart.get("viewBox").split()[3]) >= ends[-1]
    assert words(chart.find("desc")) == "; ".join(f"{n}: {v:.1f} ms" for n, v in rows)


def test_a_scatter_plot_has_one_scale_and_names_each_class():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 2, 5], 12)  # some classes have no images
    centres = {0: (0, 0), 2: (40, 0), 5: (0, 10)}
    points = rng.normal(size=(36, 2)) + [centres[label] for label in labels]
    names = ["ape", "bee", "cat", "dog", "eel", "a name of many letters"]
    chart = parse(scatter("T", points, labels, names))
    clouds = with_class(chart, "path", "cloud")
    drawn = {}
    for k, (label, cloud) in enumerate(zip([0, 2, 5], clouds, strict=True)):
        assert f"c{k}" in classes(cloud)
        drawn[label] = np.array([
            [float(v) for v in dot.removesuffix("h0").split()]
            for dot in cloud.get("d").split("M")[1:]
        ])  # fmt: skip
    places = np.concatenate([drawn[label] for label in (0, 2, 5)])
    # Both axes have the same scale, so that the t-SNE map is not stretched.
    apart = np.linalg.norm(points[:, None] - points, axis=-1)
    shown = np.linalg.norm(places[:, None] - places, axis=-1)
    scale = shown.max() / apart.max()
    np.testing.assert_allclose(shown, scale * apart, atol=0.3)
    assert 0 < places.min() < 20  # the map fills the picture
    assert 300 < places.max() < 320
    texts = with_class(chart, "text", "name")
    assert [words(e) for e in texts] == ["ape", "cat", "a name of man…"]
    for text, label in zip(texts, (0, 2, 5), strict=True):
        x, y = at(text, "x", "y")
        middle = np.median(drawn[label], 0)
        assert np.abs(np.array([x, y - 4]) - middle).max() < 8


def diagonal_of(chart):
    [line] = with_class(chart, "line", "reference")
    return line


def test_a_reliability_diagram_shows_accuracy_gap_interval_and_count_of_every_bin():
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.2, 1, 400)
    confidence[:30] = np.repeat([0.6, 0.8, 1.0], 10)  # 9/15 and 12/15 are bin edges
    correct = rng.random(400) < np.where(confidence > 0.6, confidence - 0.2, confidence + 0.2)
    chart = parse(draw("Reliability of a", bin_images(confidence, correct)))
    axes = Axes(chart)
    for ticks in ("end", "middle"):
        written = [words(e) for e in with_class(chart, "text", "tick", ticks)]
        assert [f"{k}%" for k in range(0, 101, 20)] == [x for x in written if x.endswith("%")]
    found = []
    most = max(int(((confidence > k / 15) & (confidence <= (k + 1) / 15)).sum()) for k in range(15))
    gaps = 0.0
    groups = list(chart.iter("g"))
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if not inside.any():
            continue
        n, accuracy, mean = int(inside.sum()), correct[inside].mean(), confidence[inside].mean()
        gaps += abs(correct[inside].sum() - confidence[inside].sum())
        group = groups[len(found)]
        found.append(k)
        kind = "over" if mean > accuracy else "under"
        assert words(group.find("title")) == (
            f"confidence {k / 15:.0%} to {(k + 1) / 15:.0%}: {n} images, accuracy {accuracy:.2%}, "
            f"{kind}confident by {abs(accuracy - mean):.2%}"
        )
        bar, gap, count = group.findall("rect")
        assert [classes(e) for e in (bar, gap, count)] == [{"bar"}, {kind}, {"count"}]
        for rect in (bar, gap, count):
            x, wide = at(rect, "x", "width")
            assert k / 15 < axes.x(x) < axes.x(x + wide) < (k + 1) / 15
            assert axes.x(wide) - axes.x(0) > 0.9 / 15
        for rect, bottom, top in ((bar, 0, min(accuracy, mean)),
                                  (gap, min(accuracy, mean), max(accuracy, mean))):  # fmt: skip
            y, high = at(rect, "y", "height")
            assert axes.y(y) == pytest.approx(top, abs=axes.near[1])
            assert axes.y(y + high) == pytest.approx(bottom, abs=2 * axes.near[1])
        interval = stats.binomtest(int(correct[inside].sum()), n).proportion_ci(method="wilson")
        [line] = with_class(group, "line", "interval")
        ends = sorted(axes.y(v) for v in at(line, "y1", "y2"))
        assert ends == pytest.approx([interval.low, interval.high], abs=axes.near[1])
        assert at(line, "x1")[0] == at(line, "x2")[0] == pytest.approx(sum(at(bar, "x")) + at(
            bar, "width")[0] / 2, abs=0.02)  # fmt: skip
    assert len(groups) == len(found)
    # The bars of the counts have the same baseline, and their heights are the counts.
    counted = [at(g.findall("rect")[2], "y", "height") for g in groups]
    assert len({round(y + high, 1) for y, high in counted}) == 1
    highest = max(high for _, high in counted)
    frame = at(diagonal_of(chart), "y1")[0]
    lowest = float(chart.get("viewBox").split()[3])
    assert frame < min(y for y, _ in counted)  # the bars fill a strip below the diagram
    assert highest > 0.35 * (lowest - frame)
    for k, (_, high) in zip(found, counted, strict=True):
        n = int(((confidence > k / 15) & (confidence <= (k + 1) / 15)).sum())
        assert high == pytest.approx(highest * n / most, abs=0.2)
    # On the line "calibrated", the accuracy is equal to the confidence.
    diagonal = diagonal_of(chart)
    x1, y1, x2, y2 = at(diagonal, "x1", "y1", "x2", "y2")
    assert [axes.x(x1), axes.x(x2)] == pytest.approx([0, 1], abs=axes.near[0])
    assert [axes.y(y1), axes.y(y2)] == pytest.approx([0, 1], abs=axes.near[1])
    assert words(chart.find("desc")) == (
        "Reliability diagram of 400 images: the mean gap between accuracy and confidence is "
        f"{gaps / 400:.2%}."
    )


def test_hatches_have_a_size_and_a_mark_inside():
    """A pattern without width or height draws nothing and causes no error."""
    patterns = list(parse(macros.patterns()).iter("pattern"))
    assert [pattern.get("id") for pattern in patterns] == ["over", "under"]
    for pattern in patterns:
        assert min(at(pattern, "width", "height")) > 0
        ground, mark = pattern
        assert at(ground, "width", "height") == at(pattern, "width", "height")
        if mark.tag == "line":
            assert at(mark, "x1", "y1") != at(mark, "x2", "y2")
        else:
            assert at(mark, "r")[0] > 0


def test_the_legend_of_the_diagrams_names_their_parts():
    named = {words(item): next(iter(classes(item.find("svg")[0]))) for item in parse(macros.key())}
    assert named == {
        "accuracy": "bar", "overconfident by": "over", "underconfident by": "under",
        "95% interval": "interval", "calibrated": "reference",
    }  # fmt: skip
    # The hatches that the style sheet uses: url(#over) and url(#under).
    grounds = {p.get("id"): classes(p[0]) for p in parse(macros.patterns()).iter("pattern")}
    assert grounds == {"over": {"over-ground"}, "under": {"under-ground"}}


def test_values_in_tables_have_their_unit():
    assert [percent(v) for v in (0.0, 0.12345, 1.0, math.nan)] == [
        "0.00%",
        "12.35%",
        "100.00%",
        "–",
    ]
    assert value_of(percent(0.5)) == 0.5
