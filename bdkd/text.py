"""Text files that a person wrote, on Windows too."""

import codecs
from pathlib import Path

from bdkd.errors import RunError


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a file as :func:`decode_text` reads it.

    Raises:
        OSError: the file cannot be read.
        RunError: the file holds no text.
    """
    return decode_text(path.read_bytes(), str(path), errors)


def decode_text(content: bytes, name: str, errors: str = "strict") -> str:
    r"""Decode UTF-8, or UTF-16 with a byte order mark, as Windows tools write it. The mark is
    removed, and every line ends in ``\n``.

    Args:
        name: names the text in error messages.
        errors: of decoding UTF-8. "surrogateescape" keeps file names that are not UTF-8.

    Raises:
        RunError: the content is in another encoding.
    """
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, errors = "utf-16", "strict"
    elif b"\0" in content:
        raise RunError(f"{name} holds NUL bytes, so it is no UTF-8 text: save it as UTF-8")
    try:
        text = content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        raise RunError(f"{name} is no {kind} text ({error.reason}): save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_lines(text: str) -> list[str]:
    """Return the lines of a text without the empty ones at its end. Unlike ``str.splitlines``,
    this splits at line feeds alone: file names may hold other separators."""
    text = text.rstrip("\n \t")
    return text.split("\n") if text else []
