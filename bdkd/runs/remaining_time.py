"""Estimate how long the rest of a run takes."""

from typing import Literal

Phase = Literal["evaluation", "checkpoint"]


class RemainingTime:
    """Estimate the time until the last step and its evaluation from the times of this session.

    Times of earlier sessions do not count, because they may have run on another machine. Steps,
    evaluations and checkpoints are estimated separately:

    - Steps: the estimate is the mean time of a step over the log intervals. The first interval
      includes compilation and the start of the data loader, so it only counts until the second
      interval ends.
    - Evaluations: they are few and long, and their number is known. The estimate is the mean time
      of the measured evaluations. It is 0 before the first evaluation.
    - Checkpoints: their number depends on steps, minutes and the best result. Their time so far is
      divided by the steps of the session.

    The estimate does not include the evaluation on the test images at the end of the run, because
    no earlier evaluation measures it.
    """

    def __init__(self) -> None:
        self._intervals = 0
        self._steps, self._seconds = 0, 0.0  # sums over the intervals that count
        self._session_steps = 0
        self._evaluations, self._evaluating, self._saving = 0, 0.0, 0.0

    def add_interval(self, steps: int, seconds: float) -> None:
        """Add a log interval, without the time of its evaluations and checkpoints."""
        if self._intervals == 1:
            self._steps, self._seconds = 0, 0.0
        self._intervals += 1
        self._steps += steps
        self._seconds += seconds
        self._session_steps += steps

    def add_phase(self, phase: Phase, seconds: float) -> None:
        """Add an evaluation or a checkpoint."""
        if phase == "evaluation":
            self._evaluations += 1
            self._evaluating += seconds
        else:
            self._saving += seconds

    def seconds(self, steps: int, evaluations: int) -> float:
        """Return the estimated time in seconds. Call :meth:`add_interval` at least once before.

        Args:
            steps, evaluations: the remaining number.
        """
        step = self._seconds / self._steps + self._saving / self._session_steps
        evaluation = self._evaluating / self._evaluations if self._evaluations else 0.0
        return steps * step + evaluations * evaluation
