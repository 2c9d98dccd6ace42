"""Errors that a user can fix. Each is printed as one line, without a traceback."""


class UsageError(Exception):
    """A name, key or value does not exist or does not fit. The command exits with 2."""


class RunError(Exception):
    """Something outside the program is missing, damaged or in the way. The command exits with 1."""


class DamagedFile(RunError):
    """The checksums of a file prove that it is damaged. The message contains the proof."""


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was written. The command exits with 128 plus the
    signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if it has no text."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
