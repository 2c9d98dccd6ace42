"""Registries: objectives, data sources, optimizers, models and metrics by name.

Each registry imports the package with the built-in entries, and the plugins, when it is first read.
Both register their entries with the decorators ``bdkd.register_*``.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from types import NoneType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from bdkd.errors import UsageError
from bdkd.plugins import load_installed

# Names become values in TOML files, options and folders.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Item = TypeVar("Item")
Build = TypeVar("Build", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """An objective, data source or optimizer, which a recipe selects by name."""

    build: Callable[..., Any]
    """The class or function."""
    config: type[Any]
    """Dataclass of its options. The first field is the name."""


class Registry(Mapping[str, Item], Generic[Item]):
    """The items of one kind by name, in the order in which they were registered."""

    def __init__(self, kind: str, module: str) -> None:
        self.kind, self.module = kind, module
        self._items: dict[str, Item] = {}
        self._owners: dict[str, tuple[str, str]] = {}

    def load(self) -> None:
        """Import the built-in items and the installed plugins."""
        import_module(self.module)
        load_installed()

    def check_name(self, name: object) -> None:
        """Raise ``TypeError`` or ``ValueError`` unless ``name`` is a string of letters, digits, -,
        _ and . characters. A decorator calls this first, because a user may forget its
        arguments."""
        if not isinstance(name, str):
            raise TypeError(
                f"the name of the {self.kind} must be a string, got {name!r}: call the decorator "
                "with the name"
            )
        if not NAME.fullmatch(name):
            raise ValueError(
                f"the name of the {self.kind} must be letters, digits, -, _ and ., got {name!r}"
            )

    def add(self, name: str, item: Item, made_by: Any) -> None:
        """Register an item.

        Args:
            made_by: the class or function. The same class or function may be registered again, for
                example by a notebook cell that is run twice.

        Raises:
            TypeError, ValueError: see :meth:`check_name`; or another item has this name.
        """
        self.check_name(name)
        owner = (made_by.__module__, getattr(made_by, "__qualname__", repr(made_by)))
        if self._owners.setdefault(name, owner) != owner:
            first = ".".join(self._owners[name])
            raise ValueError(
                f"the {self.kind} {name!r} is registered by {first} and by {'.'.join(owner)}: "
                "choose another name"
            )
        self._items[name] = item

    def is_foreign(self, name: str) -> bool:
        """Return whether a plugin registered an item."""
        return self._owners[name][0].partition(".")[0] != "bdkd"

    def find(self, name: str) -> Item:
        """Return an item, or raise ``UsageError`` with the nearest name."""
        if name not in self:
            hint = nearest(name, list(self))
            raise UsageError(
                f"unknown {self.kind} {name!r}: {hint} (--plugin MODULE adds the names of a plugin)"
            )
        return self._items[name]

    def __getitem__(self, name: str) -> Item:
        self.load()
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        self.load()
        return iter(self._items)

    def __len__(self) -> int:
        self.load()
        return len(self._items)


class Selection(Registry[Entry]):
    """A registry whose items have options. ``section`` is the section of a recipe, and ``key`` is
    the option that contains the name."""

    def __init__(self, kind: str, module: str, section: str, key: str = "name") -> None:
        super().__init__(kind, module)
        self.section, self.key = section, key

    def decorator(
        self, name: str, config: type, base: type, entry: Callable[..., Entry] = Entry, **facts: Any
    ) -> Callable[[Build], Build]:
        """Return a decorator that registers a class or function.

        Args:
            config: dataclass with the options, which extends ``base``.
            entry: called with the class or function, ``config`` and ``facts``.

        Raises:
            TypeError, ValueError: see :meth:`add`; or ``config`` is not usable.
        """
        self.check_name(name)
        self._check_config(name, config, base)

        def add(build: Build) -> Build:
            self.add(name, entry(build, config, **facts), build)
            return build

        return add

    def _check_config(self, name: str, config: Any, base: type) -> None:
        if not isinstance(config, type) or not issubclass(config, base):
            raise TypeError(
                f"the options of the {self.kind} {name!r} must be a subclass of {base.__name__}, "
                f"got {config!r}"
            )
        if "__dataclass_fields__" not in vars(config):
            raise TypeError(
                f"{config.__name__}, the options of the {self.kind} {name!r}, must be a dataclass: "
                "decorate it with @dataclass(frozen=True)"
            )
        options: Any = config
        hints = get_type_hints(options)
        for field in fields(options)[1:]:  # the first is the name
            option, hint = f"{config.__name__}.{field.name}", hints[field.name]
            if field.default is MISSING:
                raise TypeError(f"{option} must have a default value, not a default_factory")
            if not isinstance(field.default, bool | int | float | str | tuple | None):
                raise TypeError(
                    f"{option} must default to a number, a string, a tuple or None, which TOML can "
                    f"hold, got {field.default!r}"
                )
            if field.default is not None and NoneType in get_args(hint):
                raise TypeError(f"{option} must have the default None, because TOML has no None")

    def configure(self, name: str, **options: Any) -> Any:
        """Return the options of an item. Options that are not given have their defaults."""
        return self.find(name).config(name, **options)


def nearest(name: str, known: list[str]) -> str:
    """Return a hint for an unknown name: the nearest known name, or all of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


OBJECTIVES = Selection("objective", "bdkd.objectives", "objective")
SOURCES = Selection("data source", "bdkd.data", "data", "source")
OPTIMIZERS = Selection("optimizer", "bdkd.engine.optim", "optimizer")
SELECTIONS = (SOURCES, OBJECTIVES, OPTIMIZERS)
