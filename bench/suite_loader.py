"""Time one batch of the data loader, from memory and from JPEG files in ImageNet's layout, and a
training step on such files, compared with the same step on a batch in memory."""

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from harness import Call, Case, Contender, MakeCase
from suite_step import Pair, Run
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bdkd.config import NetworkConfig
from bdkd.data import Batch, DataSource, create_source
from bdkd.data.imagenet import dali, pillow
from bdkd.device import AUTOCAST
from bdkd.registry import SOURCES

MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)  # of the pixels of ImageNet
WIDTH, HEIGHT = 500, 375  # the most common size in ImageNet
QUALITY = 90
JPEGS = f"JPEGs of {WIDTH} x {HEIGHT}" + ("" if find_spec("sklearn") else " (noise)")


def cases(device: str, quick: bool) -> list[MakeCase]:
    """Return the cases. On a GPU, the cases that need it come first, because its time is short."""
    in_memory = partial(_in_memory, 32 if quick else 128, 400 if quick else 10_000)
    if not find_spec("PIL"):
        return [in_memory]
    # Each file occurs 40 times, so that an epoch has many steps. Short epochs would measure mostly
    # the start of an epoch.
    root = cache(partial(_folder, 16 if quick else 256, 1 if quick else 40))
    batch, side = (4, 32) if quick else (32, 224)
    jpegs = partial(_jpegs, root, batch, side, "cpu")
    if quick:
        return [partial(_training, root, Pair("resnet8", "resnet8", 4, 32, 10), device), jpegs,
                in_memory]  # fmt: skip
    if device == "cuda":
        pair = Pair("imagenet_resnet50", "imagenet_mobilenet_v1", 256, 224, 1000, "bf16")
        return [partial(_training, root, pair, device),
                partial(_jpegs, root, 256, side, device), jpegs, in_memory]  # fmt: skip
    pair = Pair("imagenet_resnet18", "imagenet_mobilenet_v1", 32, 64, 1000)
    return [partial(_training, root, pair, device), jpegs, in_memory]


def _folder(images: int, repeats: int) -> Path:
    """Write the JPEGs into a folder that is removed at the end of the process."""
    root = Path(tempfile.mkdtemp(prefix="bdkd-bench-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write_jpegs(root, images, repeats)
    return root


def endless(epochs: Callable[[int], Iterable]) -> Call:
    """Return a call that takes the next batch. After the last batch of an epoch comes the first
    batch of the next epoch."""
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
    """Return the case of images in memory with the usual augmentation of CIFAR: crop with a padding
    of 4, flip, normalise."""
    config = SOURCES.configure("synthetic", images=images, crop=4,
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
                  note="no workers, cannot resume within an epoch"),
    )  # fmt: skip
    name = f"{batch} of {images} images 3 x 32 x 32 in memory: crop, flip, normalise"
    return Case(name, {"batch": batch}, found)


def write_jpegs(root: Path, count: int, repeats: int = 1) -> None:
    """Write ``count`` training JPEGs in two classes, each under ``repeats`` names, and two test
    JPEGs per class."""
    photographs = _photographs()
    rng = np.random.default_rng(0)
    for split, images in (("train", count), ("val", 4)):
        for number in range(images):
            whole = photographs[number % 2]
            left = int(rng.integers(whole.width - WIDTH + 1))
            top = int(rng.integers(whole.height - HEIGHT + 1))
            folder = root / split / f"n{number % 2:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{number}_0.JPEG"
            whole.crop((left, top, left + WIDTH, top + HEIGHT)).save(file, quality=QUALITY)
            for again in range(1, repeats if split == "train" else 1):
                os.link(file, folder / f"{number}_{again}.JPEG")


def _photographs() -> list:
    """Return two images of 640 x 427 pixels: the photographs of scikit-learn, or, if it is not
    installed, noise whose JPEGs have about the same size."""
    from PIL import Image

    if find_spec("sklearn"):
        from sklearn.datasets import load_sample_images

        return [Image.fromarray(x) for x in load_sample_images().images]
    found, rng = [], np.random.default_rng(0)
    for _ in range(2):
        pixels = np.zeros((427, 640, 3))
        for cells, strength in ((4, 60), (16, 30), (64, 16), (256, 12), (640, 6)):
            noise = rng.normal(128, strength, (cells * 2 // 3, cells, 3)).clip(0, 255)
            smooth = Image.fromarray(noise.astype(np.uint8)).resize((640, 427), 3)
            pixels += np.asarray(smooth, float) - 128
        found.append(Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)))
    return found


def _imagenet(
    root: Path, kind: str, side: int, device: str, dtype: torch.dtype = torch.float32
) -> DataSource:
    config = SOURCES.configure("imagenet", root=str(root), image_size=side, flip=True,
                        validation=0.0, loader=kind, workers=_workers(device))  # fmt: skip
    return create_source(config, 0, torch.device(device), torch.channels_last, dtype)


def _workers(device: str) -> int:
    """Return the default of ``data.workers`` on a GPU, and the number of torch threads on a CPU,
    where training uses the same cores."""
    return len(os.sched_getaffinity(0)) if device == "cuda" else torch.get_num_threads()


def _kinds(device: str) -> tuple[str, ...]:
    """Return the loaders to measure. If DALI is installed, Pillow is not measured on a GPU, because
    its processes start slowly and are too slow for a GPU."""
    if not _dali_is_here():
        return ("pillow",)
    return ("dali",) if device == "cuda" else ("dali", "pillow")


def _ready(kind: str, device: str) -> int:
    """Return the number of batches that a loader may have prefetched."""
    return dali.READ_AHEAD + 1 if kind == "dali" else pillow.PREFETCH * _workers(device) + 1


def _dali_is_here() -> bool:
    # Another package may provide "nvidia" without "nvidia.dali".
    return bool(find_spec("nvidia") and find_spec("nvidia.dali"))


def _training(root: Callable[[], Path], pair: Pair, device: str) -> Case:
    networks = {name: NetworkConfig(getattr(pair, name), name) for name in ("teacher", "student")}
    run = Run(networks, "bdkd", pair, device)
    dtype = AUTOCAST[pair.precision] or torch.float32
    (images, *_), labels = run.batch
    there = Batch((images.to(dtype),), labels)

    def step(batches: Call) -> Call:
        def call(i: int) -> None:
            run.batch = batches(i)  # type: ignore[assignment]
            run.step(i)

        return call

    found, kinds = [], _kinds(device)
    for kind in kinds:
        source = _imagenet(root(), kind, pair.side, device, dtype)
        found.append(
            Contender(f"from JPEGs by {kind}", step(endless(_epochs(source, pair.batch))), "ours",
                      note=f"{_workers(device)} workers", lead=_ready(kind, device))
        )  # fmt: skip
    note = f"x ours: images/s with {kinds[0]} over images/s without loading"
    found.append(Contender("from a batch that is there", step(lambda i: there), "ours", note=note))
    absent = {} if _dali_is_here() else {"from JPEGs by dali": "nvidia-dali is not installed"}
    name = f"training from {JPEGS}: {pair}"
    return Case(name, {"batch": pair.batch, "side": pair.side, "precision": pair.precision},
                tuple(found), absent=absent, memory=False, patience=4.0, device=device)  # fmt: skip


def _jpegs(root: Callable[[], Path], batch: int, side: int, device: str) -> Case:
    paths = sorted((root() / "train").rglob("*.JPEG"))
    found, workers = [], _workers(device)
    for kind in _kinds(device):
        note = f"{workers} workers; its order and crops are a function of (seed, epoch, index)"
        call = endless(_epochs(_imagenet(root(), kind, side, device), batch))
        found.append(Contender(f"bdkd, {kind}", call, "ours", note=note,
                               lead=_ready(kind, device)))  # fmt: skip
    if device == "cpu":
        loader = DataLoader(_Pillow(paths, side), batch, shuffle=True, drop_last=True)
        found.append(
            Contender("DataLoader and Pillow", endless(lambda epoch: loader),
                      note="no workers, one Python thread")
        )  # fmt: skip
    absent = {}
    if _dali_is_here():
        found.append(
            Contender("DALI's own reader", endless(_dali(paths, batch, side, device)),
                      note=f"as in its documentation, {workers} threads",
                      lead=_ready("dali", device))
        )  # fmt: skip
    else:
        absent = dict.fromkeys(("bdkd, dali", "DALI's own reader"), "nvidia-dali is not installed")
    name = (
        f"{batch} {JPEGS} to the {device}: decode, random resized crop to {side}, flip, normalise"
    )
    return Case(name, {"batch": batch, "side": side}, tuple(found), absent=absent, memory=False,
                patience=4.0, device=device)  # fmt: skip


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


def _dali(paths: list[Path], batch: int, side: int, device: str) -> Callable[[int], Iterable]:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    on_gpu = device == "cuda"

    @pipeline_def(batch_size=batch, num_threads=_workers(device), device_id=0 if on_gpu else None)
    def pipeline():
        files, labels = fn.readers.file(files=[str(p) for p in paths], random_shuffle=True,
                                        name="reader")  # fmt: skip
        images = fn.decoders.image_random_crop(files, device="mixed" if on_gpu else "cpu")
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
