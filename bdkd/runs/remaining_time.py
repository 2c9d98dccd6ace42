"""Estimate how long the rest of a run takes."""

from typing import Literal

Phase = Literal["evaluation", "checkpoint"]


class RemainingTime:
    """Estimates the time until the last step and its evaluation, from what this session measured.

    An earlier session may have run on another machine, so its times do not count. Steps,
    evaluations and checkpoints are estimated separately:

    - A step takes the mean of the log intervals. The first interval includes compilation and the
      start of the data's workers, so it only counts until there is a second one.
    - Evaluations are few and long, and their number is known: each one that is left takes the mean
      of those that were measured. Until the first one, they are not in the estimate.
    - Checkpoints depend on steps, minutes and the best result, so their time so far is spread over
      the steps of the session.

    The evaluation on the test images at the end is not included: it is measured only once.
    """

    def __init__(self) -> None:
        self._intervals = 0
        self._steps, self._seconds = 0, 0.0  # of the intervals that count
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
        """Return the time of ``steps`` and ``evaluations`` that are left. At least one interval
        must have been added."""
        step = self._seconds / self._steps + self._saving / self._session_steps
        evaluation = self._evaluating / self._evaluations if self._evaluations else 0.0
        return steps * step + evaluations * evaluation
