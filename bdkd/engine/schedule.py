"""The learning rate as a function of the progress of a run."""

import math
from dataclasses import dataclass

from bdkd.config import ScheduleConfig


@dataclass
class Span:
    """The part of a run's schedule that a checkpoint holds.

    A run can be resumed with another ``train.batch_size`` or ``train.epochs``. The schedule keeps
    counting in steps of the first batch size, so the rate does not jump. If the number of epochs
    changes, the decay continues from where it is and reaches its end with the new last epoch.
    """

    batch_size: int
    """Images of one step of the schedule: ``train.batch_size`` when the run began."""
    epochs: int
    """``train.epochs`` that the decay was computed for."""
    start: float = 0.0
    """Step from which the decay runs to the end; the end of the warm-up if that is later."""
    phase: float = 0.0
    """Share of the decay that was done at ``start``, in [0, 1]."""

    def steps_per_epoch(self, train_images: int) -> int:
        """Return the steps of the schedule in one epoch."""
        return max(1, train_images // self.batch_size)

    def step(self, epoch: int, seen: int, train_images: int) -> float:
        """Return the steps that are done after ``epoch`` whole epochs and ``seen`` images."""
        per_epoch = self.steps_per_epoch(train_images)
        return epoch * per_epoch + min(seen / self.batch_size, per_epoch)

    def factor(self, config: ScheduleConfig, step: float, train_images: int) -> float:
        """Return the share of the peak learning rate at a step of the schedule."""
        per_epoch = self.steps_per_epoch(train_images)
        return rate_factor(config, step, per_epoch, per_epoch * self.epochs, self.start, self.phase)

    def with_epochs(
        self, epochs: int, config: ScheduleConfig, step: float, train_images: int
    ) -> "Span":
        """Return the schedule of a run that is resumed at ``step`` with another number of epochs.

        A decay that has already ended cannot continue. It becomes the decay of a run that had the
        new number of epochs from the beginning, so the rate rises again.
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
    """Return the share of the peak learning rate, in [0, 1], for a step counted from 0.

    The warm-up rises linearly and reaches the peak in its last step. ``cosine`` follows
    ``final + (1 - final) * (1 + cos(pi * phase)) / 2`` (Loshchilov and Hutter, 2017, arXiv
    1608.03983).

    Args:
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
    """Return the share of the decay that is done, in [0, 1]; 0 during the warm-up."""
    begin = max(start, _in_steps(config.warmup, config, steps_per_epoch))
    progress = (step - begin) / max(1.0, total_steps - begin)
    return phase + (1 - phase) * min(1.0, max(0.0, progress))


def _in_steps(length: float, config: ScheduleConfig, steps_per_epoch: int) -> float:
    """Return a length of the schedule in steps, rounded so that 2.2 epochs of 25 steps are 55."""
    return round(length * steps_per_epoch, 9) if config.unit == "epochs" else length
