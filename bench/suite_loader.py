"""One batch from the data loader: images in memory, and JPEG files of ImageNet's layout."""

import atexit
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from harness import Call, Case, Contender
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bdkd.config import DataConfig, SyntheticConfig
from bdkd.data import DataSource, create_source

MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)  # of ImageNet's pixels


def cases(quick: bool) -> Iterator[Case]:
    yield _in_memory(32 if quick else 128, 400 if quick else 10_000)
    if find_spec("PIL") and find_spec("sklearn"):
        # Until the process ends: a case may be run long after it was made.
        root = Path(tempfile.mkdtemp(prefix="bdkd-bench-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        write_jpegs(root, 16 if quick else 256)
        yield _jpegs(root, 4 if quick else 32, 32 if quick else 224)


def endless(epochs: Callable[[int], Iterable]) -> Call:
    """A call takes the next batch; after an epoch's last comes the next epoch's first."""
    state: dict = {"epoch": 0, "batches": iter(epochs(0))}

    def call(i: int) -> object:
        try:
            return next(state["batches"])
        except StopIteration:
            state["epoch"] += 1
            state["batches"] = iter(epochs(state["epoch"]))
            return next(state["batches"])

    return call


def _in_memory(batch: int, images: int) -> Case:
    """Crop with a padding of 4, flip, normalise: CIFAR's usual augmentation."""
    config = DataConfig(source="synthetic", synthetic=SyntheticConfig(images=images), crop=4,
                        flip=True, validation=0.0)  # fmt: skip
    source = create_source(config, 0, torch.device("cpu"), torch.channels_last)
    pixels, labels = source.splits["train"]  # type: ignore[attr-defined]  # (N, 3, 32, 32), (N,)

    class Images(Dataset):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            image = F.pad(pixels[index].float(), (4, 4, 4, 4))
            top, left = torch.randint(9, (2,)).tolist()
            image = image[:, top : top + 32, left : left + 32]
            if torch.rand(()) < 0.5:
                image = image.flip(-1)
            return (image - 128.0) / 64.0, labels[index]

    loader = DataLoader(Images(), batch, shuffle=True, drop_last=True)
    found = (
        Contender("in memory", endless(lambda e: source.train_batches(e, 0, batch, 1)), "ours",
                  note="its order and crops are a function of (seed, epoch, index)"),
        Contender("DataLoader, image by image", endless(lambda e: loader),
                  note="no workers, no order to resume from"),
    )  # fmt: skip
    name = f"{batch} of {images} images 3 x 32 x 32 in memory: crop, flip, normalise"
    return Case(name, {"batch": batch}, found)


def write_jpegs(root: Path, count: int) -> None:
    """``count`` JPEGs of 500 x 375, cut from scikit-learn's two photographs, in two classes for
    each of ``train`` and ``val``."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = random.Random(0)
    photographs = [Image.fromarray(x) for x in load_sample_images().images]
    for number in range(count):
        image = photographs[number % 2]
        left, top = rng.randrange(image.width - 500), rng.randrange(image.height - 375)
        for split in ("train", "val"):
            folder = root / split / f"n{number % 2:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            crop = image.crop((left, top, left + 500, top + 375))
            crop.save(folder / f"{number}.JPEG", quality=90)


def _jpegs(root: Path, batch: int, side: int) -> Case:
    paths = sorted((root / "train").rglob("*.JPEG"))
    found = []
    # Another package's "nvidia" may be there without this one.
    dali = bool(find_spec("nvidia") and find_spec("nvidia.dali"))
    threads = torch.get_num_threads()
    for kind in ("dali", "pillow") if dali else ("pillow",):
        config = DataConfig(source="imagenet", root=str(root), image_size=side, flip=True,
                            validation=0.0, loader=kind, workers=threads)  # fmt: skip
        source = create_source(config, 0, torch.device("cpu"), torch.channels_last)
        note = f"{threads} workers; its order and crops are a function of (seed, epoch, index)"
        call = endless(_epochs(source, batch))
        found.append(Contender(f"bdkd, {kind}", call, "ours", note=note))
    loader = DataLoader(_Pillow(paths, side), batch, shuffle=True, drop_last=True)
    found.append(
        Contender("DataLoader and Pillow", endless(lambda epoch: loader),
                  note="no workers: what one thread of Python does")
    )  # fmt: skip
    absent = {}
    if dali:
        found.append(
            Contender("DALI's own reader", endless(_dali(paths, batch, side)),
                      note=f"as its documentation has it, {threads} threads")
        )  # fmt: skip
    else:
        absent = dict.fromkeys(("bdkd, dali", "DALI's own reader"), "nvidia-dali is not installed")
    name = f"{batch} JPEGs of 500 x 375: decode, random resized crop to {side}, flip, normalise"
    return Case(name, {"batch": batch, "side": side}, tuple(found), absent=absent, memory=False,
                patience=4.0)  # fmt: skip


def _epochs(source: DataSource, batch: int) -> Callable[[int], Iterable]:
    return lambda epoch: source.train_batches(epoch, 0, batch, 1)


class _Pillow(Dataset):
    def __init__(self, paths: list[Path], side: int) -> None:
        self.paths, self.side = paths, side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        side = self.side
        with Image.open(self.paths[index]) as image:
            share = random.uniform(0.08, 1.0) ** 0.5
            ratio = random.uniform(3 / 4, 4 / 3) ** 0.5
            width = min(image.width, round(image.width * share * ratio))
            height = min(image.height, round(image.height * share / ratio))
            left = random.randrange(image.width - width + 1)
            top = random.randrange(image.height - height + 1)
            box = (left, top, left + width, top + height)
            pixels = np.array(image.convert("RGB").resize((side, side), 2, box))
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        image_ = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float()
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
        return (image_ - mean) / std, 0


def _dali(paths: list[Path], batch: int, side: int) -> Callable[[int], Iterable]:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    @pipeline_def(batch_size=batch, num_threads=torch.get_num_threads(), device_id=None)
    def pipeline():
        files, labels = fn.readers.file(files=[str(p) for p in paths], random_shuffle=True,
                                        name="reader")  # fmt: skip
        images = fn.decoders.image_random_crop(files, device="cpu")
        images = fn.resize(images, size=(side, side))
        images = fn.crop_mirror_normalize(
            images, mean=MEAN, std=STD, output_layout="HWC", dtype=types.FLOAT,
            mirror=fn.random.coin_flip(),
        )  # fmt: skip
        return images, labels

    made = pipeline()
    iterator = DALIGenericIterator([made], ["images", "labels"], reader_name="reader",
                                   auto_reset=True)  # fmt: skip
    return lambda epoch: iterator
