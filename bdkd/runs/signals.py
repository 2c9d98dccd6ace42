"""Convert Ctrl-C, SIGTERM and Slurm's SIGUSR1 to a request to stop after the current step."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A rank receives Ctrl-C twice: from the terminal and from torchrun.
_SECOND_SIGINT_SECONDS = 2.0


class StopRequest:
    """A context manager in which the first signal sets ``signal`` and does not stop the process.

    A SIGINT more than 2 seconds later raises ``KeyboardInterrupt``.

    Args:
        grace: seconds after the first signal at which the process ends without a checkpoint,
            because another rank may hang. None: never.
        first: called with the number of the first signal. It may raise an exception.
    """

    def __init__(
        self, grace: float | None = None, first: Callable[[int], object] | None = None
    ) -> None:
        self.signal: int | None = None
        self.grace, self.first = grace, first
        self._since = 0.0
        self._timer: threading.Timer | None = None
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            if self.grace is not None:
                self._timer = threading.Timer(self.grace, _end, (number, self.grace))
                self._timer.daemon = True
                self._timer.start()
            if self.first is not None:
                self.first(number)
        elif number == signal.SIGINT and time.monotonic() - self._since > _SECOND_SIGINT_SECONDS:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _end(number: int, grace: float) -> None:
    print(
        f"bdkd: stopped without a checkpoint: the step or its checkpoint was not finished "
        f"{grace:g} s after {signal.Signals(number).name} (distributed.grace); --resume continues "
        "from the previous checkpoint",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(128 + number)
