"""The fastest loader: NVIDIA DALI, on the GPU if there is one.

DALI decodes, crops, resizes and normalises. An external source passes the bytes and crop box of
each image to DALI. DALI therefore has no random state and no position that must be resumed.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdkd.data import decode
from bdkd.data.image_warnings import shown
from bdkd.data.imagenet.crops import Crop
from bdkd.data.imagenet.index import Item
from bdkd.data.imagenet.loader import Request, bad_image, decoded
from bdkd.errors import RunError

PREFETCH = 2  # batches in DALI's queue
READ_AHEAD = 3  # batches whose files are read before DALI requests them
READERS = 8  # threads that wait for the disk

_Read = tuple[np.ndarray, Crop]  # an image's bytes (n,) uint8, and its crop


class Dali:
    """Decodes with ``threads`` CPU threads, and on the GPU if ``device`` is one."""

    def __init__(
        self, threads: int, device: torch.device, dtype: torch.dtype, mean: Tensor, std: Tensor
    ) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise RunError(
                "data.loader = dali needs NVIDIA DALI: pip install 'bdkd[dali]', or use pillow"
            ) from error
        self.threads, self.device, self.dtype = max(1, threads), device, dtype
        self.mean, self.std = mean.flatten().tolist(), std.flatten().tolist()
        self.idle: dict[tuple[int, bool], _Pipeline] = {}

    def batches(
        self, requests: Iterator[Request], largest: int, raw: bool
    ) -> Generator[Tensor, None, None]:
        # Pipelines are reused across epochs, unless an unfinished epoch left batches in the queue.
        pipeline = self.idle.pop((largest, raw), None) or _Pipeline(self, largest, raw)
        with ThreadPoolExecutor(READERS) as pool:
            fed = _Feed(requests, pool)
            try:
                for pixels in pipeline.run(fed):
                    images = pixels.permute(0, 3, 1, 2)  # channels-last, no copy
                    yield images if raw else images.to(self.dtype)
            except RuntimeError as error:  # DALI's errors do not name the file
                raise self._cause(fed, raw, error) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        self.idle[largest, raw] = pipeline

    def _cause(self, fed: "_Feed", raw: bool, error: RuntimeError) -> RunError:
        """Return an error that names the first image that Pillow or DALI cannot decode."""
        for item in [item for request in fed.handed for item in request.items]:
            try:
                decoded(item)
            except RunError as found:
                return found
        single = _Pipeline(self, 1, raw)
        for request in fed.handed:
            for i, item in enumerate(request.items):
                drawn = None if request.drawn is None else request.drawn[i : i + 1]
                feed = _Feed(iter([request._replace(items=[item], drawn=drawn)]), fed.pool)
                try:
                    list(single.run(feed))
                except RuntimeError as refused:
                    return bad_image(item, f"DALI: {_last_line(refused)}")
        return RunError(f"DALI failed: {_last_line(error)}")


class _Feed:
    """The callback of DALI's external source. It returns the bytes and crops of the next batch."""

    def __init__(self, requests: Iterator[Request], pool: ThreadPoolExecutor) -> None:
        self.requests, self.pool = requests, pool
        self.waiting: deque[tuple[Request, list[Future[list[_Read]]]]] = deque()
        # The requests that may be in the pipeline when it fails.
        self.handed: deque[Request] = deque(maxlen=PREFETCH + 1)

    def __call__(self) -> tuple[Any, ...]:
        for ahead in islice(self.requests, READ_AHEAD - len(self.waiting)):
            count = len(ahead.items)
            parts = [range(first, count, READERS) for first in range(min(READERS, count))]
            self.waiting.append((ahead, [self.pool.submit(_read, ahead, p) for p in parts]))
        if not self.waiting:
            raise StopIteration
        request, futures = self.waiting.popleft()
        read: list[Any] = [None] * len(request.items)
        for first, future in enumerate(futures):
            read[first::READERS] = future.result()
        self.handed.append(request)
        contents, boxes = zip(*read, strict=True)
        crops = np.array(boxes, np.int32)  # (B, 9)
        margin = np.maximum(crops[:, 4:6] - request.side, 1)  # resized image minus square
        numbers = (
            crops[:, 0:2], crops[:, 2:4], crops[:, 4:6].astype(np.float32),
            (crops[:, 6:8] / margin).astype(np.float32),
            np.full(len(crops), request.side, np.float32), crops[:, 8],
        )  # fmt: skip
        return list(contents), *map(np.ascontiguousarray, numbers)


def _read(request: Request, chosen: range) -> list[_Read]:
    read = []
    for i in chosen:
        content, height, width = prepared(request.items[i])
        read.append((np.frombuffer(content, np.uint8), request.crop(i, height, width)))
    return read


def prepared(item: Item) -> tuple[bytes, int, int]:
    """Return bytes that DALI decodes to the same pixels as Pillow, and the height and width.

    DALI 2.4 and Pillow 13 agree on 8-bit JPEGs with 1 or 3 components, complete PNGs of up to 8
    bits, and plain WebPs (tested with about 90 encodings, most of them in
    tests/data/imagenet/odd_images.py). DALI decodes other kinds differently (it rounds 16 bits,
    inverts CMYK JPEGs without Adobe's marker, reads floating-point TIFFs as integers) or not at all
    (GIF, 16-bit BMP, AVIF). Pillow decodes those here, and DALI receives the pixels as a PPM.

    Raises:
        RunError: the image cannot be decoded; the message names it.
    """
    try:
        content = item.read()
        frame = decode.jpeg_frame(content)
        if frame is not None and frame[0] == 8 and frame[3] in (1, 3) and min(frame[1:3]):
            _, height, width, _ = frame
            if height * width > decode.LARGEST:
                raise decode.UndecodableError(decode.too_large(height, width))
            return content, height, width
        with shown(str(item)):
            if _is_plain(content):
                with decode.open_image(content) as image:
                    return content, image.height, image.width
            picture = decode.decode_rgb(content)
        header = b"P6 %d %d 255\n" % picture.size
        return header + picture.tobytes(), picture.height, picture.width
    except decode.UndecodableError as error:
        raise bad_image(item, str(error)) from error


def _is_plain(content: bytes) -> bool:
    """Return whether this is a PNG or WebP that DALI and Pillow decode to the same pixels."""
    if content.startswith(decode.PNG):
        return content[24:25] != b"\x10" and decode.png_is_whole(content)
    return content[8:16] in (b"WEBPVP8 ", b"WEBPVP8L")


class _Pipeline:
    """A built DALI pipeline."""

    def __init__(self, loader: Dali, largest: int, raw: bool) -> None:
        from nvidia.dali.pipeline import Pipeline

        self.device, gpu = loader.device, None
        if self.device.type == "cuda":
            index = self.device.index
            gpu = torch.cuda.current_device() if index is None else index
        self.feed: Callable[[], tuple[Any, ...]]  # set by run()
        # With exec_dynamic, outputs stay valid until their tensors are deleted.
        self.pipeline = Pipeline(
            batch_size=largest, num_threads=loader.threads, device_id=gpu,
            prefetch_queue_depth=PREFETCH, exec_dynamic=True,
        )  # fmt: skip
        look = (gpu is not None, raw, loader.dtype, loader.mean, loader.std)
        with self.pipeline:
            self.pipeline.set_outputs(graph(lambda: self.feed(), *look))
        self.pipeline.build()

    def run(self, feed: _Feed) -> Iterator[Tensor]:
        """Yield pixels ``(B, side, side, 3)`` for every batch of the feed."""
        self.feed = feed
        self._schedule()
        while True:
            # With torch's stream, neither reading nor freeing a batch synchronizes with the host.
            on_gpu = self.device.type == "cuda"
            stream = torch.cuda.current_stream(self.device) if on_gpu else None
            try:
                (found,) = self.pipeline.share_outputs(cuda_stream=stream)
            except StopIteration:
                break
            # Sharing instead of copying saved a sixth of the CPU time.
            pixels = torch.from_dlpack(found.as_tensor())
            self.pipeline.release_outputs()
            self._schedule()  # decodes the next batch during the training step
            yield pixels
        self.pipeline.reset()

    def _schedule(self) -> None:
        # StopIteration: the feed has ended. Batches in the queue are still returned.
        with suppress(StopIteration):
            self.pipeline.schedule_run()


def graph(
    source: Callable[[], tuple[Any, ...]], gpu: bool, raw: bool, dtype: torch.dtype,
    mean: list[float], std: list[float],
) -> Any:  # fmt: skip
    """Define the graph from ``source`` (bytes and crops) to pixels, and return its output node.

    On a GPU the crops stay in host memory, because the decoder reads them there to skip pixels
    outside of the crop.
    """
    # DALI fills these modules when it is imported, so type checkers cannot see their contents.
    fn: Any = import_module("nvidia.dali.fn")
    types: Any = import_module("nvidia.dali.types")

    content, anchor, shape, size, position, side, mirror = fn.external_source(
        source=source, num_outputs=7, batch=True, ndim=[1, 1, 1, 1, 1, 0, 0],
        dtype=[types.UINT8, types.INT32, types.INT32,
               types.FLOAT, types.FLOAT, types.FLOAT, types.INT32],
    )  # fmt: skip
    images = fn.decoders.image_slice(
        content, anchor, shape, device="mixed" if gpu else "cpu", axis_names="HW",
        output_type=types.RGB, adjust_orientation=False,  # as in Pillow and torchvision
    )  # fmt: skip
    images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    # DALI has no bfloat16; float16 represents normalised pixels more precisely.
    wanted = types.FLOAT if dtype == torch.float32 else types.FLOAT16
    return fn.crop_mirror_normalize(
        images, crop_h=side, crop_w=side, crop_pos_y=position[0], crop_pos_x=position[1],
        mirror=mirror, mean=[0.0] if raw else mean, std=[1.0] if raw else std,
        dtype=types.UINT8 if raw else wanted, output_layout="HWC",
    )  # fmt: skip


def _last_line(error: RuntimeError) -> str:
    """Return the line of DALI's long error message that states the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("Error", "[", "Assert", "Failed"))]
    return (telling or lines or [type(error).__name__])[-1][:200]
