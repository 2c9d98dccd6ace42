"""The loader for machines without DALI: Pillow in torch's worker processes."""

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

from bdkd.data.imagenet.loader import Request, decoded
from bdkd.data.imagenet.windows import Window
from bdkd.errors import RunError

if TYPE_CHECKING:
    from PIL import Image

AHEAD = 3  # batches that each worker keeps ready


class Pillow:
    """Each batch is decoded by one of ``workers`` processes (0: by this one).

    Raises:
        RunError: Pillow is missing.
    """

    def __init__(
        self, workers: int, device: torch.device, dtype: torch.dtype, mean: Tensor, std: Tensor
    ) -> None:
        try:
            import PIL  # noqa: F401
        except ImportError as error:
            raise RunError("image files need Pillow: pip install 'bdkd[imagenet]'") from error
        self.workers, self.device, self.dtype = workers, device, dtype
        self.mean, self.std = mean, std  # (1, 3, 1, 1), in pixel values, on the device

    def batches(
        self, requests: Iterator[Request], largest: int, raw: bool
    ) -> Generator[Tensor, None, None]:
        loader = DataLoader(
            Decoder(),
            sampler=requests,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            worker_init_fn=leave_signals_to_the_parent if self.workers else None,
            multiprocessing_context=worker_context() if self.workers else None,
            pin_memory=self.device.type == "cuda",
            # Its workers' seed, which nothing here uses, would be drawn from the random state of
            # the training: once more in a resumed epoch, after which dropout draws otherwise.
            generator=torch.Generator(),
        )
        try:
            for pixels in loader:
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
                "a process that decoded images was killed, by lack of memory or by someone: "
                "resume with fewer data.workers"
            ) from error


class Decoder(Dataset):
    """From a request to its pixels, ``(B, side, side, 3)`` uint8. It has no state.

    What went wrong is returned: raised, it would arrive as the text of a traceback."""

    def __getitem__(self, request: Request) -> Tensor | RunError:
        pixels = np.empty((len(request.items), request.side, request.side, 3), np.uint8)
        for i, item in enumerate(request.items):
            try:
                image = decoded(item)
            except RunError as error:
                return error
            pixels[i] = _cut(image, request.window(i, image.height, image.width), request.side)
        return torch.from_numpy(pixels)


def _cut(image: "Image.Image", window: Window, side: int) -> np.ndarray:
    """Pixels ``(side, side, 3)``; the window is cut before it is resized, as DALI does it."""
    from PIL import Image

    top, left, height, width, to_height, to_width, square_top, square_left, mirrored = window
    cut = image.crop((left, top, left + width, top + height))
    cut = cut.resize((to_width, to_height), Image.Resampling.BILINEAR)
    square = np.asarray(cut)[square_top : square_top + side, square_left : square_left + side]
    return square[:, ::-1] if mirrored else square


def worker_context() -> BaseContext:
    """How workers are started: from a server process without threads. A plain fork of a process
    whose other threads (DALI's, OpenMP's) hold a lock hung now and then."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by every worker
    if threading.current_thread() is threading.main_thread():
        # What the server ignores from its start, its workers ignore from theirs: Ctrl-C.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, previous)
    return context


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: the training answers it, and ends its workers,
    which a handler of the training's that they inherited would keep alive."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
