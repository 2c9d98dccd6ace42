"""A whole step as one CUDA graph: forward passes, losses, backward passes, optimizer, statistics.

The host needs longer to launch some thousand small kernels than the device needs to run those of
small networks; a graph is launched once. The capture is explicit, because the graphs of
``torch.compile`` cover one compiled function each, and chained ones of two networks fail
(pytorch#160281).
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.optim import Optimizer

from bdkd.data import Batch
from bdkd.engine.ranges import named_range

# Steps that run without a graph before the capture. After them the optimizer's moments, cuDNN's
# choices and compiled code exist, and the allocator has settled.
WARM_UP = 3

Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]


class CapturedStep:
    """The device work of a training step, captured once for each shape of a batch.

    Every call trains: the first ones of a shape run eagerly on a side stream, and the next one is
    captured and replayed. Everything that changes between steps is in tensors: the batch, and the
    learning rates, which become float32 (AdamW otherwise computes with float64 rates).

    Args:
        step: the work on one batch. It must not read the device or change Python state.
        optimizer: its learning rates become tensors.
        capture: captures a function without running it and returns its replay. Default: CUDA
            graphs with a shared memory pool.
    """

    def __init__(
        self,
        step: Callable[[Batch], None],
        optimizer: Optimizer,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        # The steps before a capture and the captures share a stream, because torch keeps free
        # memory, workspaces and autograd state for each stream.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.step = step
        self.capture: Capture = capture or _Graphs(self.stream)
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(float(group["lr"]), device=device)
            if "capturable" in group:  # AdamW requires it; its fused step is always capturable
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
    """Work on another stream, after everything before and before everything after."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class _Graphs:
    """CUDA graphs that share one memory pool, because only one of them runs at a time."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream, self.pool = stream, torch.cuda.graph_pool_handle()

    def __call__(self, function: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads of a data loader, such as DALI's, may allocate meanwhile
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            function()
        return graph.replay
