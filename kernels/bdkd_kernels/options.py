"""The options of the loss and the statistics that it returns, in one table.

Everything that needs their names, order, types or bounds reads this file: the signatures of the
public functions, the checks, the schemas of the operators, the rows of ``BDKDStats``, the records
of the Triton kernels, and the structs of the native kernel. To add an option, add a field to
:class:`LossOptions` and :class:`LossArguments`, and use it in the mathematics of each backend.

This file needs the standard library only. The build of the native kernel runs it to generate a C
header: ``python options.py > table.h``.
"""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from inspect import Parameter
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, get_args

Reduction = Literal["mean", "sum", "none"]
Divergence = Literal["reverse", "forward"]


class Bounds(NamedTuple):
    """The values that an option accepts."""

    needed: str  # for the error message
    accept: Callable[[Any], bool]


# With these bounds, every product of options and its square are in the range of float32. Beyond
# them, a product could become 0 or inf in a kernel and turn a loss into NaN.
TEMPERATURE = Bounds("a number in [0.0001, 10000]", lambda x: 1e-4 <= x <= 1e4)
GAMMA = Bounds("a number in [1, 1e9]", lambda x: 1 <= x <= 1e9)
WEIGHT = Bounds("0 or a number in [1e-30, 1e9]", lambda x: x == 0 or 1e-30 <= x <= 1e9)
FRACTION = Bounds("a number in [0, 1]", lambda x: 0 <= x <= 1)
INT64 = Bounds("an int of 64 bits", lambda x: -(2**63) <= x < 2**63)


@dataclass(frozen=True)
class LossOptions:
    """The options of one call, in the order of the operators' schemas."""

    temperature: Annotated[
        float, "Temperature of both divergences, in [1e-4, 1e4].", TEMPERATURE
    ] = 1.0
    gamma: Annotated[
        float,
        "The larger of the two divergence weights of a sample, in [1, 1e9]. The smaller weight is "
        "1. A ``gamma`` of 1 turns the weighting off.",
        GAMMA,
    ] = 2.0
    student_ce: Annotated[
        float,
        "Weight of the student's cross entropy: 0, or in [1e-30, 1e9]. A term of weight 0 is not "
        "computed.",
        WEIGHT,
    ] = 1.0
    student_kd: Annotated[
        float, "Weight of the student's two divergences: 0, or in [1e-30, 1e9].", WEIGHT
    ] = 1.0
    teacher_ce: Annotated[
        float, "Weight of the teacher's cross entropy: 0, or in [1e-30, 1e9].", WEIGHT
    ] = 1.0
    teacher_kd: Annotated[
        float, "Weight of the teacher's divergence: 0, or in [1e-30, 1e9].", WEIGHT
    ] = 1.0
    teacher_divergence: Annotated[
        Divergence,
        'The teacher\'s divergence: ``"reverse"`` is KL(p_s || p_t), ``"forward"`` is '
        "KL(p_t || p_s).",
    ] = "reverse"
    soften_entropy: Annotated[
        bool, "Compare the entropies at ``temperature``. If False, compare them at temperature 1."
    ] = True
    label_smoothing: Annotated[
        float,
        "Label smoothing as in :func:`torch.nn.functional.cross_entropy`, in [0, 1].",
        FRACTION,
    ] = 0.0
    ignore_index: Annotated[
        int,
        "Samples with this label have loss 0 and gradients 0, and ``mean`` does not count them.",
        INT64,
    ] = -100
    reduction: Annotated[
        Reduction, 'Reduction over the samples: ``"mean"``, ``"sum"`` or ``"none"``.'
    ] = "mean"


class LossArguments(TypedDict, total=False):
    """:class:`LossOptions` as keyword arguments, for type checkers and editors."""

    temperature: float
    gamma: float
    student_ce: float
    student_kd: float
    teacher_ce: float
    teacher_kd: float
    teacher_divergence: Divergence
    soften_entropy: bool
    label_smoothing: float
    ignore_index: int
    reduction: Reduction


class Option(NamedTuple):
    """One row of the table."""

    name: str
    type: Any  # float, int, bool or a Literal of strings
    default: Any
    doc: str
    bounds: Bounds | None
    choices: tuple[str, ...]  # the strings of a Literal; empty for other types

    def check(self, value: Any) -> Any:
        """Return ``value`` as the option's type, or raise an error that names the option."""
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                *others, last = map(repr, self.choices)
                needed = f"{', '.join(others)} or {last}"
                raise ValueError(f"{self.name} must be {needed}, got {shown(value)}")
            return value
        if self.type is bool:
            if not isinstance(value, bool):
                raise TypeError(f"{self.name} must be a bool, got {shown(value)}")
            return value
        assert self.bounds is not None
        if self.type is int:
            if type(value) is not int:
                if isinstance(value, bool) or not isinstance(value, Integral):
                    raise TypeError(f"{self.name} must be an int, got {shown(value)}")
                value = int(value)
        elif type(value) is not float:
            value = as_float(self.name, value, self.bounds.needed)
        if not self.bounds.accept(value):
            raise ValueError(f"{self.name} must be {self.bounds.needed}, got {shown(value)}")
        return value


def _table() -> tuple[Option, ...]:
    options = []
    for field in fields(LossOptions):
        kind, doc, *bounds = get_args(field.type)
        options.append(
            Option(field.name, kind, field.default, doc, bounds[0] if bounds else None,
                   get_args(kind))
        )  # fmt: skip
    return tuple(options)


TABLE = _table()
NAMES = tuple(option.name for option in TABLE)
_BY_NAME = {option.name: option for option in TABLE}

# Names of arguments in other libraries, and the option with the same meaning. The names are in
# lower case without underscores: "kd_T" becomes "kdt". RepDistiller: T, kd_T. mdistiller:
# CE_WEIGHT, KD_WEIGHT. Liger: weight_hard_loss, weight_soft_loss. timm: smoothing.
SYNONYMS = {
    **dict.fromkeys(("t", "tau", "temp", "kdt", "kdtemperature"), "temperature"),
    **dict.fromkeys(("ceweight", "celossweight", "weighthardloss", "lambdace"), "student_ce"),
    **dict.fromkeys(("kdweight", "kdlossweight", "weightsoftloss", "lambdakd"), "student_kd"),
    "smoothing": "label_smoothing",
}
# Names without a single matching option, and the hint for them. The meaning of alpha and beta
# differs between libraries.
_WEIGHTS = "the weights of the student's terms are 'student_ce' and 'student_kd'"
NO_COUNTERPART = {
    "alpha": _WEIGHTS,
    "beta": f"{_WEIGHTS}; the beta of Liger's JSD is in bdkd_kernels.compat.LigerJSD",
    "weight": "'sample_weight' weights samples; weights of classes are not supported",
    "logtarget": "pass logits, not log-probabilities",
}

# The statistics of each sample, in the order of the rows of ``BDKDStats.table``.
STATISTICS = {
    "forward_kl": "KL(p_t || p_s), in nats.",
    "reverse_kl": "KL(p_s || p_t), in nats.",
    "student_entropy": "Entropy of the student, in nats, at ``temperature``, or at 1 if "
    "``soften_entropy`` is False.",
    "teacher_entropy": "Entropy of the teacher, in nats, at ``temperature``, or at 1 if "
    "``soften_entropy`` is False.",
    "student_ce": "Cross entropy of the student, in nats.",
    "teacher_ce": "Cross entropy of the teacher, in nats.",
    "forward_weight": "The weight d1 of the forward KL: ``gamma`` or 1.",
    "reverse_weight": "The weight d2 of the reverse KL: ``gamma`` or 1.",
    "student_confidence": "The student's largest probability at temperature 1.",
    "teacher_confidence": "The teacher's largest probability at temperature 1.",
    "student_correct": "1.0 if the student predicts the label (of tied logits, the first class is "
    "the prediction), else 0.0. Without a target, 0.0.",
    "teacher_correct": "1.0 if the teacher predicts the label (of tied logits, the first class is "
    "the prediction), else 0.0. Without a target, 0.0.",
}


def as_float(name: str, value: object, needed: str) -> float:
    """Return any real number as a Python float. ``needed`` completes the error message.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If no float can hold the number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = f": pass {name}.item()" if hasattr(value, "item") else ""
        raise TypeError(f"{name} must be {needed}, got {shown(value)}{hint}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {needed}, got {shown(value)}") from None


def shown(value: object) -> str:
    """Return the value and its type for an error message, on one line and shortened."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print an int of more than 4300 digits
        text = "a very large number"
    text = text if len(text) <= 60 else f"{text[:60]}..."
    return text if isinstance(value, float) else f"{text} ({type(value).__name__})"


def checked_options(values: Mapping[str, Any]) -> LossOptions:
    """Return the checked ``LossOptions(**values)``.

    Other number types, such as NumPy's, are converted to Python numbers, because the operators
    accept only these.

    Raises:
        ValueError, TypeError: If an option is invalid. The message names the first such option.
        KeyError: If a name is not an option; see :func:`check_names`.
    """
    return LossOptions(**{name: _BY_NAME[name].check(value) for name, value in values.items()})


@lru_cache(maxsize=256, typed=True)  # typed: distinguishes True from 1.0
def cached_options(**values: Any) -> LossOptions:
    """Return :func:`checked_options` of the values. Equal values return the same object.

    A training loop passes the same options in every step. Creating and checking them takes longer
    than the kernel of a small batch.

    Raises:
        TypeError: Also if a value cannot be hashed. Then call :func:`checked_options`, which
            accepts the value or raises an error that names the option.
    """
    return checked_options(values)


# -- signatures and docstrings ---------------------------------------------------------------------

_Definition = TypeVar("_Definition", bound=Callable)


def shows_options(definition: _Definition) -> _Definition:
    """Show the options in the signature and docstring of a function or class.

    The function, or the constructor of the class, takes ``**options: Unpack[LossArguments]``. Its
    ``__signature__``, which ``help()``, IPython and Sphinx read, lists them before its other
    keyword arguments. The line ``{options}`` of the docstring becomes their descriptions.
    """
    function: Any = definition.__init__ if isinstance(definition, type) else definition  # type: ignore[misc]
    signature = inspect.signature(function)
    others = [*signature.parameters.values()][:-1]  # the last one is **options
    options = [
        Parameter(
            option.name, Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type
        )
        for option in TABLE
    ]
    # Positional arguments, then the options, then the other keyword arguments: sorted() is stable.
    parameters = sorted((*options, *others), key=lambda parameter: parameter.kind)
    function.__signature__ = signature.replace(parameters=parameters)
    fill_doc(definition, "options", {option.name: option.doc for option in TABLE})
    return definition


def fill_doc(definition: Any, placeholder: str, entries: Mapping[str, str]) -> None:
    """Replace the line ``{placeholder}`` of a docstring with the description of every entry."""

    def described(line: re.Match) -> str:
        return "\n".join(
            textwrap.fill(f"{name}: {doc}", 100, initial_indent=line[1],
                          subsequent_indent=f"{line[1]}    ", break_on_hyphens=False)
            for name, doc in entries.items()
        )  # fmt: skip

    if definition.__doc__ is not None:  # python -OO removes docstrings
        pattern = rf"^( *)\{{{placeholder}\}}$"
        definition.__doc__ = re.sub(pattern, described, definition.__doc__, flags=re.M)


def check_names(function: Callable, names: Iterable[str]) -> None:
    """Raise ``TypeError`` for a keyword that is not an option, with a hint at the right name."""
    for name in names:
        if name in _BY_NAME:
            continue
        parameters = inspect.signature(function).parameters
        plain = name.lower().replace("_", "")
        if plain in NO_COUNTERPART:
            hint = f": {NO_COUNTERPART[plain]}"
        elif nearest := SYNONYMS.get(plain) or next(
            iter(get_close_matches(name, parameters, 1)), ""
        ):
            hint = f". Did you mean '{nearest}'?"
        else:
            hint = ""
        raise TypeError(
            f"{function.__qualname__}() got an unexpected keyword argument '{name}'{hint}"
        )


# -- the native kernel -----------------------------------------------------------------------------


def struct_format() -> str:
    """Return the options' format for :mod:`struct`: 8 bytes each, in the order of the table."""
    return "".join("d" if option.type is float else "q" for option in TABLE)


def struct_values(options: LossOptions) -> list[float | int]:
    """Return the options as numbers, in the order of :func:`struct_format`.

    A string is represented by its index among the choices of its option.
    """
    values = [getattr(options, option.name) for option in TABLE]
    return [
        option.choices.index(value) if option.choices else value
        for option, value in zip(TABLE, values, strict=True)
    ]


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def cpp_header() -> str:
    """Return a C++ header with ``Options``, an enum for each choice, and ``Statistic``."""
    enums, fields = [], []
    for option in TABLE:
        kind = "double" if option.type is float else "int64_t"
        if option.choices:
            kind = _camel(option.name)
            names = ", ".join(f"k{kind}{_camel(choice)}" for choice in option.choices)
            enums.append(f"enum {kind} : int64_t {{ {names} }};")
        fields.append(f"  {kind} {option.name};")
    statistics = ", ".join(f"k{_camel(name)}" for name in STATISTICS)
    lines = [
        "// Generated from kernels/bdkd_kernels/options.py.",
        "#pragma once",
        "#include <cstdint>",
        *enums,
        "struct Options {",
        *fields,
        "};",
        f"static_assert(sizeof(Options) == {8 * len(TABLE)});",
        f"enum Statistic {{ {statistics}, kStatistics }};",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(cpp_header(), end="")
