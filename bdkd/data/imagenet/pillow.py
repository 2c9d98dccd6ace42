"""The loader for machines without DALI: Pillow in the worker processes of a ``DataLoader``."""

import multiprocessing
import signal
import threading
from collections.abc import Generator, Iterator
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bdkd.data.decode import require_pillow
from bdkd.data.image_warnings import recorded, show
from bdkd.data.imagenet.crops import Crop
from bdkd.data.imagenet.loader import Request, decoded
from bdkd.errors import RunError

if TYPE_CHECKING:
    from PIL import Image

PREFETCH = 3  # batches per worker


class Pillow:
    """Decodes each batch in one of ``workers`` processes (0: in this process)."""

    def __init__(
        self, workers: int, device: torch.device, dtype: torch.dtype, mean: Tensor, std: Tensor
    ) -> None:
        require_pillow()
        self.workers, self.device, self.dtype = workers, device, dtype
        self.mean, self.std = mean, std  # (1, 3, 1, 1), in pixel values, on the device

    def batches(
        self, requests: Iterator[Request], largest: int, raw: bool
    ) -> Generator[Tensor, None, None]:
        loader = DataLoader(
            Decoder(), sampler=requests, batch_size=None, num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            worker_init_fn=leave_signals_to_the_parent if self.workers else None,
            multiprocessing_context=worker_context() if self.workers else None,
            pin_memory=self.device.type == "cuda",
            # Without a generator, the DataLoader draws the seed of its workers from the global
            # generator. A resumed epoch would draw once more, and dropout would differ.
            generator=torch.Generator(),
        )  # fmt: skip
        try:
            for pixels, warnings in loader:
                show(warnings)
                if isinstance(pixels, RunError):
                    raise pixels
                images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
                if not raw:
                    images = images.float().sub_(self.mean).div_(self.std).to(self.dtype)
                yield images
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise RunError(
                "a process that decoded images was killed, perhaps for lack of memory: resume "
                "with fewer data.workers"
            ) from error


class Decoder(Dataset):
    """Maps a request to pixels ``(B, side, side, 3)`` uint8, or an error, and to warnings.

    Errors are returned, because a raised error would reach the parent as the text of a traceback.
    Warnings are returned, so that the parent shows each one once: workers end with the epoch.
    """

    def __getitem__(self, request: Request) -> tuple[Tensor | RunError, list[str]]:
        pixels = np.empty((len(request.items), request.side, request.side, 3), np.uint8)
        warnings: list[str] = []
        for i, item in enumerate(request.items):
            try:
                with recorded(str(item)) as lines:
                    image = decoded(item)
            except RunError as error:
                return error, warnings
            warnings += lines
            pixels[i] = _cut(image, request.crop(i, image.height, image.width), request.side)
        return torch.from_numpy(pixels), warnings


def _cut(image: "Image.Image", crop: Crop, side: int) -> np.ndarray:
    """Return pixels ``(side, side, 3)``. Like DALI, cut before resizing."""
    from PIL import Image

    top, left, height, width, to_height, to_width, square_top, square_left, mirrored = crop
    cut = image.crop((left, top, left + width, top + height))
    cut = cut.resize((to_width, to_height), Image.Resampling.BILINEAR)
    square = np.asarray(cut)[square_top : square_top + side, square_left : square_left + side]
    return square[:, ::-1] if mirrored else square


def worker_context() -> BaseContext:
    """Return a context that starts workers from a server process without threads.

    A plain fork sometimes hung when another thread (of DALI or OpenMP) held a lock.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # workers share one import of torch
    if threading.current_thread() is threading.main_thread():
        # Ignore Ctrl-C in the server, because workers inherit this from it.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, previous)
    return context


def leave_signals_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C and restore the default handler of SIGTERM in a worker.

    Ctrl-C reaches every process of a terminal. The parent handles it and terminates its workers;
    a handler inherited from the parent would keep them alive.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
