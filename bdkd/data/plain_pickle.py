"""Pickles that hold numbers, text, lists, dictionaries and byte arrays, and nothing else.

A pickle names functions that its reader is to call, so the one from a stranger can run anything.
Here no name is ever imported: the four that numpy's arrays are written with stand for classes of
this module that only remember what they were given, and every other name is refused.
"""

import pickle
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from bdkd.errors import RunError


class _Latin1(bytes):
    """``_codecs.encode(text, "latin1")``: how Python 3 writes bytes in the old protocol."""

    def __new__(cls, text: str, encoding: str) -> "_Latin1":
        return super().__new__(cls, text, "latin1")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("bytes have no state")


class _DType:
    """``numpy.dtype(name, align, copy)``."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Byte order and fields, of which a plain byte has none."""


class _Array:
    """``numpy.ndarray``: its state is (version, shape, dtype, in Fortran's order, bytes)."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _DType) or dtype.name not in ("u1", "|u1", "uint8") or fortran:
            raise pickle.UnpicklingError("an array that is not one of bytes in C's order")
        self.value = np.frombuffer(content, np.uint8).reshape(shape)


class _Reconstruct:
    """``numpy.core.multiarray._reconstruct(ndarray, shape, type)``: an array yet without state."""

    def __new__(cls, *_: object) -> Any:
        return _Array()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("no such state")


STANDS_FOR: dict[tuple[str, str], Callable] = {
    ("_codecs", "encode"): _Latin1,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], name: str) -> None:
        super().__init__(stream, encoding="bytes")
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        try:
            return STANDS_FOR[module, name]
        except KeyError:
            raise RunError(
                f"{self.name} is refused: it asks for {module}.{name}, which no data set needs and "
                "which could run any program; get the file from its original host"
            ) from None


def load(stream: IO[bytes], name: str) -> dict[str, Any]:
    """The dictionary of a pickle, its keys as text; byte arrays as numpy arrays.

    Args:
        name: the file's name, for error messages.

    Raises:
        RunError: the pickle asks for anything but plain data, is damaged, or is no dictionary.
    """
    try:
        content = _Unpickler(stream, name).load()
    except RunError:
        raise
    except Exception as error:  # a damaged pickle can raise any, says the library's manual
        raise RunError(
            f"{name} is damaged or no pickle of plain data ({error}): get it again"
        ) from error
    if not isinstance(content, dict):
        raise RunError(f"{name} must hold a dictionary, got {type(content).__name__}")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): (
            value.value if isinstance(value, _Array) else value
        )
        for key, value in content.items()
    }
