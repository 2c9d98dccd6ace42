"""Write measurements as JSON lines, flushed one by one, so that an interrupted run keeps them."""

import json
import sys
import time
from pathlib import Path
from typing import Any


class Log:
    """Append measurements to ``folder/measurements.jsonl`` and print each one.

    Args:
        folder: folder for the results. It is created if it is missing.
        stage: name of the stage, for example ``"1 smoke"``.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.stage, self.start = folder / "measurements.jsonl", stage, time.monotonic()

    def add(self, what: str, name: str, value: Any, unit: str = "", **details: Any) -> None:
        """Record ``value`` of ``name``.

        Args:
            what: kind of measurement: ``"time"``, ``"error"``, ``"check"``, ``"counter"``, ...
            name: name of the measured object, for example ``"bdkd_loss_and_grad"``.
            value: a number or a string.
            unit: unit of ``value``: ``"us"``, ``"images/s"``, ``"of copy"``, or ``""`` for none.
            details: other fields: ``size="4096 x 1000 bf16"``, ``of_copy=0.8``, ``note=...``.
        """
        record = {"stage": self.stage, "second": round(time.monotonic() - self.start, 1),
                  "what": what, "name": name, "value": value, "unit": unit, **details}  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        extra = "  ".join(f"{key}={_short(x)}" for key, x in details.items())
        print(f"{what:8} {name:40} {shown:>10} {unit:9} {extra}", flush=True)
        sys.stdout.flush()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read(folder: Path) -> list[dict[str, Any]]:
    """Return all complete records of ``folder``. The last line is ignored if it is incomplete
    because the writer was killed."""
    records = []
    path = folder / "measurements.jsonl"
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
