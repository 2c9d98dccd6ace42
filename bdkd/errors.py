"""Failures that a user can mend: each is one line on the screen, without a traceback."""


class UsageError(Exception):
    """A name, key or value that does not exist or does not fit. The command exits 2."""


class RunError(Exception):
    """Something outside the program is missing, broken or in the way. The command exits 1."""


class DamagedFile(RunError):
    """A file whose own checksums prove that it is damaged; the message holds the proof."""


class Interrupted(Exception):
    """A signal ended the run; its checkpoint is written. The command exits 128 + the signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
