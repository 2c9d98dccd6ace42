"""Checkpoints: written whole or not at all, read without running anybody's code."""

import errno
import os
import pickle
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bdkd.errors import DamagedFile, RunError, first_line
from bdkd.runs.archive import ArchiveError, ForeignArchive, check_stored_zip
from bdkd.runs.migration import FORMAT, migrate

_KEYS = {"format", "recipe", "state"}


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that its name holds either the old content or the whole new one.

    Raises:
        RunError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # torch.save's writer meets a short write with a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "mend that"
        raise RunError(
            f"cannot write {path}: {first_line(cause or error)}; {remedy} and continue with "
            "--resume (what was saved before is whole)"
        ) from error


class BackgroundWriter:
    """Writes on a thread of its own while training goes on: one set of files at a time, in order.

    A set that comes while another is written waits for it: a disk that is slower than the
    checkpoints come slows the run down, rather than leaving some of them out.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._owed: Callable[[], object] | None = None

    def submit(
        self, newest: Callable[[], object] | None, lasting: Callable[[], object] | None = None
    ) -> None:
        """Write what ``lasting`` writes, then what ``newest`` does.

        Where ``lasting`` fails it is tried again before the next set, until another takes its
        place; ``newest`` is not, since the next set has a newer one.
        """
        self.wait()
        if lasting is not None:
            self._owed = lasting

        def write() -> None:
            try:
                if self._owed is not None:
                    self._owed()
                    self._owed = None
                if newest is not None:
                    newest()
                self._failure = None
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def busy(self) -> bool:
        """Whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    def take_failure(self) -> RunError | None:
        """What went wrong with the last set, told once; None while it is being written."""
        if self.busy():
            return None
        error, self._failure = self._failure, None
        if error is not None and not isinstance(error, RunError):
            raise error
        return error

    def finish(self) -> None:
        """Wait for the last set.

        Raises:
            RunError: it was not written.
        """
        self.wait()
        error = self.take_failure()
        if error is not None:
            raise error


def save_checkpoint(path: Path, recipe_toml: str, state: Mapping[str, Any]) -> None:
    """One file with the recipe's text and the state of :class:`TrainingState`."""
    content = {"format": FORMAT, "recipe": recipe_toml, "state": dict(state)}
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the recipe's text and the state of a checkpoint, on the CPU.

    A checkpoint of an older format is migrated (:mod:`bdkd.runs.migration`).

    Raises:
        DamagedFile: the checksums prove that the file is cut off or damaged.
        RunError: the file cannot be read here and now, is no checkpoint, or would run code.
    """
    content = load_file(path, checkpoint=True)
    if not is_checkpoint(content):
        raise RunError(f"{path} is not a bdkd checkpoint: it needs {', '.join(sorted(_KEYS))}")
    try:
        content = migrate(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if content["format"] in range(2, FORMAT + 1):
            raise RunError(
                f"{path} is not a whole bdkd checkpoint of format {content['format']}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        raise RunError(
            f"{path} has checkpoint format {content['format']!r}; this version reads 2 to {FORMAT}"
        ) from error
    return content["recipe"], content["state"]


def is_checkpoint(content: Any) -> bool:
    """Whether a file's content has the shape of ours, whatever its format's number."""
    return (
        isinstance(content, dict)
        and content.keys() >= _KEYS
        and isinstance(content["recipe"], str)
        and isinstance(content["state"], dict)
        and content["state"].keys() >= {"networks", "ema", "position"}
    )


def load_file(path: Path, checkpoint: bool = False) -> Any:
    """Return what a file of torch holds. Every checksum is verified before anything is loaded.

    Args:
        checkpoint: the file is one of ours, so it must be a zip file.

    A passing failure (permissions, memory, open files, a disk that does not answer) never raises
    :class:`DamagedFile`, because a damaged file is put aside.
    """
    verified = False
    try:
        with open_regular(path) as file:
            if checkpoint or file.read(4) == b"PK\3\4":  # torch's format before 1.6 is no zip file
                check_stored_zip(file)
                verified = True
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except ForeignArchive as error:
        raise RunError(
            f"{path} is not a checkpoint that bdkd wrote: {error}; use another file"
        ) from error
    except ArchiveError as error:
        size = path.stat().st_size
        raise DamagedFile(
            f"{path} ({size:,} bytes) is damaged or cut off: {error}; use another file"
        ) from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RunError(f"no file of weights at {path}: {error.strerror}") from error
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {error.strerror or first_line(error)}; the file was not changed"
        ) from error
    except pickle.UnpicklingError as error:
        raise RunError(
            f"refused to read {path}: it is not a file of torch, or holds more than tensors and "
            "plain values, which could run code; use another file"
        ) from error
    except Exception as error:  # torch.load raises a dozen types
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise RunError(
                f"cannot read {path}: not enough memory for its {path.stat().st_size:,} bytes; "
                "free some and try again"
            ) from error
        but = "its checksums are right, but " if verified else ""
        raise RunError(
            f"cannot read {path}: {but}torch {torch.__version__} cannot load it "
            f"({first_line(error)}); use another file"
        ) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. A pipe or device, which might never end, is refused.

    Raises:
        OSError: the file cannot be opened.
        RunError: it is not a regular file.
    """
    # Without O_NONBLOCK, opening a FIFO waits for somebody to write into it.
    file = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise RunError(f"cannot read {path}: it is not a regular file")
    return file


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
