"""Sphinx's settings. The pages need nothing from elsewhere: no script, font or style sheet."""

import re
import sys
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(Path(__file__).parent.parent))

import bdkd

project = "bdkd"
author = "the bdkd authors"
project_copyright = "the bdkd authors, Apache License 2.0"
version = release = bdkd.__version__

extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode",
]  # fmt: skip
exclude_patterns = ["_build", "evidence/**"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Our own headings of sections beside Google's
napoleon_custom_sections = [("Source", "notes_style")]

html_theme = "furo"
html_title = "bdkd"
html_static_path = ["_static"]
html_css_files = ["bdkd.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
highlight_language = "none"
pygments_style = "tango"
pygments_dark_style = "native"


def mathml(latex: str, display: str) -> str:
    """MathML, which browsers draw by themselves; other renderers need a script."""
    return latex2mathml.converter.convert(latex, display=display)


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_displaymath(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(mathml(node.astext(), "block") + "</div>\n")
    raise nodes.SkipNode


def keep_colons(app, what, name, obj, options, lines: list[str]) -> None:
    """An attribute's docstring is a sentence; napoleon takes what precedes its colon for a type."""
    types = [line for line in lines if line.startswith(":type: ")]
    if what in ("attribute", "data", "property") and types:
        lines.remove(types[0])
        first = next(index for index, line in enumerate(lines) if line)
        lines[first] = f"{types[0].removeprefix(':type: ')}: {lines[first]}"


def plain_options(app, what, name, obj, options, lines: list[str]) -> None:
    """The options' docstrings are the command line's help: plain text, where a star is a star."""
    if what == "attribute" and name.startswith("bdkd.config."):
        lines[:] = [re.sub(r"([*`|_])", r"\\\1", line) for line in lines]


def skip_aliases(app, what, name, obj, skip: bool, options) -> bool:
    """Fields of named tuples stand in the signature already."""
    return skip or (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip_aliases)
    app.connect("autodoc-process-docstring", keep_colons, priority=600)  # after napoleon
    app.connect("autodoc-process-docstring", plain_options, priority=700)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.config.html_math_renderer = "mathml"  # type: ignore[attr-defined]
