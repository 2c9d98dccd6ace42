"""HTML and SVG made of elements: text is escaped because there is no other way to put it in."""

import html
import re
from collections.abc import Sequence

# What neither HTML nor UTF-8 can hold: control characters, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = {"meta", "br", "link", "img", "hr"}

Value = str | int | float | None


class Html(str):
    """Markup that was made by :func:`tag`, which alone is not escaped again."""


def text(value: object) -> Html:
    """Any text, from any file, as markup that shows it."""
    return value if isinstance(value, Html) else Html(html.escape(printable(value)))


def printable(value: object) -> str:
    return _UNPRINTABLE.sub("\ufffd", str(value))


def tag(element: str, /, *children: object, **attributes: Value) -> Html:
    """One element; ``class_`` is ``class``, underscores are hyphens, None leaves it out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if element in _VOID:
        return Html(f"<{element}{given}>")
    return Html(f"<{element}{given}>{join(children)}</{element}>")


def join(children: object) -> Html:
    """Elements and texts one after the other; None is nothing."""
    if not isinstance(children, tuple | list):
        children = (children,)
    return Html("".join(text(child) for child in children if child is not None))


def _short(value: Value) -> str:
    """Coordinates to a hundredth: a page of figures is mostly numbers."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def table(
    head: Sequence[object],
    rows: Sequence[Sequence[object]],
    caption: str | None = None,
    head_rows: int = 1,
    class_: str | None = None,
) -> Html:
    """A table whose first ``head_rows`` columns name their row."""
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else None,
            tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
            tag(
                "tbody",
                *(
                    tag(
                        "tr",
                        *(
                            tag("th", cell, scope="row") if i < head_rows else tag("td", cell)
                            for i, cell in enumerate(row)
                        ),
                    )
                    for row in rows
                ),
            ),
            class_=class_,
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption or "table",
    )
