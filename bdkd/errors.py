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


def reason_of(error: BaseException) -> str:
    """Return why an operation failed, without the number and the file in the text of an OSError."""
    return getattr(error, "strerror", None) or first_line(error)


def shown(value: object, length: int = 60) -> str:
    """Return a value for a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return "an integer of thousands of digits"
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= length else f"{text[: length - 3]}..."
