"""When a run is saved, and how: snapshots of the state, written while training goes on."""

import time
from collections.abc import Callable
from functools import partial

from bdkd.engine.state import TrainingState, snapshot
from bdkd.runs.checkpoint import BackgroundWriter
from bdkd.runs.folder import RunFolder


class Checkpointer:
    """Saves the state of a run in its folder. All ranks must make the same calls.

    Args:
        warn: prints a line about a checkpoint that could not be written.
    """

    def __init__(
        self, state: TrainingState, folder: RunFolder, warn: Callable[[str], object]
    ) -> None:
        self.state, self.folder, self.warn = state, folder, warn
        self.options = state.recipe.checkpoint
        self._writer = BackgroundWriter()
        self._saved = time.monotonic()

    def is_overdue(self) -> bool:
        """Return whether ``checkpoint.every_minutes`` have passed, by the clock of rank 0."""
        minutes = self.options.every_minutes
        late = minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        return late and self.state.context.is_rank0

    def is_due(self, overdue: bool, last: bool) -> bool:
        """Return whether this step must be saved as the newest checkpoint.

        Args:
            overdue: what the ranks agreed on of :meth:`is_overdue`.
            last: this is the run's last step.
        """
        if last:
            return True
        due = overdue or self.state.progress.step % self.options.every_steps == 0
        return due and not self.state.last_step_was_skipped()

    def last_step_is_unsaved(self) -> bool:
        """Return whether the run was killed between its last evaluation and its last checkpoint. It
        was then resumed from the best student's file."""
        return not self.folder.step_path(self.state.progress.step).exists()

    def save(self, newest: bool, best: bool) -> None:
        """Save this step as the newest checkpoint, the best student, or both.

        A checkpoint that cannot be written does not end a run: the next one tries again.
        """
        recipe, step, folder = self.state.recipe, self.state.progress.step, self.folder
        self.state.context.location = f"the checkpoint of step {step}"
        state = self.state.state_dict()
        if state is not None:
            self._writer.wait()
            if error := self._writer.take_failure():
                self.warn(f"warning: training goes on without this checkpoint: {error}")
            state = snapshot(state)
            self._writer.submit(
                partial(folder.save, step, recipe, state, self.options.keep) if newest else None,
                partial(folder.save_best, step, recipe, state) if best else None,
            )
        self._saved = time.monotonic()

    def is_writing(self) -> bool:
        """Return whether a file is being written."""
        return self._writer.busy()

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            RunError: it was not written.
        """
        if self.state.context.is_rank0:
            self._writer.finish()

    def close(self) -> None:
        """Wait for the writer, whatever it does."""
        self._writer.wait()
