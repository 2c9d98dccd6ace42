"""Compute the learning rate from the progress of a run."""

import math
from dataclasses import dataclass

from bdkd.config import ScheduleConfig


@dataclass
class Span:
    """The part of a run's schedule that a checkpoint saves.

    A run can be resumed with another ``train.batch_size`` or ``train.epochs``. The schedule still
    counts steps of the first batch size, so the learning rate does not jump. If the number of
    epochs changes, the decay continues from the current learning rate and ends with the new last
    epoch.
    """

    batch_size: int
    """Number of images in one step of the schedule: ``train.batch_size`` when the run started."""
    epochs: int
    """The value of ``train.epochs`` that determines the end of the decay."""
    start: float = 0.0
    """Step at which the decay starts. If the warm-up ends later, the decay starts then."""
    phase: float = 0.0
    """Fraction of the decay that was completed at ``start``, in [0, 1]."""

    def steps_per_epoch(self, train_images: int) -> int:
        """Return the number of schedule steps in one epoch."""
        return max(1, train_images // self.batch_size)

    def step(self, epoch: int, seen: int, train_images: int) -> float:
        """Return the number of schedule steps after ``epoch`` completed epochs and ``seen`` images
        of the next epoch."""
        per_epoch = self.steps_per_epoch(train_images)
        return epoch * per_epoch + min(seen / self.batch_size, per_epoch)

    def factor(self, config: ScheduleConfig, step: float, train_images: int) -> float:
        """Return the learning rate at a schedule step, as a share of its peak."""
        per_epoch = self.steps_per_epoch(train_images)
        return rate_factor(config, step, per_epoch, per_epoch * self.epochs, self.start, self.phase)

    def with_epochs(
        self, epochs: int, config: ScheduleConfig, step: float, train_images: int
    ) -> "Span":
        """Return the schedule of a run that is resumed at ``step`` with another number of epochs.

        A decay that has already ended cannot continue. The new schedule is then that of a run that
        started with the new number of epochs, so the learning rate rises again.
        """
        per_epoch = self.steps_per_epoch(train_images)
        done = _phase(config, step, per_epoch, per_epoch * self.epochs, self.start, self.phase)
        if done == 0 or done >= 1:
            return Span(self.batch_size, epochs)
        return Span(self.batch_size, epochs, step, done)


def rate_factor(
    config: ScheduleConfig, step: float, steps_per_epoch: int, total_steps: int,
    start: float = 0.0, phase: float = 0.0,
) -> float:  # fmt: skip
    """Return the learning rate at a schedule step, as a share of its peak in [0, 1].

    The warm-up rises linearly and reaches the peak in its last step. The cosine schedule is
    ``final + (1 - final) * (1 + cos(pi * phase)) / 2`` (Loshchilov and Hutter, 2017, arXiv
    1608.03983).

    Args:
        step: the schedule step, counted from 0.
        total_steps: the step at which the decay ends.
        start, phase: see :class:`Span`.
    """
    warmup = _in_steps(config.warmup, config, steps_per_epoch)
    if step + 1 <= warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    if config.name == "step":
        milestones = [_in_steps(m, config, steps_per_epoch) for m in config.milestones]
        return config.factor ** sum(step >= milestone for milestone in milestones)
    done = _phase(config, step, steps_per_epoch, total_steps, start, phase)
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * done))


def _phase(
    config: ScheduleConfig, step: float, steps_per_epoch: int, total_steps: int,
    start: float, phase: float,
) -> float:  # fmt: skip
    """Return the completed fraction of the decay, in [0, 1]. It is 0 during the warm-up."""
    begin = max(start, _in_steps(config.warmup, config, steps_per_epoch))
    progress = (step - begin) / max(1.0, total_steps - begin)
    return phase + (1 - phase) * min(1.0, max(0.0, progress))


def _in_steps(length: float, config: ScheduleConfig, steps_per_epoch: int) -> float:
    """Return a length in steps. It is rounded, so that 2.2 epochs of 25 steps are exactly 55."""
    return round(length * steps_per_epoch, 9) if config.unit == "epochs" else length
