"""Parse untrusted TOML in bounded time and memory."""

import re
import tomllib
from typing import Any

MAX_CHARACTERS = 1_000_000
MAX_KEY_PARTS = 100  # the memory of tomllib is quadratic in the parts of a dotted key
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'[^\']*\'')
_KEY_PART = re.compile(r"\s*[\w-]+\s*")


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text.

    Raises:
        ValueError: the text is not valid TOML, too long, or nested too deeply.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read")
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") >= MAX_KEY_PARTS and _longest_key(line) >= MAX_KEY_PARTS:
            raise ValueError(f"a key has more than {MAX_KEY_PARTS} parts (at line {number})")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError as error:
        raise ValueError("its arrays or tables are nested too deeply") from error
    except ValueError as error:  # Python's limit for decimal integers
        raise ValueError("it contains an integer of thousands of digits") from error


def _longest_key(line: str) -> int:
    """Return the number of parts of the longest dotted key in a line, without its first part."""
    longest = length = 0
    for part in _QUOTED.sub("q", line).split("."):
        length = length + 1 if _KEY_PART.fullmatch(part) else 0
        longest = max(longest, length)
    return longest
