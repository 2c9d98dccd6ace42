"""Decode every image of a data set once, to find damaged images before training."""

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

from bdkd.data.decode import UndecodableError, decode_rgb, open_image, require_pillow
from bdkd.data.image_warnings import shown
from bdkd.data.imagenet.archives import damaged_records
from bdkd.data.imagenet.index import Index, Item
from bdkd.data.imagenet.loader import processors
from bdkd.data.imagenet.pillow import leave_signals_to_the_parent, worker_context
from bdkd.data.images.formats import find_images
from bdkd.errors import RunError

CHUNK = 32  # images per task


@dataclass
class Report:
    """The contents of a data set."""

    classes: tuple[str, ...]
    counts: dict[str, np.ndarray]  # images per class, (classes,), by split
    train: str = "train"  # name of the split of training images
    test: str | None = "val"  # None: test images are held out of the training images
    kinds: Counter[str] = field(default_factory=Counter)  # readable images by format and mode
    bad: list[tuple[str, str]] = field(default_factory=list)  # identity for data.exclude, reason

    @property
    def images(self) -> int:
        return int(sum(counts.sum() for counts in self.counts.values()))

    @property
    def too_few(self) -> str:
        """Return why the classes in :attr:`lacking` cannot be used."""
        if self.test is None:
            return "fewer than 3 images (1 to train, 1 for validation, 1 to test)"
        return f"fewer than 2 training images or none in {self.test}"

    @property
    def lacking(self) -> list[str]:
        """Return the classes with too few images to train, validate and test."""
        few = self.counts[self.train] < (3 if self.test is None else 2)
        if self.test is not None:
            few |= self.counts[self.test] < 1
        return [self.classes[label] for label in np.flatnonzero(few)]


def check(
    root: str | Path, format: str = "auto", workers: int | None = None,
    image_column: str | None = None, label_column: str | None = None,
) -> Report:  # fmt: skip
    """Decode every image, with a progress bar if standard error is a terminal.

    Args:
        root, format, image_column, label_column: see
            :func:`bdkd.data.images.formats.find_images`.
        workers: number of processes. Default: one for each processor.

    Raises:
        RunError: there is no data set, Pillow is missing, or a process was killed.
    """
    require_pillow()
    found = find_images(str(root), format, image_column, label_column, fresh=True)
    names = found.names
    splits = {names[role]: index for role, index in found.indices.items()}
    classes = len(found.classes)
    counts = {name: np.bincount(i.labels, minlength=classes) for name, i in splits.items()}
    report = Report(found.classes, counts, names["train"], names.get("test"))
    workers = workers or processors()
    with tqdm(
        total=report.images, unit="image", disable=not sys.stderr.isatty(), dynamic_ncols=True
    ) as bar:
        for index in splits.values():
            for identity, kind, reason in _examined(index, workers, found.records):
                bar.update()
                if reason:
                    report.bad.append((identity, reason))
                else:
                    report.kinds[kind] += 1
    return report


def _examined(index: Index, workers: int, records: bool) -> Iterator[tuple[str, str, str]]:
    """Iterate over (identity, kind, error or "") of the images in order. With ``records``, also
    verify the checksums of TFRecords."""
    chunks = (range(i, min(i + CHUNK, len(index))) for i in range(0, len(index), CHUNK))
    waiting: deque[tuple[range, Future[list[tuple[str, str]]]]] = deque()
    damaged: dict[int, Future[dict[str, str]]] = {}  # by TFRecord file
    pool = ProcessPoolExecutor(workers, worker_context(), leave_signals_to_the_parent, (0,))

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
    """Return (format and mode, "") for each image that both loaders can decode, and ("", reason)
    for each other image."""
    answers = []
    for item in items:
        try:
            with shown(str(item)):
                content = item.read()
                decode_rgb(content)
                with open_image(content) as image:
                    answers.append((f"{image.format} {image.mode}", ""))
        except (RunError, UndecodableError) as error:
            answers.append(("", str(error)))
    return answers


def write_list(report: Report, root: str | Path, to: Path) -> None:
    """Write the bad images in the format of ``data.exclude``, one per line. The file is replaced
    atomically."""
    lines = [f"# bdkd data check {root}: {len(report.bad)} of {report.images} images"]
    lines += [f"{identity}\t{reason}" for identity, reason in report.bad]
    temporary = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        temporary.write_text("\n".join(lines) + "\n", "utf-8", "surrogateescape")
        temporary.replace(to)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {to}: {error.strerror}") from error
