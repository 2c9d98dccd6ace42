"""Checkpoints of older versions, brought to the present format one version at a time.

Each function takes the content of a file (``format``, ``recipe``, ``state``) of one format and
returns that of the next. To change the format, raise :data:`FORMAT`, add a function, and add
checkpoints of the old format to ``tests/training/old_runs``.
"""

import tomllib
from collections.abc import Callable
from typing import Any

FORMAT = 3

Content = dict[str, Any]


def migrate(content: Content) -> Content:
    """Return the content in the present format. ``state["notices"]`` holds one line for the user
    for each thing that an old checkpoint does not have.

    Raises:
        KeyError: the content has a format that no function here reads.
    """
    state = {"notices": [], **content["state"]}
    content = {**content, "state": state}
    while content["format"] != FORMAT:
        content = _STEPS[content["format"]](content)
    return content


def _from_2(content: Content) -> Content:
    """Averages had a copy of their student's batch norm statistics, schedules counted optimizer
    steps, and the data set had no identity."""
    recipe, state = tomllib.loads(content["recipe"]), content["state"]
    train = recipe["train"]
    notices = list(state["notices"])
    if state["ema"]:
        notices.append(
            "the batch norm statistics of its averaged networks are those of the students, an "
            "error of that version: recalibrate them with bdkd update-bn"
        )
    skipped = int(state["skipped"][0]) if "skipped" in state else 0
    state = {
        **state,
        "data": None,
        "ema_updates": max(0, state["position"]["step"] - skipped) if state["ema"] else 0,
        "schedule": {
            "batch_size": train["batch_size"], "epochs": train["epochs"],
            "start": 0.0, "phase": 0.0,
        },
        "notices": notices,
    }  # fmt: skip
    return {**content, "format": 3, "state": state}


_STEPS: dict[int, Callable[[Content], Content]] = {2: _from_2}
