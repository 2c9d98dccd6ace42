"""The flags of a command, from the dataclass of its options, and checks of a command line.

tyro parses command lines and prints the complete help. These checks run before tyro, so that a
wrong flag or value causes one line that quotes what the user typed.
"""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro

from bdkd.bounds import bounds_of, check_value, plain_type
from bdkd.config.convert import needed_for
from bdkd.errors import UsageError, shown

# Option names of other trainers and common abbreviations, each with the flag of bdkd.
SYNONYMS = {
    "lr": "optimizer.learning-rate", "learning-rate": "optimizer.learning-rate",
    "wd": "optimizer.weight-decay", "opt": "optimizer.name", "optim": "optimizer.name",
    "b": "train.batch-size", "bs": "train.batch-size", "batch": "train.batch-size",
    "batchsize": "train.batch-size", "epoch": "train.epochs", "num-epochs": "train.epochs",
    "amp": "train.precision", "dtype": "train.precision", "fp16": "train.precision",
    "bf16": "train.precision", "grad-accum-steps": "train.accumulate",
    "accumulation-steps": "train.accumulate", "clip-grad": "train.clip-norm",
    "model-ema": "train.ema-decay", "model-ema-decay": "train.ema-decay",
    "torchcompile": "train.compile", "smoothing": "objective.label-smoothing",
    "label-smoothing": "objective.label-smoothing", "t": "objective.temperature",
    "tau": "objective.temperature", "kd-loss": "objective.name", "loss": "objective.name",
    "method": "objective.name", "sched": "schedule.name", "scheduler": "schedule.name",
    "warmup-epochs": "schedule.warmup", "milestones": "schedule.milestones",
    "data-dir": "data.root", "data-path": "data.root", "dataset": "data.source",
    "input-size": "data.image-size", "img-size": "data.image-size", "j": "data.workers",
    "num-workers": "data.workers", "val-split": "data.validation", "hflip": "data.flip",
    "checkpoint": "networks.teacher.weights", "initial-checkpoint": "networks.student.weights",
    "model": "networks.student.model", "kd-model-name": "networks.teacher.model",
    "teacher-path": "networks.teacher.weights", "gpu": "device", "output": "run-dir",
    "output-dir": "run-dir", "out": "run-dir", "log-interval": "log-every", "eval": "dry-run",
    "iterations": "max-steps", "steps": "max-steps",
}  # fmt: skip

Parsed = TypeVar("Parsed")


class Flag(NamedTuple):
    """An option of a command line."""

    hint: Any
    """Its type, with bounds."""
    default: Any
    """``dataclasses.MISSING`` if the option is required."""
    help: str
    """The docstring of the field, in one line."""

    @property
    def takes_no_value(self) -> bool:
        return plain_type(self.hint) is bool

    @property
    def choices(self) -> tuple[Any, ...]:
        kind = plain_type(self.hint)
        return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()

    @property
    def takes_several(self) -> bool:
        return typing.get_origin(plain_type(self.hint)) in (tuple, list)

    def needed(self) -> str:
        """Return what the value must be, such as "an integer, at least 1"."""
        bounds = bounds_of(self.hint)
        return needed_for(self.hint) + (f", {bounds}" if bounds else "")


def fields_of(options: Any) -> dict[str, Flag]:
    """Return the type, default and docstring of each field of a dataclass, by its name.

    Args:
        options: the class, or an instance, whose values are the defaults.
    """
    kind = options if isinstance(options, type) else type(options)
    hints, documents = typing.get_type_hints(kind, include_extras=True), _field_docs(kind)
    found = {}
    for field in dataclasses.fields(kind):
        default = field.default
        if not isinstance(options, type):
            default = getattr(options, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Flag(hints[field.name], default, documents.get(field.name, ""))
    return found


def flags_of(options: Any, section: str = "") -> dict[str, Flag]:
    """Return the flags of a dataclass, such as ``--train.epochs``, in its order.

    Args:
        options: the class, or an instance, whose values are the defaults.
        section: prefix of the names, such as ``train``.
    """
    found: dict[str, Flag] = {}
    for key, flag in fields_of(options).items():
        if is_positional(flag) or (not section and key == "plugins"):
            continue  # take_plugins() reads --plugin
        name, default = ".".join(filter(None, [section, key.replace("_", "-")])), flag.default
        if isinstance(default, Mapping):  # networks; take_model_options() reads options of models
            for network, part in default.items():
                if dataclasses.is_dataclass(part):
                    found |= flags_of(part, f"{name}.{network.replace('_', '-')}")
        elif dataclasses.is_dataclass(default) and not isinstance(default, type):
            found |= flags_of(default, section if key == "config" else name)
        else:
            found[f"--{name}"] = flag
    return found


def is_positional(flag: Flag) -> bool:
    """Return whether an option is an argument without a flag."""
    hint = flag.hint
    return typing.get_origin(hint) is Annotated and tyro.conf.Positional in hint.__metadata__


@cache
def _field_docs(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and its parents."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            body: Any = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except (OSError, SyntaxError):  # the source of a plugin cannot be read
            continue
        for field, text in zip(body.body, body.body[1:], strict=False):
            documented = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and documented:
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def is_option(argument: str) -> bool:
    """Return whether an argument is a flag, not a value such as -1."""
    return argument.startswith("-") and re.fullmatch(r"-(\d|\.\d|inf).*", argument) is None


def check_flags(
    prog: str, given: list[str], flags: Mapping[str, Flag], most: int | None
) -> list[str]:
    """Check the names of the flags of a command line, and the type and bounds of their values.

    Args:
        most: maximum number of arguments without a flag. None: no limit.

    Returns:
        The arguments without a flag.

    Raises:
        UsageError: a flag does not exist, a value is missing, has the wrong type or is out of
            bounds, or there are too many arguments without a flag.
    """
    free: list[str] = []
    for argument, values in _split(given):
        if argument is not None and argument not in ("-h", "--help", "--help-all"):
            typed, equals, value = argument.partition("=")
            flag = find_flag(typed, flags, prog)
            taken = check_values(typed, [value, *values] if equals else values, flag, equals != "")
            values = values[max(0, taken - len(equals)) :]
        free += values
    if most is not None and len(free) > most:
        unexpected = f"unexpected argument {shown(free[most])}"
        raise UsageError(f"{unexpected}: {prog} --help lists the arguments")
    return free


def _split(given: list[str]) -> Iterator[tuple[str | None, list[str]]]:
    """Yield each flag with the values that follow it. The first item has no flag."""
    rest = list(given)
    flag: str | None = None
    while True:
        values = list(itertools.takewhile(lambda argument: not is_option(argument), rest))
        yield flag, values
        rest = rest[len(values) :]
        if not rest:
            return
        flag, rest = rest[0], rest[1:]


def check_values(typed: str, values: list[str], flag: Flag, joined: bool = False) -> int:
    """Check the values of a flag.

    Args:
        joined: the first value was written after ``=``.

    Returns:
        The number of values that belong to the flag.
    """
    if flag.takes_no_value:
        if joined or (values and values[0].lower() in ("true", "false", "yes", "no", "0", "1")):
            head, dot, last = typed.rpartition(".")
            off = f" or {head}.no-{last}" if dot and not last.startswith("no-") else ""
            raise UsageError(f"{typed} takes no value, got {shown(values[0])}: pass {typed}{off}")
        return 0
    if flag.takes_several:
        _check_several(typed, values, flag)
        return len(values)
    if not values:
        raise UsageError(f"{typed} needs a value: {flag.needed()}")
    check_text(typed, values[0], flag)
    return 1


def _check_several(typed: str, values: list[str], flag: Flag) -> None:
    """Check the values of a tuple, or of a tuple of tuples."""
    if values == ["None"] and type(None) in typing.get_args(flag.hint):
        return
    kinds = typing.get_args(plain_type(flag.hint))
    needed = needed_for(flag.hint).removeprefix("an array of ")
    any_number = Ellipsis in kinds
    items = list(kinds[:1] if any_number else kinds)
    if typing.get_origin(plain_type(items[0])) is tuple:
        items = list(typing.get_args(plain_type(items[0])))
        needed = f"groups of {needed.removeprefix('arrays of ')}"
    if len(values) % len(items) or (not any_number and len(values) != len(items)):
        raise UsageError(f"{typed} must be {needed}, got {shown(' '.join(values))}")
    for value, item in zip(values, itertools.cycle(items)):
        check_text(typed, value, Flag(item, None, ""), needed)


def check_text(typed: str, text: str, flag: Flag, needed: str | None = None) -> None:
    """Raise ``UsageError`` if a text is not a valid value of the flag that was typed."""
    kind = plain_type(flag.hint)
    optional = type(None) in typing.get_args(flag.hint)
    if optional and text == "None":
        return
    try:
        if flag.choices:
            fits = text in map(str, flag.choices)
        else:
            number = kind(text) if kind in (int, float) else None
            fits = True
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(f"{typed} must be {needed or flag.needed()}, got {shown(text)}")
    if not flag.choices and number is not None:
        check_value(typed, number, flag.hint)


def find_flag(typed: str, flags: Mapping[str, Flag], prog: str) -> Flag:
    """Return the flag that was typed. Raise ``UsageError`` with the nearest flag if none exists."""
    name = typed.replace("_", "-")
    head, dot, last = name.rpartition(".")
    positive = f"{head}{dot}{last.removeprefix('no-')}" if dot else name.replace("--no-", "--", 1)
    for known in (name, positive):
        if known in flags and (known == name or flags[known].takes_no_value):
            return flags[known]
    raise UsageError(f"unknown option {shown(typed)}: {_nearest(name, flags, prog)}")


def _nearest(name: str, flags: Mapping[str, Flag], prog: str) -> str:
    """Return a hint for an unknown flag."""
    bare = name.lstrip("-")
    synonym = f"--{SYNONYMS.get(bare.lower(), '')}"
    by_last: dict[str, list[str]] = {}
    for known in flags:
        by_last.setdefault(known.lstrip("-").rpartition(".")[2], []).append(known)
    last = bare.rpartition(".")[2]
    if synonym in flags:
        close = [synonym]
    elif last in by_last:
        close = by_last[last][:3]
    elif not (close := get_close_matches(name, flags, n=1, cutoff=0.75)):
        near = get_close_matches(last, by_last, n=1, cutoff=0.6)
        close = by_last[near[0]][:3] if near else get_close_matches(name, flags, n=1, cutoff=0.6)
    everything = "--help-all" if "--train.epochs" in flags else "--help"
    listing = f"{prog} {everything} lists all options"
    return f"did you mean {' or '.join(close)}? {listing}" if close else listing


def parse(kind: type[Parsed], prog: str, given: list[str]) -> Parsed:
    """Parse the command line of a command without a recipe.

    Raises:
        UsageError: a flag or value is wrong, or a required argument is missing.
        SystemExit: tyro has printed the help.
    """
    if not {"-h", "--help"} & set(given):
        flags, positionals = flags_of(kind), positionals_of(kind)
        command = prog.removeprefix("bdkd ")
        several = any(flag.takes_several for flag in positionals.values())
        free = check_flags(prog, given, flags, None if several else len(positionals))
        typed = {argument.partition("=")[0].replace("_", "-") for argument in given}
        for name, flag in flags.items():
            if flag.default is dataclasses.MISSING and name not in typed:
                raise UsageError(f"{command} needs {name}: {flag.needed()}")
        for number, (name, flag) in enumerate(positionals.items()):
            if number < len(free):
                check_text(name, free[number], flag)
            elif flag.default is dataclasses.MISSING and not flag.takes_several:
                what = flag.help.rstrip(".").split(". ")[0]
                raise UsageError(f"{command} needs {name}: {what[0].lower()}{what[1:]}")
    return tyro.cli(kind, prog=prog, args=given)


def positionals_of(kind: type) -> dict[str, Flag]:
    """Return the arguments without a flag by the names that the help shows."""
    found = {}
    for key, flag in fields_of(kind).items():
        if is_positional(flag):
            names = (getattr(mark, "metavar", None) for mark in flag.hint.__metadata__)
            name = next(filter(None, names), key.upper())
            found[name] = flag._replace(hint=flag.hint.__origin__, help=flag.help or name)
    return found
