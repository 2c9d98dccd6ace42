"""Read the lines of a ``metrics.jsonl``, also of older versions and of damaged files."""

import json
import math
from typing import Any

MAX_STEP = 10**12


class LineReader:
    """Reads the lines of one ``metrics.jsonl`` in order, and converts those of older versions.

    In all lines that are returned, ``epoch`` is the epoch, counted from 1, that the step belongs
    to. Lines without the key ``seconds`` are from older versions, which counted the epoch of
    training lines from 0, and wrote the number of whole epochs in evaluation lines. Each line is
    converted on its own, so a file may contain lines of both kinds, in any order of versions.
    """

    def __init__(self) -> None:
        self._trained = (0, 0)  # step and epoch of the last training line

    def parse(self, line: bytes | str) -> dict[str, Any] | None:
        """Return the values of a line with a valid step and split, or None for other JSON. Raise
        ``ValueError`` if the line is not JSON."""
        values = _parse(line)
        if values is None or type(epoch := values.get("epoch")) is not int:
            return values
        if "seconds" not in values:
            values = {**values, "epoch": self._epoch(values, epoch), "seconds": None}
        if values.get("split") == "train":
            self._trained = values["step"], values["epoch"]
        return values

    def _epoch(self, values: dict[str, Any], epoch: int) -> int:
        """Return the epoch of a line of an older version."""
        if values.get("split") == "train":
            return epoch + 1
        # The number of whole epochs is the epoch of the last step of an epoch. A run that max_steps
        # ended was evaluated in mid-epoch too, and always logged that step before.
        step, trained = self._trained
        return max(epoch, trained) if step <= values["step"] else epoch


def _parse(line: bytes | str) -> dict[str, Any] | None:
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
