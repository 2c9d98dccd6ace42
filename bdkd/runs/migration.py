"""Convert checkpoints of older versions to the current format, one version at a time.

Each function converts the content of a file (``format``, ``recipe``, ``state``) from one format to
the next. To change the format, increase :data:`FORMAT`, add a function to :func:`migrate`, and add
checkpoints of the old format to ``tests/training/old_runs``.
:class:`bdkd.evaluation.metric_lines.LineReader` converts lines of ``metrics.jsonl``.
"""

from typing import Any

from bdkd.config.toml import parse_toml

FORMAT = 3

Content = dict[str, Any]


def migrate(content: Content) -> Content:
    """Return a checkpoint in the current format. Raise ``KeyError`` for unknown formats."""
    while content["format"] != FORMAT:
        content = {2: _from_2}[content["format"]](content)
    return content


def _from_2(content: Content) -> Content:
    """Convert format 2 to format 3.

    In format 2, averages contained a copy of the student's batch norm statistics, the schedule
    counted optimizer steps, and checkpoints did not identify their data set.
    """
    train, state = parse_toml(content["recipe"])["train"], content["state"]
    skipped = int(state["skipped"][0]) if "skipped" in state else 0
    updates = max(0, state["position"]["step"] - skipped) if state["ema"] else 0
    state = {
        **state, "data": None, "ema_updates": updates,
        "ema_copied_until": updates if state["ema"] else None,
        "schedule": {"batch_size": train["batch_size"], "epochs": train["epochs"],
                     "start": 0.0, "phase": 0.0},
    }  # fmt: skip
    return {**content, "format": 3, "state": state}
