"""Read the lines of a ``metrics.jsonl``, also of files that were edited or damaged."""

import json
import math
from typing import Any

MAX_STEP = 10**12


def parse_line(line: bytes | str) -> dict[str, Any] | None:
    """Return the values of a line with a valid step and split, or None for other JSON. Raise
    ``ValueError`` if the line is not JSON."""
    try:
        values = json.loads(line)
        json.dumps(values, ensure_ascii=False).encode()  # UnicodeEncodeError: a lone surrogate
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    valid = (
        isinstance(values, dict)
        and type(step := values.get("step")) is int
        and 0 <= step < MAX_STEP
        and isinstance(values.get("split"), str | None)
    )
    return values if valid else None


def as_number(value: object) -> float:
    """Return a float, or NaN if the value is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # JSON has integers of any size
        return math.nan
