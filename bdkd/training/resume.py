"""Loading a checkpoint into a run: what must fit, and what the user is told."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdkd.errors import RunError
from bdkd.identity import difference
from bdkd.training.schedule import Span
from bdkd.training.state import TrainingState


def progress(state: TrainingState) -> str:
    """How far a run is, in epochs and images."""
    epoch, seen = state.position.epoch, state.position.seen
    images = f" and {seen:,} of {state.train_images:,} images" if seen else ""
    return f"{epoch} epoch{'s' * (epoch != 1)}{images} done"


def restore(state: TrainingState, path: Path, saved: Mapping[str, Any]) -> None:
    """Load a checkpoint's state and print what the user should know about it.

    Raises:
        RunError: the checkpoint has other networks, or was trained on another data set.
    """
    check_data(path, saved, state.data)
    try:
        images = saved["train_images"]
        state.load_state_dict(saved)
        _check_moments(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} holds other networks or another optimizer than the recipe: resume with the "
            f"recipe of that run ({path.parent.parent / 'config.toml'}), or choose another "
            "--run-dir"
        ) from error
    if images != state.train_images:
        raise RunError(
            f"{path} was trained on {images} images, the data now has {state.train_images}: "
            "restore the data set or data.validation, or choose another --run-dir"
        )
    if state.ranks.first:
        warn_of_copied_statistics(path, saved, state.recipe.train.ema_decay)


def _check_moments(state: TrainingState) -> None:
    """Raise ``ValueError`` for moments of another optimizer. torch loads AdamW's into SGD, which
    ignores them and would begin without momentum."""
    if state.recipe.optimizer.name == "sgd":
        known = {"momentum_buffer"}
        if any(moments.keys() - known for moments in state.optimizer.state.values()):
            raise ValueError("moments of another optimizer")


def warn_of_copied_statistics(path: Path, saved: Mapping[str, Any], decay: float | None) -> None:
    """Warn on standard error if averages of an old version still have, for more than 1%, the batch
    norm statistics of their students."""
    until, updates = saved["ema_copied_until"], int(saved["ema_updates"])
    if until is not None and (decay or 1.0) ** (updates - until) > 0.01:
        print(
            f"{path}: the batch norm statistics of its averaged networks are those of the "
            "students, an error of an earlier version: recalibrate them with bdkd update-bn",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def check_data(path: Path, saved: Mapping[str, Any], data: Mapping[str, Any] | None) -> None:
    """Raise ``RunError`` if a checkpoint was trained on another data set than this one."""
    if differs := difference(saved["data"], data):
        raise RunError(
            f"the data set here is not the one that {path} was trained on: {differs}; restore it, "
            "or give the right folder with --data.root (train) or --data-root (evaluate, export)"
        )


def print_changes(state: TrainingState, saved: Mapping[str, Any]) -> None:
    """Say what a resumed run does otherwise than the session that saved its checkpoint."""
    before, now = len(saved["ranks"]), state.ranks.world
    size = state.recipe.train.batch_size
    if before != now:
        print(
            f"resuming on {now} rank{'s' * (now > 1)} a run of {before}: each rank's part of a "
            "batch changes, so sums round differently, dropout draws anew, and batch norm without "
            f"distributed.sync_batch_norm normalises over {size // now} images",
            flush=True,
        )
    step, images = state.schedule_step(), state.train_images
    schedule, span = state.recipe.schedule, Span(**saved["schedule"])
    old, new = (s.factor(schedule, step, images) for s in (span, state.span))
    if span.epochs == state.span.epochs or not state.remaining_steps():
        return
    epochs = state.span.epochs
    if math.isclose(old, new, abs_tol=1e-6):
        print(f"the schedule now ends with epoch {epochs}; the rate is {new:.3g} of its peak here")
    else:
        print(
            f"the schedule of {span.epochs} epochs had ended: for train.epochs {epochs} the "
            f"learning rate rises again, from {old:.3g} to {new:.3g} of its peak"
        )
