"""Capture a whole step as one CUDA graph: forward, losses, backward, optimizer and statistics.

A step of small networks launches thousands of small kernels, which the device runs faster than the
host launches them. A graph needs only one launch. This module captures explicitly, because the CUDA
graphs of ``torch.compile`` cover only one compiled function each, and the chained graphs of two
networks fail (pytorch#160281).
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.optim import Optimizer

from bdkd.data import Batch
from bdkd.engine.ranges import named_range

# Steps that run without a graph before the capture. They create the moments of the optimizer and
# compiled code, select cuDNN algorithms, and let the allocator reach a steady state.
WARM_UP = 3

Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]


class CapturedStep:
    """Run a training step as a CUDA graph that is captured once for each batch shape.

    Each call is a training step. The first ``WARM_UP`` calls for a shape run eagerly on a side
    stream. The next call captures the step and replays it. All values that change between steps are
    in tensors: the batch and the learning rates. The learning rates become float32, while AdamW
    computes with float64 learning rates otherwise.

    Args:
        step: runs the step on one batch. It must not read values from the device or change the
            state of Python objects.
        optimizer: its learning rates become tensors.
        capture: captures a function without running it, and returns a function that replays it.
            Default: CUDA graphs with a shared memory pool.
    """

    def __init__(
        self,
        step: Callable[[Batch], None],
        optimizer: Optimizer,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        # The warm-up steps and the captures use the same stream, because torch keeps free memory,
        # workspaces and autograd state separately for each stream.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.step = step
        self.capture: Capture = capture or _Graphs(self.stream)
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(float(group["lr"]), device=device)
            if "capturable" in group:  # AdamW requires this flag; its fused step is capturable
                group["capturable"] = True
        self.warm: dict[tuple, int] = {}
        self.captured: dict[tuple, tuple[Batch, Replay]] = {}

    def __call__(self, batch: Batch) -> None:
        """Run the step on one batch."""
        shape = tuple((x.shape, x.stride(), x.dtype) for x in (*batch.views, batch.target))
        if self.warm.get(shape, 0) < WARM_UP:
            self.warm[shape] = self.warm.get(shape, 0) + 1
            with _on_side_stream(self.stream):
                self.step(batch)
            return
        if shape not in self.captured:
            own = Batch(tuple(view.clone() for view in batch.views), batch.target.clone())
            self.captured[shape] = own, self.capture(lambda: self.step(own))
        own, replay = self.captured[shape]
        with named_range("step, captured"):
            for mine, given in zip((*own.views, own.target), (*batch.views, batch.target),
                                   strict=True):  # fmt: skip
                mine.copy_(given)
            replay()


@contextlib.contextmanager
def _on_side_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the body on another stream: after all earlier work of the current stream, and before all
    its later work."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class _Graphs:
    """Capture CUDA graphs that share one memory pool. Only one of them runs at a time."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream, self.pool = stream, torch.cuda.graph_pool_handle()

    def __call__(self, function: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads of a data loader such as DALI may allocate during the capture
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            function()
        return graph.replay
