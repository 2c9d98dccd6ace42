"""``bdkd data``: list the data sources, download a data set, or check one."""

import json as jsonlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bdkd.bounds import Count
from bdkd.cli.flags import parse
from bdkd.config import nearest
from bdkd.errors import RunError, UsageError
from bdkd.text import expand_user

ACTIONS = {
    "list": "show every data source, whether it is ready here, and the command that trains on it",
    "fetch": "download a data set and check its hash",
    "check": "count the images of a data set, and list those that cannot be decoded",
}
SHOWN = 10  # maximum number of bad files to print; the written list contains all of them


@dataclass(frozen=True)
class List:
    """Show every data source: what it reads, whether it is ready here, and the command that trains
    on it."""

    root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROOT")] = Path("data")
    """Folder to look for data sets in."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON array with an object for each source."""


@dataclass(frozen=True)
class Fetch:
    """Download a data set from its original host, check its SHA-256 and unpack it if it is an
    archive. An interrupted download is resumed."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """cifar10 (0.2 GB), cifar100 (0.2 GB), tiny-imagenet (0.2 GB) or fashion-mnist (0.03 GB)."""
    to: Path
    """Folder of the data set: the data.root of a recipe."""


@dataclass(frozen=True)
class Check:
    """Count classes and images, and decode every image, in parallel. Write a list of the images
    that cannot be decoded. --data.exclude leaves them out of training. Exit with 1 if there are
    such images, or if a class has too few images.

    ROOT accepts everything that data.root of the source images accepts: a folder with
    train/CLASS/*.jpg and test/CLASS/*.jpg (or val/), a flat folder with CLASS/*.jpg, a folder of
    webdataset shards or TFRecords, a .parquet file or a folder of them, or hf:NAME."""

    root: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROOT")]
    """The data set: the data.root of a recipe."""
    format: Literal["auto", "folder", "webdataset", "tfrecord", "hf"] = "auto"
    """Format of the data set: the data.format of a recipe."""
    workers: Count | None = None
    """Number of decoding processes. Default: one for each processor."""
    to: Path = Path("bad-files.txt")
    """File to write the list to."""
    image_column: str | None = None
    """Image column of a Hugging Face data set, if there are several."""
    label_column: str | None = None
    """Label column of a Hugging Face data set, if there are several."""


def run(given: list[str]) -> None:
    """Run an action."""
    if not given or given[0] in ("-h", "--help"):
        print("usage: bdkd data ACTION [options]\n")
        print("\n".join(f"  {name:5}  {what}" for name, what in ACTIONS.items()))
        return
    action, *rest = given
    if action not in ACTIONS:
        raise UsageError(f"unknown action {action!r}: {nearest(action, list(ACTIONS))}")
    {"list": list_sources, "fetch": fetch, "check": check}[action](rest)


def list_sources(given: list[str]) -> None:
    """``bdkd data list [ROOT]``."""
    arguments = parse(List, "bdkd data list", given)

    from bdkd.data.catalog import listed_sources

    sources = listed_sources(expand_user(arguments.root, "ROOT"))
    if arguments.json:
        print(jsonlib.dumps([source._asdict() for source in sources], indent=2))
        return
    for source in sources:
        size = "" if source.download_bytes is None else f" ({source.download_bytes / 1e9:.1g} GB)"
        print(f"{source.name}: {source.reads or 'a source of a plugin'}{size}")
        print(f"    {'ready' if source.ready else 'not ready: ' + source.missing}")
        print(f"    {source.command}")


def fetch(given: list[str]) -> None:
    """``bdkd data fetch NAME --to DIR``."""
    arguments = parse(Fetch, "bdkd data fetch", given)

    from bdkd.data import fetch as fetching

    folder = fetching.fetch(arguments.name, expand_user(arguments.to, "--to"))
    options = f"--data.source {arguments.name} --data.root {arguments.to}"
    print(f"{arguments.name} is in {folder}: train with {options}")


def check(given: list[str]) -> None:
    """``bdkd data check ROOT``."""
    arguments = parse(Check, "bdkd data check", given)

    from bdkd.data.images import check as checking

    to = expand_user(arguments.to, "--to")
    expand_user(Path(arguments.root.removeprefix("hf:")), "ROOT")  # so that a message names ROOT
    report = checking.check(
        arguments.root, arguments.format, arguments.workers, arguments.image_column,
        arguments.label_column,
    )  # fmt: skip
    for split, counts in report.counts.items():
        span = f"{counts.min():,} to {counts.max():,} in a class"
        print(f"{split:6} {counts.sum():,} images of {(counts > 0).sum():,} classes, {span}")
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.most_common())
    print(f"kinds  {kinds or 'none'}")
    for identity, reason in report.bad[:SHOWN]:
        # Names that are not UTF-8 cannot be printed unchanged.
        print(f"bad    {identity}: {reason}".encode("utf-8", "backslashreplace").decode())
    if len(report.bad) > SHOWN:
        print(f"bad    and {len(report.bad) - SHOWN:,} more")
    if report.bad or to.exists():  # replace an outdated list
        checking.write_list(report, arguments.root, to)
    problems = []
    if report.bad:
        found = f"{len(report.bad):,} of {report.images:,} images cannot be decoded, listed in {to}"
        problems.append(f"{found}: fetch them again, or train with --data.exclude {to}")
    if lacking := report.lacking:
        named = ", ".join(lacking[:5]) + (" ..." if len(lacking) > 5 else "")
        have = "class has" if len(lacking) == 1 else "classes have"
        problem = f"{have} {report.too_few}"
        problems.append(f"{len(lacking):,} {problem} ({named})")
    if problems:
        raise RunError("; ".join(problems))
    print("good   every image can be decoded")
