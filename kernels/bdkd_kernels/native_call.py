"""The structs that ``native.py`` passes to the C++ kernel, described once.

The tables below define both the functions that pack a call in Python and the structs that the
kernel reads in C++. The build of the native kernel runs this file to generate a C++ header:
``python -I native_call.py > arguments.h``. This file needs only the standard library.

Every field takes 8 bytes, so the structs have no padding. An address of 0 is a null pointer.
"""

import struct
from typing import NamedTuple


class Field(NamedTuple):
    """One field of a struct."""

    name: str
    cpp_type: str
    meaning: str = ""


# The index of a name is its value in the C++ enum.
STORAGE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}  # by name, the bytes
TARGET_KIND = ("no_target", "labels", "probabilities")

# The compute type is float64 if a network's storage is, and float32 otherwise.
NETWORK = (
    Field("storage", "Storage", "of the logits and of the gradient"),
    Field("logits", "const void*", "(N, C), class stride 1"),
    Field("stride", "int64_t", "from one row of the logits to the next, in elements"),
    Field("gradient", "void*", "(N, C), class stride 1, or null; may be the logits"),
    Field("gradient_stride", "int64_t", "from one row of the gradient to the next"),
    Field("upstream", "const void*", "(N,) of the compute type, or null"),
    Field("scale", "double", "the upstream gradient of every row if `upstream` is null"),
    Field("loss", "void*", "one value or (N,) of the compute type; null: no losses"),
)
# The struct Arguments holds the options, the student, the teacher and these fields.
CALL = (
    Field("rows", "int64_t", "N"),
    Field("classes", "int64_t", "C"),
    Field("target_kind", "TargetKind"),
    Field("target_storage", "Storage", "of probabilities"),
    Field("target", "const void*", "(N,) int64 labels, (N, C) probabilities, or null"),
    Field("weight", "const void*", "(N,) of the compute type, or null"),
    Field("statistics", "void*", "(kStatistics, N) of the compute type, or null"),
    Field("threads", "int64_t", "the largest number of threads to use"),
    Field("check_labels", "int64_t", "1: return the first row with an invalid label"),
)


def _format(fields: tuple[Field, ...]) -> str:
    return "".join("d" if field.cpp_type == "double" else "q" for field in fields)


def _names(fields: tuple[Field, ...]) -> str:
    return ", ".join(field.name for field in fields)


_STRUCT = struct.Struct(f"={2 * _format(NETWORK)}{_format(CALL)}")

# network(storage, logits, ...) returns a tuple. pack(options, student, teacher, rows, ...) returns
# the bytes of Arguments, given the bytes of the options and two results of `network`. Pass the
# fields as keywords. The functions are generated from the tables, as collections.namedtuple
# generates its __new__: both take 1 us together, three named tuples take 6 us, which is a tenth of
# a step of 128 samples of 100 classes.
network = eval(f"lambda {_names(NETWORK)}: ({_names(NETWORK)})")
pack = eval(
    f"lambda options, student, teacher, {_names(CALL)}: "
    f"options + pack_numbers(*student, *teacher, {_names(CALL)})",
    {"pack_numbers": _STRUCT.pack},
)


def _cpp_enum(name: str, values: tuple[str, ...]) -> str:
    names = ("k" + "".join(map(str.capitalize, value.split("_"))) for value in values)
    return f"enum {name} : int64_t {{ {', '.join(names)} }};"


def _cpp_fields(fields: tuple[Field, ...]) -> list[str]:
    return [f"  {f.cpp_type} {f.name};{f'  // {f.meaning}' if f.meaning else ''}" for f in fields]


def cpp_header() -> str:
    """Return the C++ header that declares the structs and the enums of this file."""
    lines = [
        "// Generated from kernels/bdkd_kernels/native_call.py.",
        "#pragma once",
        "#include <cstdint>",
        '#include "options.h"',
        _cpp_enum("Storage", tuple(STORAGE)),
        f"constexpr int64_t kStorageBytes[] = {{{', '.join(map(str, STORAGE.values()))}}};",
        _cpp_enum("TargetKind", TARGET_KIND),
        "struct Network {",
        *_cpp_fields(NETWORK),
        "};",
        "struct Arguments {",
        "  Options options;",
        "  Network student, teacher;",
        *_cpp_fields(CALL),
        "};",
        f"static_assert(sizeof(Arguments) == sizeof(Options) + {_STRUCT.size});",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(cpp_header(), end="")
