"""Write checkpoints atomically, and read them without running code from the file."""

import contextlib
import errno
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bdkd.errors import DamagedFile, RunError, first_line
from bdkd.runs.archive import ArchiveError, ForeignArchive, check_stored_zip, is_torchscript
from bdkd.runs.migration import FORMAT, migrate
from bdkd.runs.pickled import CodeError, ForeignFile, stand_ins
from bdkd.text import open_regular

_KEYS = {"format", "recipe", "state"}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "networks": dict, "ema": dict, "position": dict, "optimizer": dict, "scaler": dict,
    "schedule": dict, "train_images": int, "ranks": list, "skipped": torch.Tensor,
    "ema_updates": (int, torch.Tensor), "ema_copied_until": (int, type(None)),
    "data": (dict, type(None)),
}  # fmt: skip


class FolderGoneError(RunError):
    """The folder of a run was deleted or moved while the run trained."""


def check_folder(path: Path) -> None:
    """Raise ``FolderGoneError`` if a folder does not exist any more."""
    if not path.is_dir():
        raise FolderGoneError(
            f"the folder {path} was deleted or moved during the run, with the checkpoints in it: "
            "put it back and continue with --resume, or train again with another --run-dir"
        )


@contextlib.contextmanager
def explain_oserror(what: str, remedy: str = "") -> Iterator[None]:
    """Convert an ``OSError`` in the body to a ``RunError``.

    Args:
        what: what failed, such as ``"cannot write FILE"``.
        remedy: what the user can do.
    """
    try:
        yield
    except OSError as error:
        text = f"{what}: {error.strerror or first_line(error)}"
        raise RunError(f"{text}; {remedy}" if remedy else text) from error


def write_atomically(
    path: Path, content: bytes | Callable[[BinaryIO], object], then: str = "continue with --resume"
) -> None:  # fmt: skip
    """Write a file atomically: at any time, the path has either the old or the new content.

    Args:
        content: the bytes, or a function that writes them to an open file.
        then: for the error message: what the user must do after fixing the cause.

    Raises:
        FolderGoneError: the folder does not exist.
        RunError: the disk is full or the folder cannot be written. The old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        check_folder(path.parent)
        # torch.save raises a RuntimeError for a short write.
        cause = error if isinstance(error, OSError) else error.__context__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "fix the cause"
        reason = cause.strerror if isinstance(cause, OSError) else None
        reason = reason or first_line(cause or error)
        raise RunError(f"cannot write {path}: {reason}; {remedy} and {then}") from error


class BackgroundWriter:
    """Write checkpoints on a separate thread during training, one after the other.

    If a checkpoint is submitted while another one is being written, ``submit`` waits. A slow disk
    slows down the run, but no checkpoint is skipped.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._owed: Callable[[], object] | None = None

    def submit(
        self, newest: Callable[[], object] | None, lasting: Callable[[], object] | None = None
    ) -> None:
        """Call ``lasting``, then ``newest``, on the thread.

        Args:
            newest: writes the newest checkpoint. If it fails, it is not called again, because the
                next call writes a newer checkpoint.
            lasting: writes the best checkpoint. If it fails, each later ``submit`` calls it again
                until it succeeds or another ``lasting`` replaces it.
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
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def take_failure(self) -> RunError | None:
        """Return the error of the last write, and forget it. Return None if there is no error, or
        while the write is in progress."""
        if self.busy():
            return None
        error, self._failure = self._failure, None
        if error is not None and not isinstance(error, RunError):
            raise error
        return error

    def finish(self) -> None:
        """Wait for the last write. Raise ``RunError`` if it failed."""
        self.wait()
        if error := self.take_failure():
            raise error


def save_checkpoint(
    path: Path, recipe_toml: str, state: Mapping[str, Any], then: str = "continue with --resume"
) -> None:
    """Write a checkpoint.

    Args:
        recipe_toml: the recipe as TOML text.
        state: the result of :meth:`TrainingState.state_dict`.
        then: for the error message: what the user must do after fixing the cause.
    """
    content = {"format": FORMAT, "recipe": recipe_toml, "state": dict(state)}
    write_atomically(path, lambda file: torch.save(content, file), then)


def load_checkpoint(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of the recipe and the state in a checkpoint, on the CPU.

    A checkpoint of an older format is converted (:mod:`bdkd.runs.migration`).

    Raises:
        DamagedFile: the checksums prove that the file is truncated or damaged.
        RunError: the file cannot be read, is not a checkpoint, or contains objects that could run
            code.
    """
    content = load_file(path, checkpoint=True)
    if not is_checkpoint(content) or type(content["format"]) is not int:
        raise RunError(f"{path} is not a bdkd checkpoint: it needs {', '.join(sorted(_KEYS))}")
    try:
        content = migrate(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        given = content["format"]
        reason = f"has checkpoint format {given!r}; this version reads 2 to {FORMAT}"
        if given in range(2, FORMAT + 1):
            reason = f"is not a complete bdkd checkpoint of format {given}: "
            reason += f"{type(error).__name__}: {first_line(error)}"
        raise RunError(f"{path} {reason}") from error
    _check_types(path, content["state"])
    return content["recipe"], content["state"]


def _check_types(path: Path, state: Mapping[str, Any]) -> None:
    """Raise ``RunError`` if a part of a state has a type that bdkd does not write."""
    for key, kinds in _TYPES.items():
        if key in state and not isinstance(state[key], kinds):
            found = f"its {key} is a {type(state[key]).__name__}"
            raise RunError(f"{path} is not a checkpoint that bdkd wrote: {found}; use another file")


def is_checkpoint(content: Any) -> bool:
    """Return whether the content of a file has the structure of a checkpoint of any format."""
    return (
        isinstance(content, dict)
        and content.keys() >= _KEYS
        and isinstance(content["recipe"], str)
        and isinstance(content["state"], dict)
        and content["state"].keys() >= {"networks", "ema", "position"}
    )


def load_file(path: Path, checkpoint: bool = False) -> Any:
    """Return the content of a torch file on the CPU, after verifying its checksums.

    A temporary failure (permissions, memory, number of open files, an I/O error) never raises
    :class:`DamagedFile`, because bdkd renames damaged files.

    Args:
        checkpoint: whether the file must be a checkpoint of bdkd, which is always a zip file. In
            other files, stand-ins replace classes that torch does not know
            (:mod:`bdkd.runs.pickled`).
    """
    verified = False
    try:
        with open_regular(path) as file:
            if checkpoint or file.read(4) == b"PK\3\4":  # before torch 1.6: not a zip file
                check_stored_zip(file)
                verified = True
            unknown = stand_ins(file) if not checkpoint else []
            file.seek(0)
            with torch.serialization.safe_globals(unknown), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
                return torch.load(file, map_location="cpu", weights_only=True)
    except RunError:
        raise
    except Exception as error:
        raise _load_error(path, error, verified) from error


def _load_error(path: Path, error: Exception, verified: bool) -> RunError:
    match error:
        case ForeignFile():
            return RunError(f"cannot read {path}: {error}; use another file")
        case ForeignArchive() if is_torchscript(path):
            found = f"cannot read {path}: it is a TorchScript program"
            return RunError(f"{found}; save torch.jit.load({path.name!r}).state_dict()")
        case ForeignArchive():
            found = f"{path} is not a checkpoint that bdkd wrote: {error}"
            return RunError(f"{found}; use another file")
        case ArchiveError():
            found = f"{path} ({path.stat().st_size:,} bytes)"
            return DamagedFile(f"{found} is damaged or cut off: {error}; use another file")
        case FileNotFoundError() | IsADirectoryError():
            return RunError(f"no file of weights at {path}: {error.strerror}")
        case OSError():
            reason = error.strerror or first_line(error)
            return RunError(f"cannot read {path}: {reason}; the file was not changed")
        case CodeError():
            return RunError(f"refused to read {path}: {error}; use another file")
        case pickle.UnpicklingError():
            return RunError(
                f"refused to read {path}: it is not a file of torch, or contains more than tensors "
                "and plain values, and could run code; use another file"
            )
    if isinstance(error, RecursionError):
        return RunError(f"cannot read {path}: its content is nested too deeply; use another file")
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        failed = f"cannot read {path}: not enough memory for its {path.stat().st_size:,} bytes"
        return RunError(f"{failed}; free some memory")
    but = "its checksums are right, but " if verified else ""
    reason = f"torch {torch.__version__} cannot load it ({first_line(error)})"
    return RunError(f"cannot read {path}: {but}{reason}; use another file")
