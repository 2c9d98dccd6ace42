"""Decode every image of a data set once, to find the bad ones before a training does."""

import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bdkd.data.decode import UndecodableError, decode_rgb, open_image
from bdkd.data.imagenet.archives import damaged_records
from bdkd.data.imagenet.index import Index, Item
from bdkd.data.imagenet.layout import find
from bdkd.data.imagenet.loader import processors
from bdkd.data.imagenet.pillow import leave_signals_to_the_parent, worker_context
from bdkd.errors import RunError

CHUNK = 32  # images of a task


@dataclass
class Report:
    """The contents of a data set."""

    classes: tuple[str, ...]
    counts: dict[str, np.ndarray]
    """Images of each class, ``(classes,)``, by split."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Readable images by file format and mode (JPEG RGB, JPEG CMYK, ...)."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Images that cannot be decoded: the identity for ``data.exclude``, and the reason."""

    @property
    def images(self) -> int:
        return int(sum(counts.sum() for counts in self.counts.values()))

    @property
    def lacking(self) -> list[str]:
        """Classes with fewer than two training images, or without validation images."""
        few = (self.counts["train"] < 2) | (self.counts["val"] < 1)
        return [self.classes[label] for label in np.flatnonzero(few)]


def check(root: Path, format: str, workers: int | None = None) -> Report:
    """Decode every image in ``workers`` processes (default: one for each processor). If standard
    error is a terminal, a progress bar is shown.

    Raises:
        RunError: there is no data set, Pillow is missing, or a process was killed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise RunError("image files need Pillow: pip install 'bdkd[imagenet]'") from error
    found = find(root, format, fresh=True)
    splits = {"train": found.train, "val": found.val}
    report = Report(
        found.classes,
        {
            name: np.bincount(index.labels, minlength=len(found.classes))
            for name, index in splits.items()
        },
    )
    with tqdm(
        total=report.images, unit="image", disable=not sys.stderr.isatty(), dynamic_ncols=True
    ) as bar:
        for index in splits.values():
            for identity, kind, reason in _examined(
                index, workers or processors(), format == "tfrecord"
            ):
                bar.update()
                if reason:
                    report.bad.append((identity, reason))
                else:
                    report.kinds[kind] += 1
    return report


def _examined(index: Index, workers: int, records: bool) -> Iterator[tuple[str, str, str]]:
    """Iterate over identity, kind, and reason of bad images, in their order. With ``records``, the
    checksums of TFRecords are verified too."""
    chunks = (range(i, min(i + CHUNK, len(index))) for i in range(0, len(index), CHUNK))
    waiting: deque[tuple[range, Future[list[tuple[str, str]]]]] = deque()
    damaged: dict[int, Future[dict[str, str]]] = {}  # of a TFRecord file
    pool = ProcessPoolExecutor(
        workers,
        mp_context=worker_context(),
        initializer=leave_signals_to_the_parent,
        initargs=(0,),
    )

    def answers() -> Iterator[tuple[str, str, str]]:
        chunk, future = waiting.popleft()
        for i, (kind, reason) in zip(chunk, future.result(), strict=True):
            identity = index.identity(i)
            if records:
                name = identity.rpartition("#")[2]
                reason = damaged[index.container[i]].result().get(name) or reason
            yield identity, kind, reason

    try:
        for chunk in chunks:
            for number in {*index.container[chunk]} - {*damaged} if records else ():
                path = index.root / index.containers[number]
                damaged[number] = pool.submit(damaged_records, path)
            waiting.append((chunk, pool.submit(examine, [index.item(i) for i in chunk])))
            if len(waiting) > 4 * workers:
                yield from answers()
        while waiting:
            yield from answers()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that decoded images was killed, perhaps for lack of memory: run the check "
            "again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def examine(items: Sequence[Item]) -> list[tuple[str, str]]:
    """Return the kind of each image (format and mode), and the reason why it is bad, if it is.

    Both loaders read every image that passes: see :func:`bdkd.data.imagenet.dali.prepared`.
    """
    answers = []
    for item in items:
        try:
            content = item.read()
            decode_rgb(content)
            with open_image(content) as image:
                answers.append((f"{image.format} {image.mode}", ""))
        except (RunError, UndecodableError) as error:
            answers.append(("", str(error)))
    return answers


def write_list(report: Report, root: Path, to: Path) -> None:
    """Write the bad images, one a line, as ``data.exclude`` reads them. The file is replaced at
    once, so it is never incomplete."""
    lines = [f"# bdkd data check {root}: {len(report.bad)} of {report.images} images"]
    lines += [f"{identity}\t{reason}" for identity, reason in report.bad]
    beside = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        beside.write_text("\n".join(lines) + "\n", "utf-8", "surrogateescape")
        beside.replace(to)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunError(f"cannot write {to}: {error.strerror}") from error
