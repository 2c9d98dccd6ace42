"""Settings of Sphinx. The pages load no script, font or style sheet from other servers."""

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
# Sections of our docstrings that Google's style does not have
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
    """Return a formula as MathML, which browsers draw without a script."""
    return latex2mathml.converter.convert(latex, display=display)


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_displaymath(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(mathml(node.astext(), "block") + "</div>\n")
    raise nodes.SkipNode


def keep_colons(app, what, name, obj, options, lines: list[str]) -> None:
    """Keep colons in docstrings of attributes: napoleon takes the text before one for a type."""
    types = [line for line in lines if line.startswith(":type: ")]
    if what in ("attribute", "data", "property") and types:
        lines.remove(types[0])
        first = next(index for index, line in enumerate(lines) if line)
        lines[first] = f"{types[0].removeprefix(':type: ')}: {lines[first]}"


def plain_options(app, what, name, obj, options, lines: list[str]) -> None:
    """Escape markup in docstrings of options, which are plain text for the command line's help."""
    if what == "attribute" and name.startswith("bdkd.config."):
        lines[:] = [re.sub(r"([*`|_])", r"\\\1", line) for line in lines]


def skip_aliases(app, what, name, obj, skip: bool, options) -> bool:
    """Skip the fields of named tuples, which are in the signature."""
    return skip or (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip_aliases)
    app.connect("autodoc-process-docstring", keep_colons, priority=600)  # after napoleon
    app.connect("autodoc-process-docstring", plain_options, priority=700)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.config.html_math_renderer = "mathml"  # type: ignore[attr-defined]
