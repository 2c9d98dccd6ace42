"""Load pickles that hold only numbers, text, lists, dictionaries and byte arrays.

A pickle names functions for its reader to call, so an untrusted pickle can run any code. This
unpickler never imports a name. It replaces the names that numpy's arrays need by classes of this
module that only store their arguments, and it refuses every other name.
"""

import pickle
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from bdkd.errors import RunError


class _Latin1(bytes):
    """``_codecs.encode(text, "latin1")``, which represents bytes in old pickle protocols."""

    def __new__(cls, text: str, encoding: str) -> "_Latin1":
        return super().__new__(cls, text, "latin1")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("bytes with a state")


class _DType:
    """``numpy.dtype(name, align, copy)``."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and fields, which do not apply to uint8."""


class _Array:
    """``numpy.ndarray`` and ``numpy.core.multiarray._reconstruct(ndarray, shape, type)``."""

    value: np.ndarray | None = None  # None until the state is set

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        # (version, shape, dtype, is_fortran, bytes)
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _DType) or dtype.name not in ("u1", "|u1", "uint8") or fortran:
            raise pickle.UnpicklingError("an array that is not uint8 in C order")
        self.value = np.frombuffer(content, np.uint8).reshape(shape)


REPLACEMENTS: dict[tuple[str, str], Callable] = {
    ("_codecs", "encode"): _Latin1,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], name: str) -> None:
        super().__init__(stream, encoding="bytes")
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in REPLACEMENTS:
            raise RunError(
                f"{self.name} is refused: it asks for {module}.{name}, which no data set needs and "
                "which could run any program; get the file from its original host"
            )
        return REPLACEMENTS[module, name]


def load(stream: IO[bytes], name: str) -> dict[str, Any]:
    """Return the dictionary in a pickle, with keys as text and byte arrays as numpy arrays.

    Args:
        name: the file name for error messages.

    Raises:
        RunError: the pickle holds more than plain data, is damaged, or is not a dictionary.
    """
    try:
        content = _Unpickler(stream, name).load()
    except RunError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception (Python's documentation)
        raise RunError(
            f"{name} is damaged or not a pickle of plain data ({error}): download it again"
        ) from error
    if not isinstance(content, dict):
        raise RunError(
            f"{name} must hold a dictionary, got {type(content).__name__}: download it again"
        )
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): (
            value.value if isinstance(value, _Array) else value
        )
        for key, value in content.items()
    }
