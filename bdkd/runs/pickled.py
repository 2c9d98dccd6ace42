"""The classes in files of ``torch.save``, and stand-ins for those that hold no weights.

Checkpoints of other trainers contain namespaces of options, NumPy numbers or dates next to the
weights. Torch's reader refuses every class that it does not know, because calling a class can run
code. Here, inert stand-ins replace these classes: the file loads, and nothing in it is called.
"""

import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of the format before torch 1.6
MAX_NESTING = 10_000  # tuples in a row
_NESTING = {"MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_NOT_NESTED = {"APPEND", "APPENDS", "BUILD", "NEWOBJ", "REDUCE", "SETITEM", "SETITEMS"}
_LEGACY_HEADER = 3  # pickles before the content: magic number, protocol, system

# A file that names one of these is an attack: no weights and no options need them.
_MODULES = {
    "bdb", "code", "ctypes", "importlib", "marshal", "nt", "os", "pdb", "pickle", "posix", "pty",
    "runpy", "shutil", "socket", "subprocess", "sys", "timeit", "webbrowser",
}  # fmt: skip
# Torch reads the names of Python 2 that pickle writes in protocol 2.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "long": "int", "unicode": "str",
            "xrange": "range"}  # fmt: skip
_FUNCTIONS = {
    "CodeType", "FunctionType", "__import__", "apply", "breakpoint", "compile", "delattr", "eval",
    "exec", "execfile", "getattr", "globals", "input", "open", "setattr",
}  # fmt: skip


class CodeError(Exception):
    """A file names a function that could run code. The message is the reason."""


class ForeignFile(Exception):
    """The file is not one of ``torch.save``. The message is the reason."""


class _Record:
    """Stands for a class whose instances have attributes or items. Creates a dictionary."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()  # torch's reader sets items and attributes of this type only


class _List:
    """Stands for a class whose instances have elements. Creates a list."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return []


class _Value:
    """Stands for a class whose state is no dictionary, such as NumPy's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def stand_ins(file: BinaryIO) -> list[Callable | tuple[Callable, str]]:
    """Return a stand-in for each class in a file, for ``torch.serialization.safe_globals``. Torch
    prefers the classes that it knows.

    Raises:
        CodeError: the file names a function that could run code.
        ForeignFile, pickle.UnpicklingError: the file is no file of ``torch.save``.
    """
    found: list[Callable | tuple[Callable, str]] = []
    for pair in sorted(_classes(file)):
        module, name = (_RENAMED.get(part, part) for part in pair)
        package = module.partition(".")[0]
        if package in _MODULES or (package in ("builtins", "types") and name in _FUNCTIONS):
            raise CodeError(f"it calls {module}.{name}, which could run code")
        kind: type = _Value if package in ("numpy", "functools") else _Record
        if name == "deque" or name.lower().endswith("list"):
            kind = _List
        found.append((kind, f"{module}.{name}"))
    return found


def _classes(file: BinaryIO) -> set[tuple[str, str]]:
    """Return module and name of every class in the pickles of a file."""
    file.seek(0)
    begin = file.read(len(_LEGACY_MAGIC))
    file.seek(0)
    if reason := not_weights(begin):
        raise ForeignFile(reason)
    if begin.startswith(b"PK\3\4"):
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ForeignFile("it is a zip file, but not one of torch.save")
            with archive.open(names[0]) as content:
                return _named(content)
    if begin != _LEGACY_MAGIC:
        raise ForeignFile("it is not a file of torch.save")
    return set().union(*(_named(file) for _ in range(_LEGACY_HEADER + 1)))


def not_weights(begin: bytes) -> str:
    """Return what a file is that a failed download leaves in place of weights, or an empty string.

    Args:
        begin: the first bytes of the file.
    """
    if begin.startswith(b"version https:/"):
        return "it is a Git LFS pointer: run git lfs pull"
    if begin.lstrip().startswith(b"<"):
        return "it is a web page: download the file again"
    return "" if begin else "it is empty"


def _named(content: Any) -> set[tuple[str, str]]:
    found, depth = set(), 0
    try:
        for code, text, _ in pickletools.genops(content):
            if code.name in _NESTING:
                depth += 1
            elif code.name in _NOT_NESTED:
                depth = 0
            if depth > MAX_NESTING:
                raise pickle.UnpicklingError("nested too deeply")  # which crashes Python
            if code.name == "GLOBAL" and isinstance(text, str):
                module, _, name = text.partition(" ")
                found.add((module, name))
    except Exception as error:  # genops raises several types for what is no pickle
        raise pickle.UnpicklingError(str(error)) from error
    return found
