"""Build HTML and SVG in which all text is escaped: small elements here, the page in Jinja2."""

import re
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

# HTML and UTF-8 cannot represent control characters and surrogate halves.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(value: object) -> str:
    """Return the text of a value, with U+FFFD in place of characters that HTML cannot represent."""
    return _UNPRINTABLE.sub("\ufffd", str(value))


def _finalize(value: object) -> object:
    if value is None or isinstance(value, Markup):
        return "" if value is None else value
    return printable(value)


environment = Environment(
    loader=PackageLoader(__package__, ""), autoescape=True, finalize=_finalize,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
macros: Any = environment.get_template("macros.html.j2").module


def tag(element: str, /, *children: object, **attributes: str | float | None) -> Markup:
    """Return one element with its children.

    Args:
        children: text, which is escaped, or Markup. None is left out.
        attributes: ``class_`` becomes ``class`` and underscores become hyphens. Floats are rounded
            to two decimals. None is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(printable(_short(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    content = "".join(escape(_finalize(child)) for child in children)
    return Markup(f"<{element}{given}>{content}</{element}>")


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
