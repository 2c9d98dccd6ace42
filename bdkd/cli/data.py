"""``bdkd data``: download a data set, or check one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bdkd.config import nearest
from bdkd.errors import RunError, UsageError
from bdkd.text import expand_user

ACTIONS = {
    "fetch": "download a data set, check its hash and unpack it",
    "check": "count the images of an ImageNet-like data set, and list those that cannot be decoded",
}
SHOWN = 10  # number of bad files to print; the list contains all of them


@dataclass(frozen=True)
class Fetch:
    """Download a data set from its original host, check its SHA-256 and unpack it. An interrupted
    download is resumed."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """cifar10 (0.2 GB), cifar100 (0.2 GB) or tiny-imagenet (0.2 GB)."""
    to: Path
    """Folder of the data set: the data.root of a recipe."""


@dataclass(frozen=True)
class Check:
    """Count classes and images, and decode every image, in parallel. Write a list of the images
    that cannot be decoded. --data.exclude leaves them out of training. Exit with 1 if there are
    such images, or if a class has too few images."""

    root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROOT")]
    """Folder of the data set: the data.root of a recipe."""
    format: Literal["folder", "webdataset", "tfrecord"] = "folder"
    """Format of the data set: the data.format of a recipe."""
    workers: int | None = None
    """Number of decoding processes. Default: one for each processor."""
    to: Path = Path("bad-files.txt")
    """File to write the list to."""


def run(given: list[str]) -> None:
    """Run an action."""
    if not given or given[0] in ("-h", "--help"):
        print("usage: bdkd data ACTION [options]\n")
        print("\n".join(f"  {name:5}  {what}" for name, what in ACTIONS.items()))
        return
    action, *rest = given
    if action not in ACTIONS:
        raise UsageError(f"unknown action {action!r}: {nearest(action, list(ACTIONS))}")
    {"fetch": fetch, "check": check}[action](rest)


def fetch(given: list[str]) -> None:
    """``bdkd data fetch NAME --to DIR``."""
    arguments = tyro.cli(Fetch, prog="bdkd data fetch", args=given)

    from bdkd.data import fetch as fetching

    folder = fetching.fetch(arguments.name, expand_user(arguments.to, "--to"))
    print(f"{arguments.name} is in {folder}: train with --data.root {arguments.to}")


def check(given: list[str]) -> None:
    """``bdkd data check ROOT``."""
    arguments = tyro.cli(Check, prog="bdkd data check", args=given)
    if arguments.workers is not None and arguments.workers < 1:
        raise UsageError(f"--workers must be at least 1, got {arguments.workers}")

    from bdkd.data.imagenet import check as checking

    root, to = expand_user(arguments.root, "ROOT"), expand_user(arguments.to, "--to")
    report = checking.check(root, arguments.format, arguments.workers)
    for split, counts in report.counts.items():
        span = f"{counts.min():,} to {counts.max():,} in a class"
        print(f"{split:5}  {counts.sum():,} images of {(counts > 0).sum():,} classes, {span}")
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.most_common())
    print(f"kinds  {kinds or 'none'}")
    for identity, reason in report.bad[:SHOWN]:
        # Names that are not UTF-8 cannot be printed unchanged.
        print(f"bad    {identity}: {reason}".encode("utf-8", "backslashreplace").decode())
    if len(report.bad) > SHOWN:
        print(f"bad    and {len(report.bad) - SHOWN:,} more")
    if report.bad or to.exists():  # replace an outdated list
        checking.write_list(report, root, to)
    problems = []
    if report.bad:
        found = f"{len(report.bad):,} of {report.images:,} images cannot be decoded, listed in {to}"
        problems.append(f"{found}: fetch them again, or train with --data.exclude {to}")
    if lacking := report.lacking:
        named = ", ".join(lacking[:5]) + (" ..." if len(lacking) > 5 else "")
        have = "class has" if len(lacking) == 1 else "classes have"
        problem = f"{have} fewer than 2 training images or none in val"
        problems.append(f"{len(lacking):,} {problem} ({named})")
    if problems:
        raise RunError("; ".join(problems))
    print("good   every image can be decoded")
