"""Measure the speed of the ImageNet loaders, or the time to index the images at the start of a run.

    python bench/data_imagenet.py [--images 256] [--rounds 5]   # images per second and CPU core
    python bench/data_imagenet.py --index 40000                 # seconds to index 40,000 images

The first command decodes and augments with DALI and with Pillow in turn. The images are 500x375
JPEGs of quality 90, made of scikit-learn's photographs, one per file. Each gets a random resized
crop to 224, a random flip and normalisation, as channels-last float32. Each loader decodes in one
thread. The main result is processor time of the whole process, because other processes affect it
less than wall time. Wall time is printed too.
"""

import argparse
import io
import os
import statistics
import struct
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from progress import Progress
from suite_loader import HEIGHT, WIDTH, write_jpegs

from bdkd.data import DataSource, create_source
from bdkd.data.imagenet.archives import masked_crc32c
from bdkd.data.imagenet.index import Item
from bdkd.data.imagenet.layout import find
from bdkd.data.imagenet.loader import decoded
from bdkd.registry import SOURCES

BATCH = 64
IMAGENET = 1_331_167  # images of train and val
SHARDS = 8


def epoch(source: DataSource, number: int) -> tuple[float, float]:
    """Return images per second of processor time, and of wall time."""
    processor, wall, images = time.process_time(), time.perf_counter(), 0
    for batch in source.train_batches(number, 0, BATCH, 1):
        images += len(batch.target)
    return images / (time.process_time() - processor), images / (time.perf_counter() - wall)


def decoding(images: int, rounds: int) -> None:
    rates: dict[str, list[tuple[float, float]]] = {"dali": [], "pillow": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress("data_imagenet: epoch", 2 * (rounds + 1)) as progress,
    ):
        write_jpegs(Path(folder), images)
        sources = {
            # Pillow decodes in this process, so that its processor time is counted too.
            loader: create_source(
                SOURCES.configure(
                    "imagenet", root=folder, loader=loader, flip=True, validation=0.0,
                    workers=1 if loader == "dali" else 0,
                ),
                0, torch.device("cpu"), torch.channels_last,
            )
            for loader in ("dali", "pillow")
        }  # fmt: skip
        for number in range(-1, rounds):
            for loader, source in sources.items():
                progress.start(f"{images} images by {loader}" + ", warm-up" * (number < 0))
                found = epoch(source, max(number, 0))
                if number >= 0:  # the first epoch is a warm-up
                    rates[loader].append(found)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {rounds} rounds of "
          f"{images // BATCH * BATCH} images of {WIDTH}x{HEIGHT}")  # fmt: skip
    print("loader  images/s/core: median (min, max)        images/s of wall time")
    for loader, found in rates.items():
        core, wall = zip(*found, strict=True)
        print(f"{loader:6}  {statistics.median(core):21.0f} ({min(core):.0f}, {max(core):.0f})"
              f"   {statistics.median(wall):21.0f}")  # fmt: skip
    ratio = statistics.median(a[0] / b[0] for a, b in zip(*rates.values(), strict=True))
    print(f"dali / pillow, per core: {ratio:.2f}")


def indexing(images: int) -> None:
    """Measure the time to index images in each format. Only names are read, so the images have a
    few bytes."""
    print(f"{images:,} training images, with their headers and names in the page cache")
    print(f"{'':12}   us per image, first   again   seconds for ImageNet's {IMAGENET:,}")
    formats = (("folder", _folders), ("webdataset", _tars), ("tfrecord", _records))
    progress = Progress("data_imagenet: format", len(formats))
    for format, write in formats:
        progress.start(f"{format}, writing {images:,} images")
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
            root = Path(folder, "set")
            for split, count in (("train", images), ("val", images // 25)):
                write(root, split, count)
            progress.update("indexing")
            first, again = (_seconds(lambda r=root, f=format: find(r, f)) for _ in range(2))
            each = images + images // 25
            progress.print(
                f"{format:12}  {1e6 * first / each:20.2f}  {1e6 * again / each:6.2f}   "
                f"{first / each * IMAGENET:.1f}, then {again / each * IMAGENET:.1f}"
            )
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), 2)
        file = next(Path(folder).rglob("*.JPEG"))
        content, item = file.read_bytes(), Item(str(file), "", 0, -1)
        both = [(_seconds(lambda: masked_crc32c(content)), _seconds(lambda: decoded(item)))
                for _ in range(30)]  # fmt: skip
        print(f"checksum of a record of {len(content):,} bytes: "
              f"{1e3 * statistics.median(a for a, _ in both):.2f} ms, of the time of decoding it "
              f"{statistics.median(a / b for a, b in both):.2f}")  # fmt: skip


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _folders(root: Path, split: str, images: int) -> None:
    for label in range(100):
        folder = root / split / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(images // 100):
            (folder / f"{folder.name}_{number}.JPEG").touch()


def _tars(root: Path, split: str, images: int) -> None:
    root.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(root / f"{split}-{shard:04d}.tar", "w") as tar:
            for number in range(images // SHARDS):
                for suffix, content in (("cls", b"%d" % (number % 10)), ("jpg", b"an image")):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _records(root: Path, split: str, images: int) -> None:
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def feature(name: bytes, values: bytes) -> bytes:
        return field(1, field(1, name) + field(2, values))

    root.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        with open(root / f"{split}-{shard:05d}-of-{SHARDS:05d}", "wb") as file:
            for number in range(images // SHARDS):
                image = feature(b"image/encoded", field(1, field(1, b"an image")))
                label = feature(b"image/class/label", field(3, field(1, bytes([1 + number % 10]))))
                content = field(1, image + label)
                for part in (struct.pack("<Q", len(content)), content):
                    file.write(part + struct.pack("<I", masked_crc32c(part)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="number of JPEGs")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loader")
    parser.add_argument("--index", type=int, metavar="IMAGES", help="index this many images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.index:
        indexing(options.index)
    else:
        decoding(options.images, options.rounds)


if __name__ == "__main__":
    main()
