"""Notes to the user about a data set, each printed once."""

import os
import sys

_printed: set[str] = set()


def note(text: str) -> None:
    """Print a line on standard error of rank 0, once in this process."""
    if text not in _printed and os.environ.get("RANK", "0") == "0":
        _printed.add(text)
        print(f"bdkd: {text}", file=sys.stderr)
