"""Resume a run: load a checkpoint, check that it fits the recipe, and print the differences."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdkd.data import DataInfo
from bdkd.engine.optim import optimizer_entry
from bdkd.engine.schedule import Span
from bdkd.engine.state import TrainingState
from bdkd.errors import RunError
from bdkd.identity import difference


def restore(state: TrainingState, path: Path, saved: Mapping[str, Any]) -> None:
    """Load the state of a checkpoint.

    Args:
        path: the file, for messages.
        saved: the state in the checkpoint.

    Raises:
        RunError: the checkpoint contains other networks or another optimizer, or it was trained on
            another data set.
    """
    try:
        check_data(path, saved, state.info)
        state.load_state_dict(saved)
        foreign = optimizer_entry(state.recipe.optimizer).foreign_moments
        if any(foreign(moments) for moments in state.optimizer.state.values()):
            raise ValueError("moments of another optimizer")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        recipe = f"the recipe of that run ({path.parent.parent / 'config.toml'})"
        raise RunError(
            f"{path} contains other networks or another optimizer than the recipe: resume with "
            f"{recipe}, or choose another --run-dir"
        ) from error
    if state.context.is_rank0:
        warn_of_copied_statistics(path, saved, state.recipe.train.ema_decay)


def resume(state: TrainingState, found: tuple[Path, Mapping[str, Any]] | None) -> None:
    """Continue a run from its newest checkpoint, and print the step.

    Args:
        found: the path and the state of the checkpoint. None: the run has no checkpoint yet, so it
            starts from step 0.
    """
    where = "the beginning: no checkpoint was written"
    if found is not None:
        path, saved = found
        restore(state, path, saved)
        state.progress.end_short_epoch(state.recipe, state.train_images)
        print_changes(state, saved)
        where = str(path)
    done = state.progress.describe(state.train_images)
    print(f"continuing at step {state.progress.step}, from {where} ({done})", flush=True)
    if not state.remaining_steps():
        epochs, steps = state.recipe.train.epochs, state.recipe.max_steps
        limits = f"train.epochs is {epochs} and max_steps {steps}"
        print(f"nothing is left to train: {limits}", flush=True)


def warn_of_copied_statistics(path: Path, saved: Mapping[str, Any], decay: float | None) -> None:
    """Print a warning if a checkpoint contains averages with wrong batch norm statistics.

    Older versions copied the batch norm statistics from the students. The warning is printed if
    the copies still have a weight of more than 1% in the averages.

    Args:
        saved: the state in the checkpoint.
        decay: ``train.ema_decay``.
    """
    until, updates = saved.get("ema_copied_until"), int(saved.get("ema_updates", 0))
    if until is not None and (decay or 1.0) ** (updates - until) > 0.01:
        print(
            f"{path}: the batch norm statistics of its averaged networks are those of the "
            "students, because of an error in an earlier version: recompute them with bdkd "
            "update-bn",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def check_data(path: Path, saved: Mapping[str, Any], info: DataInfo) -> None:
    """Raise ``RunError`` if a checkpoint was trained on another data set."""
    if differs := difference(saved["data"], info.identity()):
        raise RunError(
            f"the data set here is not the one that {path} was trained on: {differs}; restore it, "
            "or pass its folder with --data.root (train) or --data-root (evaluate, export)"
        )
    if saved["train_images"] != (images := info.counts["train"]):
        found = f"{path} was trained on {saved['train_images']} images, the data now has {images}"
        remedy = "restore the data set or data.validation, or choose another --run-dir"
        raise RunError(f"{found}: {remedy}")


def print_changes(state: TrainingState, saved: Mapping[str, Any]) -> None:
    """Print the changes since the checkpoint that affect the results of a resumed run."""
    before, now = len(saved["ranks"]), state.context.world_size
    if before != now:
        print(
            f"resuming on {now} rank{'s' * (now > 1)} a run that trained on {before}: each rank "
            "gets other images, so sums round differently, dropout masks change, and batch norm "
            "without distributed.sync_batch_norm normalises over "
            f"{state.recipe.train.batch_size // now} images", flush=True,
        )  # fmt: skip
    step, images = state.schedule_step(), state.train_images
    schedule, span = state.recipe.schedule, Span(**saved["schedule"])
    old, new = (s.factor(schedule, step, images) for s in (span, state.span))
    if span.epochs == state.span.epochs or not state.remaining_steps():
        return
    epochs = state.span.epochs
    if math.isclose(old, new, abs_tol=1e-6):
        print(
            f"the schedule now ends with epoch {epochs}; the learning rate continues at {new:.3g} "
            "of its peak"
        )
    else:
        print(
            f"the schedule of {span.epochs} epochs had ended: for train.epochs {epochs} the "
            f"learning rate rises again, from {old:.3g} to {new:.3g} of its peak"
        )
