"""Draw charts as inline SVG. The style sheet of the page sets their colours in light and dark mode.

Series differ in colour and in dash, so that color-blind readers can tell them apart. The ``<desc>``
of a chart describes it for screen readers.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from .markup import tag

COLOURS = 8  # classes c0 to c7 of the style sheet
_DASHES = (None, "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 3", "10 2 2 2 2 2")
# Pixels of a line chart and a histogram, and the edges of the plotting area inside
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440.0, 250.0, 52.0, 426.0, 12.0, 212.0
_ids = itertools.count()

Format = Callable[[float], str]


def number(value: float) -> str:
    """Return a number with three significant digits."""
    if not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def three_decimals(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def percent(value: float) -> str:
    """Return a fraction in percent."""
    return f"{100 * value:.2f}%" if math.isfinite(value) else "–"


def _tick_percent(value: float) -> str:
    return f"{100 * value:.4g}%"


@dataclass
class Line:
    """One series. NaN values are gaps. ``low`` and ``high`` are the edges of a band around it."""

    label: str
    x: np.ndarray  # (P,)
    y: np.ndarray  # (P,)
    style: int = 0  # colour and dash
    thin: bool = False
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    names: Sequence[str] = ()  # labels of the points

    @property
    def last(self) -> float:
        known = self.y[np.isfinite(self.y)]
        return float(known[-1]) if len(known) else math.nan


@dataclass(frozen=True)
class Scale:
    """Map data to pixels, linearly or logarithmically."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value, low, high = (math.log10(v) if self.log else v for v in (value, self.low, self.high))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, most: int = 6, integers: bool = False) -> list[float]:
        """Return round values between the limits.

        Args:
            most: approximate maximum number of ticks.
            integers: return integers only.
        """
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = [m * 10.0**p for p in powers for m in (1, 2, 5)]
            inside = [t for t in every if self.low <= t <= self.high]
            if 2 <= len(inside) <= most + 2:
                return inside
            if len(inside) > most + 2:
                return [t for t in inside if math.log10(t).is_integer()]
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        step = max(step, 1.0) if integers else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def dash(style: int) -> str | None:
    """Return the dash pattern of a style. Styles of the same colour have different patterns."""
    return _DASHES[(style + style // COLOURS) % len(_DASHES)]


def _colour(style: int) -> str:
    return f"c{style % COLOURS}"


def stroke(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def write(text: str, x: float, y: float, class_: str) -> Markup:
    """Return a text."""
    return tag("text", text, x=x, y=y, class_=class_)


def shorten(text: str, length: int) -> str:
    """Return the text, shortened to ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def swatch(style: int) -> Markup:
    """Return a short sample of a line, for legends."""
    line = tag("line", x1=1, y1=6, x2=29, y2=6, stroke_dasharray=dash(style),
               class_=f"line {_colour(style)}")  # fmt: skip
    return tag("svg", line, viewBox="0 0 30 12", width=30, height=12, aria_hidden="true",
               class_="swatch")  # fmt: skip


def legend(entries: Sequence[tuple[str, int]], training: bool = False) -> Markup:
    """Return a legend of labels and styles. ``training`` explains thin and thick lines."""
    items = [tag("li", swatch(style), tag("bdi", label)) for label, style in entries]
    if training:
        items.append(tag("li", "thin: training, thick: validation", class_="muted"))
    return tag("ul", *items, class_="legend")


def svg(width: float, height: float, title: str, description: str, *children: object) -> Markup:
    """Return an SVG picture with a title and a description for screen readers."""
    name = f"f{next(_ids)}"
    return tag(
        "svg", tag("title", title, id=f"{name}t"), tag("desc", description, id=f"{name}d"),
        *children, viewBox=f"0 0 {width:g} {height:g}", role="img",
        aria_labelledby=f"{name}t {name}d", class_="chart",
    )  # fmt: skip


def line_chart(
    title: str, lines: Sequence[Line], x_label: str, fmt: Format = number, marks: bool = False,
    log_x: bool = False,
) -> Markup | None:  # fmt: skip
    """Return a line chart, or None if no value is finite.

    Args:
        fmt: formats a value. :func:`percent` also formats the vertical axis in percent.
        marks: draw a dot at every point, with its name if it has one.
    """
    shown = [line for line in lines if np.isfinite(line.y).any()]
    if not shown:
        return None
    xs = np.concatenate([line.x[np.isfinite(line.y)] for line in shown])
    bounds = [b for line in shown for b in (line.y, line.low, line.high) if b is not None]
    ys = np.concatenate(bounds)
    ys = ys[np.isfinite(ys)]
    if log_x:
        x = Scale(float(xs.min()) / 1.25, float(xs.max()) * 1.25, LEFT, RIGHT, log=True)
    else:
        x = Scale(*_limits(float(xs.min()), float(xs.max()), 0.0), LEFT, RIGHT)
    y = Scale(*_limits(float(ys.min()), float(ys.max()), 0.05), BOTTOM, TOP)
    content = _frame(x, y, _tick_percent if fmt is percent else number, x_label, integers=True)
    content += [_band(line, x, y) for line in shown if line.low is not None]
    for line in shown:
        class_ = f"line {_colour(line.style)}" + (" thin" if line.thin else "")
        dashes = None if line.thin else dash(line.style)
        content.append(tag("path", d=_path(line, x, y), class_=class_, stroke_dasharray=dashes))
        if marks or np.isfinite(line.y).sum() == 1:
            content += _dots(line, x, y, fmt)
    described = [line for line in shown if not line.thin] or shown
    ends = "; ".join(f"{line.label} ends at {fmt(line.last)}" for line in described)
    return svg(WIDTH, HEIGHT, title, f"Line chart over {x_label}. {ends}.", *content)


def histogram(
    title: str, counts: Sequence[Line], x_label: str, marker: float | None = None
) -> Markup | None:
    """Return a histogram, or None if ``counts`` is empty.

    Args:
        counts: for each series, the shares ``y`` (B,) and the edges ``x`` (B + 1,) of the bins. All
            series have the same bins.
        marker: position of a vertical reference line.
    """
    if not counts:
        return None
    edges = np.concatenate([line.x for line in counts])
    x = Scale(float(edges.min()), float(edges.max()), LEFT, RIGHT)
    y = Scale(0.0, 1.08 * max(float(line.y.max()) for line in counts), BOTTOM, TOP)
    content = _frame(x, y, _tick_percent, x_label)
    if marker is not None and x.low <= marker <= x.high:
        content.append(stroke(x(marker), TOP, x(marker), BOTTOM, "reference"))
    for line in counts:
        steps = [
            f"V{y(b)}H{x(a)}" for a, b in zip(line.x[1:].tolist(), line.y.tolist(), strict=True)
        ]
        path = f"M{x(float(line.x[0]))} {y(0)}{''.join(steps)}V{y(0)}"
        content.append(tag("path", d=path, class_=f"area {_colour(line.style)}"))
        content.append(tag("path", d=path, class_=f"line {_colour(line.style)}",
                           stroke_dasharray=dash(line.style)))  # fmt: skip
    labels = ", ".join(line.label for line in counts)
    return svg(WIDTH, HEIGHT, title, f"Histogram over {x_label} of {labels}.", *content)


def bar_list(title: str, rows: Sequence[tuple[str, float]], fmt: Format) -> Markup:
    """Return horizontal bars with their names and values."""
    step = 26.0
    most = max((value for _, value in rows), default=0.0) or 1.0
    content = []
    for k, (name, value) in enumerate(rows):
        top, length = k * step, 216 * value / most
        content += [
            write(shorten(name, 24), 140, top + 17, "tick end"),
            tag("rect", x=148, y=top + 5, width=max(1.0, length), height=step - 10, class_="bar"),
            write(fmt(value), 154 + length, top + 17, "tick"),
        ]
    description = "; ".join(f"{name}: {fmt(value)}" for name, value in rows)
    return svg(WIDTH, step * max(1, len(rows)), title, description, *content)


def _limits(low: float, high: float, margin: float) -> tuple[float, float]:
    """Add a relative margin to the limits of an axis. The interval is never empty."""
    size = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-12)
    if high - low < size:
        middle, half = (low + high) / 2, max(abs(low) * 0.05, 1e-6)
        return middle - half, middle + half
    return low - margin * size, high + margin * size


def _frame(x: Scale, y: Scale, y_fmt: Format, x_label: str, integers: bool = False) -> list[Markup]:
    """Return the grid, the ticks and the label of the horizontal axis."""
    parts = []
    for value in y.ticks():
        parts.append(stroke(x.start, y(value), x.end, y(value), "grid"))
        parts.append(write(y_fmt(value), x.start - 6, y(value) + 3.5, "tick end"))
    parts += [
        write(number(v), x(v), y.start + 15, "tick middle") for v in x.ticks(integers=integers)
    ]
    parts.append(stroke(x.start, y.start, x.end, y.start, "axis"))
    return [*parts, write(x_label, (x.start + x.end) / 2, y.start + 32, "label middle")]


def _path(line: Line, x: Scale, y: Scale) -> str:
    parts, pen_down = [], False
    for a, b in zip(line.x.tolist(), line.y.tolist(), strict=True):
        if math.isfinite(b):
            parts.append(f"{'L' if pen_down else 'M'}{x(a):g} {y(b):g}")
        pen_down = math.isfinite(b)
    return "".join(parts)


def _band(line: Line, x: Scale, y: Scale) -> Markup:
    assert line.low is not None
    assert line.high is not None
    known = np.isfinite(line.low) & np.isfinite(line.high)
    xs = line.x[known]
    xs, ys = np.append(xs, xs[::-1]), np.append(line.high[known], line.low[known][::-1])
    outline = "L".join(f"{x(a):g} {y(b):g}" for a, b in zip(xs, ys, strict=True))
    return tag("path", d=f"M{outline}Z" if outline else "", class_=f"band {_colour(line.style)}")


def _dots(line: Line, x: Scale, y: Scale, fmt: Format) -> list[Markup]:
    dots = []
    names = line.names or [""] * len(line.x)
    for name, a, b in zip(names, line.x.tolist(), line.y.tolist(), strict=True):
        if not math.isfinite(b):
            continue
        title = tag("title", f"{line.label}{', ' + name if name else ''}: {fmt(b)}")
        dots.append(
            tag("circle", title, cx=x(a), cy=y(b), r=4, class_=f"dot {_colour(line.style)}")
        )
        if name:
            dots.append(write(name, x(a), y(b) - 9, "tick middle halo"))
    return dots


def scatter(title: str, points: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Markup:
    """Return a scatter plot with the name of each class at the center of its points.

    Args:
        points: (M, 2).
        labels: (M,), class indices.
        names: names of the classes.
    """
    size, edge = 320.0, 14.0
    low, high = points.min(0), points.max(0)
    span = float(max((high - low).max(), 1e-12))
    places = edge + (points - (low + high) / 2 + span / 2) / span * (size - 2 * edge)
    clouds, titles = [], []
    for k, label in enumerate(np.unique(labels)):
        here = places[labels == label]
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in here.tolist())
        square = " square" if k >= COLOURS else ""
        clouds.append(tag("path", d=dots, class_=f"cloud {_colour(k)}{square}"))
        x, y = here[np.abs(here - np.median(here, 0)).sum(1).argmin()].tolist()
        name = str(names[label]) if label < len(names) else str(label)
        titles.append(write(shorten(name, 14), x, y + 4, "name middle halo"))
    description = (
        f"Scatter plot of {len(points)} images of {len(titles)} classes in two dimensions."
    )
    return svg(size, size, title, description, *clouds, *titles)
