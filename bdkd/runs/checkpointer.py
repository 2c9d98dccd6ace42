"""Save checkpoints of a run in the background."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bdkd.engine.state import TrainingState, snapshot
from bdkd.runs.checkpoint import BackgroundWriter, FolderGoneError
from bdkd.runs.folder import RunFolder


class Checkpointer:
    """Save checkpoints of a run in its folder. All ranks must make the same calls.

    Args:
        warn: called with a line of text if a checkpoint could not be written.
    """

    def __init__(
        self, state: TrainingState, folder: RunFolder, warn: Callable[[str], object]
    ) -> None:
        self.state, self.folder, self.warn = state, folder, warn
        self.options = state.recipe.checkpoint
        self.writer, self._saved = BackgroundWriter(), time.monotonic()

    def is_overdue(self) -> bool:
        """Return on rank 0 whether ``checkpoint.every_minutes`` have passed. Return False on other
        ranks."""
        minutes = self.options.every_minutes
        late = minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        return late and self.state.context.is_rank0

    def is_due(self, overdue: bool, last: bool) -> bool:
        """Return whether this step must be saved as the newest checkpoint.

        Args:
            overdue: the result of :meth:`is_overdue` on rank 0.
            last: whether this is the last step of the run.
        """
        due = overdue or self.state.progress.step % self.options.every_steps == 0
        return last or (due and not self.state.last_step_was_skipped())

    def last_step_is_unsaved(self) -> bool:
        """Return whether the current step has no ``step`` checkpoint. This happens if a run was
        killed after its last evaluation and resumed from a ``best`` checkpoint."""
        return not self.folder.step_path(self.state.progress.step).exists()

    def save(self, newest: bool, best: bool) -> None:
        """Save this step as the newest checkpoint, the best checkpoint, or both.

        If a checkpoint cannot be written, the run continues with a warning.

        Raises:
            FolderGoneError: the folder was deleted or moved since the last call.
        """
        recipe, step, folder = self.state.recipe, self.state.progress.step, self.folder
        self.state.context.location = f"the checkpoint of step {step}"
        state = self.state.state_dict()
        if state is not None:
            self.writer.wait()
            if error := self.writer.take_failure():
                if isinstance(error, FolderGoneError):
                    raise error
                self.warn(f"warning: training continues without this checkpoint: {error}")
            state = snapshot(state)
            self.writer.submit(
                partial(folder.save, step, recipe, state, self.options.keep) if newest else None,
                partial(folder.save_best, step, recipe, state) if best else None,
            )
        self._saved = time.monotonic()

    def newest_path(self) -> Path | None:
        """Wait until no checkpoint is being written, and return the newest one that a run can be
        resumed from."""
        self.writer.wait()
        return next(iter(self.folder.resumable_paths()), None)

    def finish(self) -> None:
        """Wait until the last checkpoint is written. Raise ``RunError`` if writing it failed."""
        if self.state.context.is_rank0:
            self.writer.finish()

    def close(self) -> None:
        """Wait until no checkpoint is being written. Ignore failures."""
        self.writer.wait()
