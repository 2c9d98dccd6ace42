"""Find the classes in files of ``torch.save``, and replace those that contain no weights.

Checkpoints of other trainers contain namespaces of options, NumPy numbers or dates in addition to
the weights. ``torch.load`` refuses classes that it does not know, because creating an object of a
class can run code. This module replaces these classes with stand-ins that do nothing. The file can
then be loaded without running its code.
"""

import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of the format before torch 1.6
MAX_NESTING = 10_000  # consecutive tuples
_NESTING = {"MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_NOT_NESTED = {"APPEND", "APPENDS", "BUILD", "NEWOBJ", "REDUCE", "SETITEM", "SETITEMS"}
_LEGACY_HEADER = 3  # pickles before the content: magic number, protocol, system

# A file that refers to one of these is an attack, because neither weights nor options need them.
_MODULES = {
    "bdb", "code", "ctypes", "importlib", "marshal", "nt", "os", "pdb", "pickle", "posix", "pty",
    "runpy", "shutil", "socket", "subprocess", "sys", "timeit", "webbrowser",
}  # fmt: skip
# Pickle protocol 2 uses the names of Python 2. torch converts them.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "long": "int", "unicode": "str",
            "xrange": "range"}  # fmt: skip
_FUNCTIONS = {
    "CodeType", "FunctionType", "__import__", "apply", "breakpoint", "compile", "delattr", "eval",
    "exec", "execfile", "getattr", "globals", "input", "open", "setattr",
}  # fmt: skip


class CodeError(Exception):
    """A file refers to a function that could run code. The message is the reason."""


class ForeignFile(Exception):
    """``torch.save`` did not write the file. The message is the reason."""


class _Record:
    """Replaces a class whose instances have attributes or items. Creates a dictionary."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()  # torch.load sets items and attributes only for this type


class _List:
    """Replaces a class whose instances have elements. Creates a list."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return []


class _Value:
    """Replaces a class whose pickled state is not a dictionary, such as NumPy's classes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def stand_ins(file: BinaryIO) -> list[Callable | tuple[Callable, str]]:
    """Return a stand-in for each class in a file, for ``torch.serialization.safe_globals``.

    torch still uses the classes that it knows.

    Raises:
        CodeError: the file refers to a function that could run code.
        ForeignFile, pickle.UnpicklingError: ``torch.save`` did not write the file.
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
    """Return the module and the name of each class in the pickles of a file."""
    file.seek(0)
    begin = file.read(len(_LEGACY_MAGIC))
    file.seek(0)
    if reason := not_weights(begin):
        raise ForeignFile(reason)
    if begin.startswith(b"PK\3\4"):
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ForeignFile("it is a zip file that torch.save did not write")
            with archive.open(names[0]) as content:
                return _named(content)
    if begin != _LEGACY_MAGIC:
        raise ForeignFile("it is not a file of torch.save")
    return set().union(*(_named(file) for _ in range(_LEGACY_HEADER + 1)))


def not_weights(begin: bytes) -> str:
    """Return a reason if a file is the result of a failed download, else an empty string.

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
                raise pickle.UnpicklingError("nested too deeply")  # it would crash Python
            if code.name == "GLOBAL" and isinstance(text, str):
                module, _, name = text.partition(" ")
                found.add((module, name))
    except Exception as error:  # genops raises several types if the file is not a pickle
        raise pickle.UnpicklingError(str(error)) from error
    return found
