"""Show Pillow's warnings with the name of the image, each line once.

Pillow warns of damaged EXIF data, odd palettes and very large images, but does not know the name of
the file. Python would show the same text for one file only, or again in every epoch and process.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

MOST = 100  # lines to show; a data set may have the same fault in every image

_thread = threading.local()  # .lines: warnings about the image that the thread decodes
_shown: set[str] = set()
_previous: Callable[..., object] = warnings.showwarning


@contextmanager
def recorded(name: str) -> Iterator[list[str]]:
    """Collect the warnings of this thread within the context, as lines that name the image."""
    _install()
    before = getattr(_thread, "lines", None)
    _thread.lines = texts = list[str]()
    lines: list[str] = []
    try:
        yield lines
    finally:
        _thread.lines = before
        lines += [f"the image {name}: {' '.join(text.split())}" for text in dict.fromkeys(texts)]


@contextmanager
def shown(name: str) -> Iterator[None]:
    """Show the warnings within the context. If an error is raised, it describes the image, and no
    warning is shown."""
    with recorded(name) as lines:
        yield
    show(lines)


def show(lines: Iterable[str]) -> None:
    """Print each line once in this process, on standard error."""
    for line in lines:
        if line in _shown or len(_shown) > MOST:
            continue
        _shown.add(line)
        if len(_shown) > MOST:
            line = f"there are more than {MOST} such warnings: the others are not shown"
        tqdm.write(f"warning: {line}", file=sys.stderr)  # clears a progress bar first


def _install() -> None:
    """Direct warnings to this module. Each context does so, because ``warnings.catch_warnings``
    undoes it."""
    global _previous
    if warnings.showwarning is not _receive:
        _previous = warnings.showwarning
        warnings.showwarning = _receive
        # Python's option -W takes precedence.
        warnings.filterwarnings("always", module=r"PIL\b", append=bool(sys.warnoptions))


def _receive(message: Warning | str, *arguments: object, **options: object) -> None:
    """Replace ``warnings.showwarning``."""
    lines = getattr(_thread, "lines", None)
    if lines is None:
        _previous(message, *arguments, **options)
    else:
        lines.append(str(message))
