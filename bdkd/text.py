"""Read text files that people write, also on Windows."""

import codecs
import os
import select
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO
from unicodedata import normalize

from bdkd.errors import RunError, UsageError

# The exclude list of a data set of 14 million images is smaller. A larger file is refused without
# reading it.
MAX_TEXT_BYTES = 2**30
PIPE_SECONDS = 10.0  # maximum wait for the writer of a pipe


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raise ``OSError`` if the file cannot be opened, and
    ``RunError`` if it is a pipe or device, which might never end."""
    # Without O_NONBLOCK, opening a FIFO blocks until another process opens it for writing.
    file = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise RunError(f"cannot read {path}: it is not a regular file")
    return file


def expand_user(path: str | Path, option: str) -> Path:
    """Replace ``~`` and ``~user``. Raise ``UsageError`` with the option's name for an unknown
    user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        needed = "a path in which ~ names a user of this machine"
        raise UsageError(f"{option} must be {needed}, got {str(path)!r}") from error


def without_waiting(path: str, flags: int) -> int:
    """Open a file, as the ``opener`` of :func:`open`. Raise ``OSError`` for a FIFO without a reader
    instead of waiting for one."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    os.set_blocking(descriptor, True)
    return descriptor


def read_text(
    path: Path, errors: str = "strict", limit: int = MAX_TEXT_BYTES, pipe: bool = False
) -> str:
    """Return the text of a file as :func:`decode_text` reads it.

    Args:
        limit: the largest size in bytes.
        pipe: also read pipes, such as ``/dev/stdin`` and ``<(command)`` of a shell.

    Raises:
        OSError: the file cannot be opened or read.
        RunError: the file is not text, is too large, or is a pipe or device.
    """
    if pipe and path.is_fifo():
        return decode_text(_read_pipe(path, limit), str(path), errors)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise _too_large(path, f"{size:,} bytes", limit)
        return decode_text(file.read(), str(path), errors)


def _read_pipe(path: Path, limit: int) -> bytes:
    content = bytearray()
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0):
        while len(content) <= limit:
            if not select.select([descriptor], [], [], PIPE_SECONDS)[0]:
                waited = f"nothing was written to this pipe for {PIPE_SECONDS:g} s"
                raise RunError(f"cannot read {path}: {waited}; give a text file")
            chunk = os.read(descriptor, 2**16)
            if not chunk:
                return bytes(content)
            content += chunk
    raise _too_large(path, f"more than {limit:,} bytes", limit)


def _too_large(path: Path, found: str, limit: int) -> RunError:
    needed = f"a text file of at most {limit:,} bytes"
    return RunError(f"cannot read {path}: it has {found}, but {needed} is needed; check the path")


def decode_text(content: bytes, name: str, errors: str = "strict") -> str:
    r"""Decode UTF-8, or UTF-16 with a byte order mark, as Windows tools write it. The mark is
    removed, and every line ends in ``\n``.

    Args:
        name: name of the text in error messages.
        errors: how to handle errors in UTF-8. "surrogateescape" keeps file names that are not
            UTF-8.

    Raises:
        RunError: the content is in another encoding.
    """
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, errors = "utf-16", "strict"
    elif b"\0" in content:
        raise RunError(f"{name} contains NUL bytes, so it is not UTF-8 text: save it as UTF-8")
    try:
        text = content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        raise RunError(f"{name} is not {kind} text ({error.reason}): save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_lines(text: str) -> list[str]:
    """Return the lines of a text without the empty lines at its end. Unlike ``str.splitlines``,
    this function splits only at line feeds, because file names may contain other separators."""
    text = text.rstrip("\n \t")
    return text.split("\n") if text else []


def unicode_hint(names: Iterable[str], known: Iterable[str]) -> str:
    """Return a hint for a message about unknown names if one of them looks like a known name but
    has another Unicode form. An accent can be composed (NFC) or decomposed (NFD)."""
    odd = [name for name in names if not name.isascii()]
    forms = {normalize("NFC", name): name for name in known if not name.isascii()} if odd else {}
    for name in odd:
        other = forms.get(normalize("NFC", name), name)
        if other != name:
            return (
                f"; {name!a} and {other!a} look the same but have different Unicode forms: rename "
                "one of them"
            )
    return ""


def unicode_hint_of_path(path: Path) -> str:
    """Return :func:`unicode_hint` of a missing file or folder and the names next to it."""
    try:
        return unicode_hint([path.name], os.listdir(path.parent))
    except OSError:
        return ""
