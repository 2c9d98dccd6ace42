"""The loader for speed: NVIDIA DALI, on the GPU where there is one.

DALI decodes, cuts, resizes and normalises; which bytes and which window, it is told batch by batch
through an external source. It holds no random state and no position, so there is none to save.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bdkd.data.decode import (
    LARGEST,
    PNG,
    UndecodableError,
    decode_rgb,
    jpeg_frame,
    open_image,
    png_is_whole,
    too_large,
)
from bdkd.data.imagenet.index import Item
from bdkd.data.imagenet.loader import Request, bad_image, decoded
from bdkd.data.imagenet.windows import Window
from bdkd.errors import RunError

AHEAD = 2  # batches in DALI's queue
READ_AHEAD = 3  # batches whose bytes are read before DALI asks for them
READERS = 8  # threads; they wait for the disk


class Read(NamedTuple):
    """An image's bytes, and the window to cut."""

    content: np.ndarray  # (n,) uint8
    window: Window


class Dali:
    """Decodes with ``threads`` of the CPU, and on the GPU where ``device`` is one.

    Raises:
        RunError: DALI is missing.
    """

    def __init__(
        self, threads: int, device: torch.device, dtype: torch.dtype, mean: Tensor, std: Tensor
    ) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise RunError(
                "data.loader = dali needs NVIDIA DALI: pip install 'bdkd[dali]', or take pillow"
            ) from error
        self.threads, self.device, self.dtype = max(1, threads), device, dtype
        self.mean, self.std = mean.flatten().tolist(), std.flatten().tolist()
        self.idle: dict[tuple[int, bool], _Pipeline] = {}

    def batches(
        self, requests: Iterator[Request], largest: int, raw: bool
    ) -> Generator[Tensor, None, None]:
        # A pipeline is kept from epoch to epoch, but not one whose queue still holds batches.
        pipeline = self.idle.pop((largest, raw), None) or self._pipeline(largest, raw)
        with ThreadPoolExecutor(READERS) as pool:
            fed = _Feed(requests, pool)
            try:
                for pixels in pipeline.run(fed):
                    images = pixels.permute(0, 3, 1, 2)  # channels-last, no copy
                    yield images if raw else images.to(self.dtype)
            except RunError:
                raise
            except RuntimeError as error:  # DALI's; it names no file
                raise self._cause(fed, raw, error) from error
            finally:
                fed.cancel()
        self.idle[largest, raw] = pipeline

    def _pipeline(self, largest: int, raw: bool) -> "_Pipeline":
        return _Pipeline(largest, raw, self.threads, self.device, self.dtype, self.mean, self.std)

    def _cause(self, fed: "_Feed", raw: bool, error: RuntimeError) -> RunError:
        """The image that DALI failed at: of those it had, the first that Pillow or a pipeline of
        its own cannot decode."""
        for request in fed.handed:
            for item in request.items:
                try:
                    decoded(item)
                except RunError as found:
                    return found
        single = self._pipeline(1, raw)
        for request in fed.handed:
            for i, item in enumerate(request.items):
                drawn = None if request.drawn is None else request.drawn[i : i + 1]
                alone = _Feed(iter([request._replace(items=[item], drawn=drawn)]), None)
                try:
                    for _ in single.run(alone):
                        pass
                except RuntimeError as refused:
                    return bad_image(item, f"DALI: {_last_line(refused)}")
        return RunError(f"DALI failed: {_last_line(error)}")


class _Feed:
    """Calls for DALI's external source: the next batch's bytes and windows."""

    def __init__(self, requests: Iterator[Request], pool: ThreadPoolExecutor | None) -> None:
        self.requests, self.pool = requests, pool
        self.waiting: deque[tuple[Request, list[Future[list[Read]]]]] = deque()
        # What may be in the pipeline: where it fails, the cause is among these.
        self.handed: deque[Request] = deque(maxlen=AHEAD + 1)

    def __call__(self) -> tuple[Any, ...]:
        if self.pool is None:
            request = next(self.requests)
            read = _read(request, range(len(request.items)))
        else:
            for ahead in islice(self.requests, READ_AHEAD - len(self.waiting)):
                count = len(ahead.items)
                parts = [range(first, count, READERS) for first in range(min(READERS, count))]
                self.waiting.append((ahead, [self.pool.submit(_read, ahead, p) for p in parts]))
            if not self.waiting:
                raise StopIteration
            request, futures = self.waiting.popleft()
            read = [None] * len(request.items)  # type: ignore[list-item]
            for first, future in enumerate(futures):
                read[first::READERS] = future.result()
        self.handed.append(request)
        windows = np.array([image.window for image in read], np.int32)  # (B, 9)
        spare = np.maximum(windows[:, 4:6] - request.side, 1)  # what the last cut leaves over
        numbers = (
            windows[:, 0:2],
            windows[:, 2:4],
            windows[:, 4:6].astype(np.float32),
            (windows[:, 6:8] / spare).astype(np.float32),
            np.full(len(read), request.side, np.float32),
            windows[:, 8],
        )
        return [image.content for image in read], *map(np.ascontiguousarray, numbers)

    def cancel(self) -> None:
        for _, futures in self.waiting:
            for future in futures:
                future.cancel()


def _read(request: Request, chosen: range) -> list[Read]:
    read = []
    for i in chosen:
        content, height, width = prepared(request.items[i])
        read.append(Read(np.frombuffer(content, np.uint8), request.window(i, height, width)))
    return read


def prepared(item: Item) -> tuple[bytes, int, int]:
    """Return the bytes that DALI decodes to the same picture as Pillow, height and width.

    These kinds decode alike in DALI 2.4 and Pillow 13, by trials of about 90 encodings (most are in
    tests/data/imagenet/odd_images.py): 8-bit JPEGs of 1 or 3 components, PNGs of up to 8 bits that
    end where they should, plain WebPs. DALI decodes others differently (it rounds 16 bits, inverts
    CMYK JPEGs without Adobe's marker, takes floating-point TIFFs for integers) or not at all (GIF,
    16-bit BMP, AVIF): Pillow decodes these here, and DALI gets the pixels as a PPM.

    Raises:
        RunError: it is no image; the message names it.
    """
    content = item.read()
    try:
        frame = jpeg_frame(content)
        if frame is not None and frame[0] == 8 and frame[3] in (1, 3) and min(frame[1:3]):
            _, height, width, _ = frame
            if height * width > LARGEST:
                raise UndecodableError(too_large(height, width))
            return content, height, width
        if _is_plain(content):
            with open_image(content) as image:
                return content, image.height, image.width
        picture = decode_rgb(content)
        header = b"P6 %d %d 255\n" % picture.size
        return header + picture.tobytes(), picture.height, picture.width
    except UndecodableError as error:
        raise bad_image(item, str(error)) from error


def _is_plain(content: bytes) -> bool:
    """Whether this is a PNG or WebP that DALI decodes as Pillow does."""
    if content.startswith(PNG):
        return content[24:25] != b"\x10" and png_is_whole(content)
    return content[8:16] in (b"WEBPVP8 ", b"WEBPVP8L")


class _Pipeline:
    """The one graph, running: for the CPU and the GPU, for training and evaluation."""

    def __init__(
        self,
        largest: int,
        raw: bool,
        threads: int,
        device: torch.device,
        dtype: torch.dtype,
        mean: list[float],
        std: list[float],
    ) -> None:
        from nvidia.dali.pipeline import Pipeline

        self.device, gpu = device, None
        if device.type == "cuda":
            gpu = torch.cuda.current_device() if device.index is None else device.index
        self.feed: _Feed | None = None
        self.pipeline = Pipeline(
            batch_size=largest,
            num_threads=threads,
            device_id=gpu,
            prefetch_queue_depth=AHEAD,
            exec_dynamic=True,  # what it hands out is ours until we let go of it
        )
        with self.pipeline:
            self.pipeline.set_outputs(graph(self._next, gpu is not None, raw, dtype, mean, std))
        self.pipeline.build()

    def _next(self) -> tuple[Any, ...]:
        assert self.feed is not None
        return self.feed()

    def run(self, feed: _Feed) -> Iterator[Tensor]:
        """Pixels ``(B, side, side, 3)`` of every batch of the feed, each a tensor of its own."""
        self.feed = feed
        self._schedule()
        while True:
            # On a GPU the batch is ready in the order of torch's stream, and its memory is given
            # back in that order: the host waits for neither.
            stream = None
            if self.device.type == "cuda":
                stream = torch.cuda.current_stream(self.device)
            try:
                (found,) = self.pipeline.share_outputs(cuda_stream=stream)
            except StopIteration:
                break
            # Copied instead of shared, a batch cost a sixth more of the CPU's time.
            pixels = torch.from_dlpack(found.as_tensor())
            self.pipeline.release_outputs()
            self._schedule()  # the next one is decoded while this one trains
            yield pixels
        self.pipeline.reset()

    def _schedule(self) -> None:
        # StopIteration: the feed is at its end; what is in the queue still comes out.
        with suppress(StopIteration):
            self.pipeline.schedule_run()


def graph(
    source: Callable[[], tuple[Any, ...]],
    gpu: bool,
    raw: bool,
    dtype: torch.dtype,
    mean: list[float],
    std: list[float],
) -> Any:
    """The node with the pixels, of what ``source`` returns: contents, windows.

    On a GPU the windows stay where they are, in the host's memory: the decoder reads them there,
    and skips what they leave out.
    """
    # DALI makes these modules' contents as it is imported.
    fn: Any = import_module("nvidia.dali.fn")
    types: Any = import_module("nvidia.dali.types")

    content, anchor, shape, size, position, side, mirror = fn.external_source(
        source=source,
        num_outputs=7,
        batch=True,
        dtype=[types.UINT8, types.INT32, types.INT32,
               types.FLOAT, types.FLOAT, types.FLOAT, types.INT32],
        ndim=[1, 1, 1, 1, 1, 0, 0],
    )  # fmt: skip
    images = fn.decoders.image_slice(
        content,
        anchor,
        shape,
        device="mixed" if gpu else "cpu",
        axis_names="HW",
        output_type=types.RGB,
        # As the field's loaders have it, which take no notice of a camera's orientation.
        adjust_orientation=False,
    )
    images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    # bfloat16 is none of DALI's types; float16 keeps more of a normalised pixel than it.
    wanted = types.FLOAT if dtype == torch.float32 else types.FLOAT16
    return fn.crop_mirror_normalize(
        images,
        crop_h=side,
        crop_w=side,
        crop_pos_y=position[0],
        crop_pos_x=position[1],
        mirror=mirror,
        mean=[0.0] if raw else mean,
        std=[1.0] if raw else std,
        dtype=types.UINT8 if raw else wanted,
        output_layout="HWC",
    )


def _last_line(error: RuntimeError) -> str:
    """Of DALI's long messages, the part that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("Error", "[", "Assert", "Failed"))]
    return (telling or lines or [type(error).__name__])[-1][:200]
