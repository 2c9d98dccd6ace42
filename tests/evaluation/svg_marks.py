"""Read the values of marks in the charts of a report from their positions and the ticks."""

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
from markupsafe import Markup

NUMBER = re.compile(r"-?[\d,]+(\.\d+)?(e[+-]\d+)?%?")


def parse(markup: Markup | None) -> Element:
    """Return the element of a fragment, which must be well-formed XML."""
    assert markup is not None
    return ElementTree.fromstring(markup)


def body_of(page: str) -> Element:
    """Return the body of a page."""
    [body] = re.findall(r"<body>.*</body>", page, re.DOTALL)
    return ElementTree.fromstring(body)


def words(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def classes(element: Element) -> set[str]:
    return set(element.get("class", "").split())


def with_class(element: Element, name: str, *of: str) -> list[Element]:
    """Return the elements inside another that have a tag name and all of these classes."""
    return [e for e in element.iter(name) if set(of) <= classes(e)]


def at(element: Element, *keys: str) -> list[float]:
    return [float(element.get(key, "")) for key in keys]


def value_of(label: str) -> float:
    """Return the number of a tick or a cell. A percentage becomes a fraction."""
    assert NUMBER.fullmatch(label), label
    number = float(label.rstrip("%").replace(",", ""))
    return number / 100 if label.endswith("%") else number


def rows_of(table: Element) -> list[list[str]]:
    """Return the text of the cells of a table, with the header first."""
    return [[words(cell) for cell in row] for row in table.iter("tr")]


def cards_of(body: Element, *sections: str) -> dict[str, Element]:
    """Return the figures of some sections of a page, or of all sections, by their heading."""
    inside = [s for s in body.iter("section") if not sections or s.get("id") in sections]
    return {words(f.findall("h3")[0]): f for section in inside for f in section.iter("figure")}


def points_of(path: Element) -> list[np.ndarray]:
    """Return the strokes of a path of M and L commands, each ``(P, 2)`` in pixels."""
    strokes = []
    for stroke in path.get("d", "").rstrip("Z").split("M")[1:]:
        strokes.append(np.array([[float(v) for v in p.split()] for p in stroke.split("L")]))
    return strokes


class Axes:
    """The scales of a chart, computed from its ticks. ``x`` and ``y`` convert pixels to values.

    A tick has three digits and a position has one decimal, so that a value can be read with an
    error of about a tenth of a pixel. ``near`` is this error in values of ``x`` and of ``y``.
    """

    def __init__(self, chart: Element, log_x: bool = False) -> None:
        ticks = [e for e in chart.iter("text") if NUMBER.fullmatch(words(e))]
        beside = [e for e in ticks if {"tick", "end"} <= classes(e)]
        below = [e for e in ticks if {"tick", "middle"} <= classes(e) and "halo" not in classes(e)]
        grid = [at(line, "y1", "y2") for line in with_class(chart, "line", "grid")]
        assert len(beside) >= 2
        assert len(below) >= 2
        # Each label is at the height of its grid line. Letters of 11 px are centred 3.5 px higher.
        level = [[at(e, "y")[0] - 3.5] * 2 for e in beside]
        np.testing.assert_allclose(level, grid, atol=0.01)
        self.log_x = log_x
        x = [value_of(words(e)) for e in below]
        self._x = self._line([at(e, "x")[0] for e in below], np.log10(x) if log_x else x)
        self._y = self._line([y for y, _ in grid], [value_of(words(e)) for e in beside])
        assert self._x[0] > 0 > self._y[0]  # x increases to the right, and y upwards
        self.near = 0.2 * abs(self._x[0]), 0.2 * abs(self._y[0])

    @staticmethod
    def _line(pixels, values) -> np.ndarray:
        line = np.polyfit(pixels, values, 1)
        np.testing.assert_allclose(np.polyval(line, pixels), values, atol=0.2 * abs(line[0]))
        return line

    def x(self, pixels):
        value = np.polyval(self._x, pixels)
        return 10**value if self.log_x else value

    def y(self, pixels):
        return np.polyval(self._y, pixels)

    def assert_drawn(self, path: Element, x, y) -> None:
        """Check that a path has these points, with a gap where a value is NaN."""
        known = np.isfinite(y)
        drawn = np.concatenate(points_of(path))
        assert len(drawn) == known.sum()
        where = np.log10(self.x(drawn[:, 0])) if self.log_x else self.x(drawn[:, 0])
        expected = np.asarray(x, float)[known]
        expected = np.log10(expected) if self.log_x else expected
        np.testing.assert_allclose(where, expected, atol=self.near[0])
        np.testing.assert_allclose(self.y(drawn[:, 1]), np.asarray(y)[known], atol=self.near[1])
        gaps = int((known[1:] & ~known[:-1]).sum() + known[0])
        assert len(points_of(path)) == gaps
