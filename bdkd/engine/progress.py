"""How far a run is, and its best validation result so far."""

from dataclasses import dataclass

from bdkd.config import Recipe


@dataclass
class Progress:
    """How far a run is. A checkpoint saves all fields."""

    step: int = 0  # optimizer steps done, including skipped ones
    epoch: int = 0  # whole epochs done, which is not what log lines call the epoch: current_epoch
    seen: int = 0  # images seen in the current epoch
    validation_due: bool = False  # an epoch has ended and has not been evaluated yet
    seconds: float = 0.0  # of training and evaluation, over all sessions of the run

    @property
    def current_epoch(self) -> int:
        """The epoch, counted from 1, that the last step belongs to. 0 before the first step."""
        return self.epoch + (self.seen > 0)

    def advance(self, images: int, train_images: int) -> None:
        """Count a step of ``images``. The epoch ends when no whole batch of them is left."""
        self.step += 1
        self.seen += images
        if self.seen + images > train_images:
            self.epoch += 1
            self.seen = 0

    def remaining_steps(self, recipe: Recipe, train_images: int) -> int:
        """Return the number of optimizer steps until the end of the recipe, at least 0."""
        train, limit = recipe.train, recipe.max_steps
        if self.epoch >= train.epochs:
            return 0
        in_epoch = (train_images - self.seen) // train.batch_size
        later = (train.epochs - self.epoch - 1) * (train_images // train.batch_size)
        steps = in_epoch + later
        return steps if limit is None else max(0, min(steps, limit - self.step))

    def remaining_evaluations(self, recipe: Recipe, train_images: int) -> int:
        """Return the number of evaluations after the steps that remain. An evaluation of this step
        is not counted."""
        steps = self.remaining_steps(recipe, train_images)
        if not steps:
            return 0
        batch, every = recipe.train.batch_size, recipe.evaluate_every
        after_epoch = steps - (train_images - self.seen) // batch  # negative: none ends
        ended, rest = divmod(after_epoch, train_images // batch)
        epochs = max(self.epoch, self.epoch + ended + 1)
        evaluated = epochs // every - self.epoch // every
        last_ends_epoch = after_epoch >= 0 and rest == 0 and epochs % every == 0
        return evaluated + (not last_ends_epoch)

    def end_short_epoch(self, recipe: Recipe, train_images: int) -> None:
        """End the epoch if less than a batch is left of it, for example after a resume with larger
        batches. It is evaluated like any other epoch."""
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
