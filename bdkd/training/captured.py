"""A whole step as one CUDA graph: forward passes, losses, backward passes, optimizer, statistics.

Launching some thousand small kernels takes the host longer than small networks take the device; a
graph is launched once. Captured by hand, and not by ``torch.compile``'s own graphs: those are one
for each compiled function, and chained ones of two networks fail (pytorch#160281).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from bdkd.data import Batch
from bdkd.errors import UsageError
from bdkd.training.profile import named_range
from bdkd.training.state import TrainingState
from bdkd.training.step import Passes, update

if TYPE_CHECKING:
    from bdkd.training.setup import Setup

# Steps done as they are before one is captured: moments, cuDNN's choices and compiled code exist
# by then, and the allocator has settled.
WARM_UP = 3

Replay = Callable[[], None]


class CapturedStep:
    """:func:`bdkd.training.step.train_step`, captured once for each shape of a batch.

    Every step trains: the first ones of a shape run as they are, on a stream of their own, and the
    next is captured and replayed. What changes from step to step lies in tensors: the batch, and
    the learning rates, which are float32 then (AdamW otherwise reckons with theirs in float64).

    Args:
        capture: makes of a function its replay, without having run it.

    Raises:
        UsageError: there is no GPU, or a step of this run needs the host.
    """

    def __init__(
        self,
        setup: "Setup",
        state: TrainingState,
        passes: Passes,
        capture: Callable[[Replay], Replay] | None = None,
    ) -> None:
        # One stream for the steps before a capture and for the captures: what torch keeps a stream
        # (free memory, workspaces, autograd's places) is there when a capture begins.
        self.stream = torch.cuda.Stream(setup.device) if setup.device.type == "cuda" else None
        if capture is None:
            check(setup)
            capture = _Graphs(self.stream)
        self.state, self.objective, self.options = state, setup.objective, setup.recipe.train
        self.passes, self.capture = passes, capture
        for group in state.optimizer.param_groups:
            group["lr"] = torch.as_tensor(float(group["lr"]), device=setup.device)
            if "capturable" in group:  # AdamW asks for the promise; its fused step keeps it anyway
                group["capturable"] = True
        self.warm: dict[tuple, int] = {}
        self.captured: dict[tuple, tuple[Batch, Replay]] = {}

    def __call__(self, batch: Batch) -> None:
        """One optimizer step over one batch."""
        shape = tuple((x.shape, x.stride(), x.dtype) for x in (*batch.views, batch.target))
        self.state.set_learning_rate()
        if self.warm.get(shape, 0) < WARM_UP:
            self.warm[shape] = self.warm.get(shape, 0) + 1
            with _beside(self.stream):
                self._update(batch)
        else:
            if shape not in self.captured:
                own = Batch(tuple(view.clone() for view in batch.views), batch.target.clone())
                self.captured[shape] = own, self.capture(lambda: self._update(own))
            own, replay = self.captured[shape]
            with named_range("step, captured"):
                for mine, given in zip((*own.views, own.target), (*batch.views, batch.target),
                                       strict=True):  # fmt: skip
                    mine.copy_(given)
                replay()
        self.state.advance(self.options.batch_size)

    def _update(self, batch: Batch) -> None:
        update(self.state, self.objective, batch, self.options, self.passes)


@contextlib.contextmanager
def _beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on another stream, after all that came before and before all that comes after."""
    if stream is None:
        yield
        return
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        yield
    here.wait_stream(stream)


class _Graphs:
    """CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream, self.pool = stream, torch.cuda.graph_pool_handle()

    def __call__(self, function: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's threads may allocate meanwhile, as DALI's do
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            function()
        return graph.replay


def check(setup: "Setup") -> None:
    """Raise ``UsageError`` where a whole step cannot be captured."""
    recipe = setup.recipe
    for fits, needed in (
        (setup.device.type == "cuda", f"on a GPU (device is {setup.device})"),
        (setup.ranks.alone, "with one rank"),
        (
            not setup.objective.controls,
            f"with a method whose steps are alike, and not with {recipe.objective.name}",
        ),
        (
            recipe.optimizer.name in ("sgd", "adamw"),
            f"with optimizer.name sgd or adamw, and not with {recipe.optimizer.name}",
        ),
    ):
        if not fits:
            raise UsageError(f"train.cuda_graph can be true only {needed}")
