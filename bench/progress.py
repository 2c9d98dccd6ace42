"""Show the progress of a long command on stderr: its current part, elapsed and remaining time."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TextIO, TypeVar

T = TypeVar("T")

EVERY = 10.0  # seconds between two lines if stderr is not a terminal
REDRAW = 0.1  # seconds between two updates of the line on a terminal


class Progress:
    """Report that part ``k`` of ``total`` is running.

    On a terminal, one line is rewritten, and removed at the end. Elsewhere, such as in a log, a
    line is printed at most every 10 seconds, so a command that takes less prints none.

    Nothing runs in the background, because that would disturb a measurement. The line is updated
    only by calls of the methods.

    Args:
        what: name of a part, such as ``"loss_cpu: case"``.
        total: number of parts, or None if it is not known.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.now = what, total, now
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.part, self.name = 0, ""
        self.began = now()
        self.shown = self.began - (REDRAW if self.terminal else 0.0)
        self.on_screen = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def start(self, name: str = "") -> None:
        """Begin the next part."""
        self.part, self.name = self.part + 1, name
        self.update()

    def update(self, detail: str = "") -> None:
        """Show the line if enough time has passed. ``detail`` describes the current activity."""
        now = self.now()
        if now - self.shown < (REDRAW if self.terminal else EVERY):
            return
        self.shown = now
        line = self.line(now - self.began, detail)
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\x1b[K{line[:width]}")
            self.on_screen = True
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def results(self, futures: Sequence[Future[T]], detail: str = "") -> list[T]:
        """Return the results of futures. Update the line until all are done."""
        while wait(futures, timeout=1.0).not_done:
            self.update(detail)
        return [future.result() for future in futures]

    def line(self, elapsed: float, detail: str = "") -> str:
        of = f" of {self.total}" if self.total else ""
        doing = ", ".join(x for x in (self.name, detail) if x)
        times = f"{clock(elapsed)} elapsed"
        done = self.part - 1
        if self.total and 0 < done < self.total:
            times += f", about {clock(elapsed / done * (self.total - done))} left"
        return f"{self.what} {self.part}{of}, {times}{': ' * bool(doing)}{doing}"

    def clear(self) -> None:
        """Remove the line from a terminal, for example before a table is printed."""
        if self.on_screen:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self.on_screen = False

    def print(self, text: str) -> None:
        """Print a result to stdout. The next update shows the line again."""
        self.clear()
        print(text, flush=True)


def clock(seconds: float) -> str:
    """Return a time as ``M:SS`` or ``H:MM:SS``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
