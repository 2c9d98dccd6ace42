"""Ctrl-C, SIGTERM and Slurm's SIGUSR1 as a request, answered at the end of a step."""

import os
import signal
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A Ctrl-C in a terminal reaches a rank twice, from the terminal and from torchrun.
_SECOND_SIGINT_SECONDS = 2.0


class StopRequest:
    """While it is entered, the first signal only sets ``signal``; a SIGINT that comes later than
    that interrupts at once.

    Args:
        grace: seconds from the first signal after which the process ends all the same, because
            another rank may never come to the end of its step. None: however long it takes.
    """

    def __init__(self, grace: float | None = None) -> None:
        self.signal: int | None = None
        self.grace = grace
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
        f"bdkd: {grace:g} s after {signal.Signals(number).name} (distributed.grace) the step, or "
        "its checkpoint, is still not done: ended without; --resume continues from the one before",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(128 + number)
