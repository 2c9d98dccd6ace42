"""Images a second and core that the ImageNet loaders decode and augment on the CPU, DALI and Pillow
in turn: ``python bench/data_imagenet.py [--images 256] [--rounds 5]``.

500x375 JPEGs of quality 90 made of scikit-learn's photographs, read from a file each: a random
resized crop to 224, mirrored, normalised, channels-last float32. One thread decodes in either
loader; processor time of the whole process is counted, so that neighbours on the machine matter
less, and wall time is printed beside it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from bdkd.config import DataConfig
from bdkd.data import DataSource, create_source

HEIGHT, WIDTH = 375, 500
BATCH = 64


def make_images(root: Path, count: int) -> None:
    """Two classes of crops, and two images a class to test on."""
    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    for split, images in (("train", count), ("val", 4)):
        for number in range(images):
            whole = photographs[number % 2]
            top = rng.integers(whole.shape[0] - HEIGHT + 1)
            left = rng.integers(whole.shape[1] - WIDTH + 1)
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.ascontiguousarray(whole[top : top + HEIGHT, left : left + WIDTH])
            Image.fromarray(pixels).save(folder / f"{number}.JPEG", quality=90)


def epoch(source: DataSource, number: int) -> tuple[float, float]:
    """Images a second of processor time, and of wall time."""
    processor, wall, images = time.process_time(), time.perf_counter(), 0
    for batch in source.train_batches(number, 0, BATCH, 1):
        images += len(batch.target)
    return images / (time.process_time() - processor), images / (time.perf_counter() - wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="JPEGs (256)")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loader (5)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates: dict[str, list[tuple[float, float]]] = {"dali": [], "pillow": []}
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), options.images)
        sources = {
            # Pillow in this process, so that its time is counted too.
            loader: create_source(
                DataConfig(
                    source="imagenet", root=folder, loader=loader, flip=True, validation=0.0,
                    workers=1 if loader == "dali" else 0,
                ),
                0, torch.device("cpu"), torch.channels_last,
            )
            for loader in ("dali", "pillow")
        }  # fmt: skip
        for number in range(-1, options.rounds):
            for loader, source in sources.items():
                found = epoch(source, max(number, 0))
                if number >= 0:  # the first one warms up
                    rates[loader].append(found)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {options.rounds} rounds of "
          f"{options.images // BATCH * BATCH} images of {WIDTH}x{HEIGHT}")  # fmt: skip
    print("loader  images/s a core: median (least, most)   images/s of wall time")
    for loader, found in rates.items():
        core, wall = zip(*found, strict=True)
        print(f"{loader:6}  {statistics.median(core):21.0f} ({min(core):.0f}, {max(core):.0f})"
              f"   {statistics.median(wall):21.0f}")  # fmt: skip
    ratio = statistics.median(a[0] / b[0] for a, b in zip(*rates.values(), strict=True))
    print(f"dali / pillow, a core: {ratio:.2f}")


if __name__ == "__main__":
    main()
