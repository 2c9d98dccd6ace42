"""``bdkd data``: data sets, brought here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdkd.config import nearest
from bdkd.errors import UsageError

ACTIONS = {"fetch": "download a data set, check its hash and unpack it"}


@dataclass(frozen=True)
class Fetch:
    """Download a data set from its original host, check its SHA-256 and unpack it. A download that
    was interrupted goes on where it stopped."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """cifar10 (0.2 GB), cifar100 (0.2 GB) or tiny-imagenet (0.2 GB)."""
    to: Path
    """Folder to put it in; a recipe's data.root names the same."""


def run(given: list[str]) -> None:
    """Dispatch to an action."""
    if not given or given[0] in ("-h", "--help"):
        lines = [f"  {name}  {what}" for name, what in ACTIONS.items()]
        print("\n".join(["usage: bdkd data ACTION [options]", "", *lines]))
        return
    action, *rest = given
    if action not in ACTIONS:
        raise UsageError(f"unknown action {action!r}: {nearest(action, list(ACTIONS))}")
    fetch(rest)


def fetch(given: list[str]) -> None:
    """``bdkd data fetch NAME --to DIR``."""
    arguments = tyro.cli(Fetch, prog="bdkd data fetch", args=given)

    from bdkd.data import fetch as fetching

    folder = fetching.fetch(arguments.name, arguments.to.expanduser())
    print(f"{arguments.name} is in {folder}: train with --data.root {arguments.to}")
