"""The progress of a run, and its best validation result so far."""

from dataclasses import dataclass

from bdkd.config import Recipe


@dataclass
class Progress:
    """The progress of a run. A checkpoint saves all fields."""

    step: int = 0  # completed optimizer steps, including skipped steps
    epoch: int = 0  # completed epochs; log lines show current_epoch instead
    seen: int = 0  # images seen in the current epoch
    validation_due: bool = False  # an epoch has ended and has not been evaluated yet
    seconds: float = 0.0  # time of training and evaluation, over all sessions of the run

    @property
    def current_epoch(self) -> int:
        """The epoch of the last step, counted from 1. 0 before the first step."""
        return self.epoch + (self.seen > 0)

    def advance(self, images: int, train_images: int) -> None:
        """Count a step.

        The epoch ends if fewer images than a batch are left.

        Args:
            images: batch size of the step.
            train_images: number of training images.
        """
        self.step += 1
        self.seen += images
        if self.seen + images > train_images:
            self.epoch += 1
            self.seen = 0

    def remaining_steps(self, recipe: Recipe, train_images: int) -> int:
        """Return the number of optimizer steps until the end of the run. It is never negative."""
        train, limit = recipe.train, recipe.max_steps
        if self.epoch >= train.epochs:
            return 0
        in_epoch = (train_images - self.seen) // train.batch_size
        later = (train.epochs - self.epoch - 1) * (train_images // train.batch_size)
        steps = in_epoch + later
        return steps if limit is None else max(0, min(steps, limit - self.step))

    def remaining_evaluations(self, recipe: Recipe, train_images: int) -> int:
        """Return the number of evaluations during the remaining steps. An evaluation that is due
        after the current step does not count."""
        steps = self.remaining_steps(recipe, train_images)
        if not steps:
            return 0
        batch, every = recipe.train.batch_size, recipe.evaluate_every
        after_epoch = steps - (train_images - self.seen) // batch  # negative: no epoch ends
        ended, rest = divmod(after_epoch, train_images // batch)
        epochs = max(self.epoch, self.epoch + ended + 1)
        evaluated = epochs // every - self.epoch // every
        last_ends_epoch = after_epoch >= 0 and rest == 0 and epochs % every == 0
        return evaluated + (not last_ends_epoch)

    def end_short_epoch(self, recipe: Recipe, train_images: int) -> None:
        """End the current epoch if fewer images than a batch are left.

        This happens if a run is resumed with a larger batch size. The epoch is evaluated like any
        other epoch.
        """
        if self.seen and self.seen + recipe.train.batch_size > train_images:
            self.epoch, self.seen = self.epoch + 1, 0
            ends = self.epoch >= recipe.train.epochs
            self.validation_due |= ends or self.epoch % recipe.evaluate_every == 0

    def describe(self, train_images: int) -> str:
        """Return the progress in epochs and images, for messages."""
        images = f" and {self.seen:,} of {train_images:,} images" if self.seen else ""
        return f"{self.epoch} epoch{'s' * (self.epoch != 1)}{images} done"


@dataclass
class Best:
    """The best student so far on the validation images."""

    step: int
    top1: float
