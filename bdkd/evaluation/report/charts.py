"""Charts as inline SVG: sharp at any size, coloured by the page's style in light and in dark.

Series differ in colour and in dash, so that no reading rests on colour alone. Each chart says in
its ``<desc>`` what it shows, for those who hear the page.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .markup import Html, join, tag

COLOURS = 8  # classes c0 to c7 of the style sheet
_DASHES = (None, "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 3", "10 2 2 2 2 2")
_identities = itertools.count()

Format = Callable[[float], str]


def number(value: float) -> str:
    """Three digits that matter."""
    if not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def three_decimals(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.2f}%" if math.isfinite(value) else "–"


def _tick_percent(value: float) -> str:
    return f"{100 * value:.4g}%"


@dataclass
class Line:
    """One series. Values that are NaN are gaps; ``low`` and ``high`` span a band around it."""

    label: str
    x: np.ndarray  # (P,)
    y: np.ndarray  # (P,)
    style: int = 0  # colour and dash
    thin: bool = False
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    names: Sequence[str] = field(default_factory=tuple)  # of the points, where they are marked

    @property
    def last(self) -> float:
        known = self.y[np.isfinite(self.y)]
        return float(known[-1]) if len(known) else math.nan


@dataclass(frozen=True)
class Scale:
    """From data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._of(self.low), self._of(self.high)
        share = (self._of(value) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, most: int = 6, whole: bool = False) -> list[float]:
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
        step = max(step, 1.0) if whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def dash(style: int) -> str | None:
    """Colours and dashes have eight of each and go round at different speeds."""
    return _DASHES[(style + style // COLOURS) % len(_DASHES)]


def colour(style: int) -> str:
    return f"c{style % COLOURS}"


def swatch(style: int, thin: bool = False) -> Html:
    """The line of a legend."""
    return tag(
        "svg",
        tag("line", x1=1, y1=6, x2=29, y2=6, stroke_dasharray=dash(style),
            class_=f"line {colour(style)}" + (" thin" if thin else "")),
        viewBox="0 0 30 12", width=30, height=12, aria_hidden="true", class_="swatch",
    )  # fmt: skip


def legend(entries: Sequence[tuple[str, int]], training: bool = False) -> Html:
    """Names beside their lines; ``training`` adds what thin and thick lines mean."""
    items = [tag("li", swatch(style), tag("bdi", label)) for label, style in entries]
    if training:
        items.append(tag("li", "thin: training, thick: validation", class_="muted"))
    return tag("ul", *items, class_="legend")


def svg(width: float, height: float, title: str, description: str, *children: object) -> Html:
    """A picture with a name and a description."""
    identity = f"f{next(_identities)}"
    return tag(
        "svg",
        tag("title", title, id=f"{identity}t"),
        tag("desc", description, id=f"{identity}d"),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"{identity}t {identity}d",
        class_="chart",
    )


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    form: Format = number,
    marks: bool = False,
    log_x: bool = False,
    height: float = 250,
) -> Html | None:
    """Lines over a common axis, or None where there is no finite value.

    Args:
        form: how a value is written; :func:`percent` also writes the axis in percent.
        marks: a dot at every point, with its name where it has one.
    """
    shown = [line for line in lines if np.isfinite(line.y).any()]
    if not shown:
        return None
    width, left, right, top, bottom = 440.0, 52.0, 14.0, 12.0, 38.0
    xs = np.concatenate([line.x[np.isfinite(line.y)] for line in shown])
    bounds = [b for line in shown for b in (line.y, line.low, line.high) if b is not None]
    ys = np.concatenate(bounds)
    ys = ys[np.isfinite(ys)]
    if log_x:
        x = Scale(float(xs.min()) / 1.25, float(xs.max()) * 1.25, left, width - right, log=True)
    else:
        x = Scale(*_room(float(xs.min()), float(xs.max()), 0.0), left, width - right)
    y = Scale(*_room(float(ys.min()), float(ys.max()), 0.05), height - bottom, top)
    tick = _tick_percent if form is percent else number
    content: list[object] = [*_frame(x, y, number, tick, x_label, whole=True)]
    for line in shown:
        if line.low is not None and line.high is not None:
            content.append(_band(line, x, y))
    for line in shown:
        kind = f"line {colour(line.style)}" + (" thin" if line.thin else "")
        content.append(
            tag("path", d=_path(line, x, y), class_=kind,
                stroke_dasharray=None if line.thin else dash(line.style))
        )  # fmt: skip
        alone = np.isfinite(line.y).sum() == 1
        if marks or alone:
            content += _dots(line, x, y, form)
    told = "; ".join(f"{line.label} ends at {form(line.last)}" for line in shown if not line.thin)
    told = told or "; ".join(f"{line.label} ends at {form(line.last)}" for line in shown)
    return svg(width, height, title, f"Line chart over {x_label}. {told}.", *content)


def histogram(
    title: str, counts: Sequence[Line], x_label: str, marker: float | None = None
) -> Html | None:
    """Outlines of shares over common bins; ``marker`` draws a line of reference."""
    drawn = [line for line in counts if len(line.x) and np.isfinite(line.y).any()]
    if not drawn:
        return None
    width, height, left, right, top, bottom = 440.0, 250.0, 52.0, 14.0, 12.0, 38.0
    edges = np.concatenate([line.x for line in drawn])
    x = Scale(float(edges.min()), float(edges.max()), left, width - right)
    most = max(float(line.y.max()) for line in drawn)
    y = Scale(0.0, 1.08 * most, height - bottom, top)
    content: list[object] = [*_frame(x, y, number, _tick_percent, x_label)]
    if marker is not None and x.low <= marker <= x.high:
        content.append(tag("line", x1=x(marker), x2=x(marker), y1=top, y2=height - bottom,
                           class_="reference"))  # fmt: skip
    for line in drawn:
        steps = [f"M{x(float(line.x[0]))} {y(0)}"]
        for k, share in enumerate(line.y):
            steps.append(f"V{y(float(share))}H{x(float(line.x[k + 1]))}")
        steps.append(f"V{y(0)}")
        path = "".join(steps)
        content.append(tag("path", d=path, class_=f"area {colour(line.style)}"))
        content.append(tag("path", d=path, class_=f"line {colour(line.style)}",
                           stroke_dasharray=dash(line.style)))  # fmt: skip
    told = ", ".join(line.label for line in drawn)
    return svg(width, height, title, f"Histogram over {x_label} of {told}.", *content)


def bar_list(title: str, rows: Sequence[tuple[str, float]], form: Format) -> Html:
    """Horizontal bars with their names and values."""
    width, high = 440.0, 26.0
    most = max((value for _, value in rows), default=0.0) or 1.0
    content = []
    for k, (name, value) in enumerate(rows):
        top = k * high
        label = name if len(name) <= 24 else name[:23] + "…"
        content += [
            tag("text", label, x=140, y=top + 17, class_="tick end"),
            tag("rect", x=148, y=top + 5, width=max(1.0, 216 * value / most), height=high - 10,
                class_="bar"),
            tag("text", form(value), x=154 + 216 * value / most, y=top + 17, class_="tick"),
        ]  # fmt: skip
    told = "; ".join(f"{name}: {form(value)}" for name, value in rows)
    return svg(width, high * max(1, len(rows)), title, told, *content)


def _room(low: float, high: float, share: float) -> tuple[float, float]:
    """Limits with some room; never an empty interval, never one too thin to be told apart."""
    size = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-12)
    if high - low < size:
        middle, half = (low + high) / 2, max(abs(low) * 0.05, 1e-6)
        return middle - half, middle + half
    return low - share * size, high + share * size


def _frame(
    x: Scale, y: Scale, x_form: Format, y_form: Format, x_label: str, whole: bool = False
) -> list[Html]:
    """Faint grid, ticks, and the name of the horizontal axis."""
    parts = []
    for value in y.ticks():
        parts += [
            tag("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid"),
            tag("text", y_form(value), x=x.start - 6, y=y(value) + 3.5, class_="tick end"),
        ]
    for value in x.ticks(whole=whole):
        parts.append(tag("text", x_form(value), x=x(value), y=y.start + 15, class_="tick middle"))
    parts += [
        tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"),
        tag("text", x_label, x=(x.start + x.end) / 2, y=y.start + 32, class_="label middle"),
    ]
    return parts


def _path(line: Line, x: Scale, y: Scale) -> str:
    parts, pen_down = [], False
    for a, b in zip(line.x.tolist(), line.y.tolist(), strict=True):
        if not math.isfinite(b):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{x(a):g} {y(b):g}")
        pen_down = True
    return "".join(parts)


def _band(line: Line, x: Scale, y: Scale) -> Html:
    assert line.low is not None
    assert line.high is not None
    known = np.isfinite(line.low) & np.isfinite(line.high)
    forth = [f"{x(a):g} {y(b):g}" for a, b in zip(line.x[known], line.high[known], strict=True)]
    back = [f"{x(a):g} {y(b):g}" for a, b in zip(line.x[known], line.low[known], strict=True)]
    outline = "L".join([*forth, *reversed(back)])
    return tag("path", d=f"M{outline}Z" if outline else "", class_=f"band {colour(line.style)}")


def _dots(line: Line, x: Scale, y: Scale, form: Format) -> list[Html]:
    dots = []
    for k, (a, b) in enumerate(zip(line.x.tolist(), line.y.tolist(), strict=True)):
        if not math.isfinite(b):
            continue
        name = line.names[k] if k < len(line.names) else ""
        told = tag("title", f"{line.label}{', ' + name if name else ''}: {form(b)}")
        dots.append(tag("circle", told, cx=x(a), cy=y(b), r=4, class_=f"dot {colour(line.style)}"))
        if name:
            dots.append(tag("text", name, x=x(a), y=y(b) - 9, class_="tick middle halo"))
    return dots


def scatter(title: str, points: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Html:
    """Points ``(M, 2)`` with class indices ``(M,)``; each class is named where its points are."""
    size, edge = 320.0, 14.0
    low, high = points.min(0), points.max(0)
    span = float(max((high - low).max(), 1e-12))
    places = edge + (points - (low + high) / 2 + span / 2) / span * (size - 2 * edge)
    clouds, titles = [], []
    for k, label in enumerate(np.unique(labels)):
        here = places[labels == label]
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in here.tolist())
        shape = " square" if k >= COLOURS else ""
        clouds.append(tag("path", d=dots, class_=f"cloud {colour(k)}{shape}"))
        middle = here[np.abs(here - np.median(here, 0)).sum(1).argmin()]
        name = str(names[label]) if label < len(names) else str(label)
        short = name if len(name) <= 14 else name[:13] + "…"
        titles.append(tag("text", short, x=float(middle[0]), y=float(middle[1]) + 4,
                          class_="name middle halo"))  # fmt: skip
    told = f"Scatter plot of {len(points)} images of {len(titles)} classes in two dimensions."
    return svg(size, size, title, told, join([*clouds, *titles]))
