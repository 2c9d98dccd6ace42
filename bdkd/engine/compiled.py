"""Forward passes, losses and backward passes of all networks through ``torch.compile``.

With one rank they are one graph: dynamo takes the backward pass into the graph of the forward pass,
if torch can (after 2.8). With several ranks DDP's hooks must see the gradients during autograd's
backward pass, so that the forward passes and losses are one graph and their backward is another.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bdkd._torch_compat import compile_error, compile_shapes, foreach_add_, traces_backward
from bdkd.config import Recipe
from bdkd.data import Batch
from bdkd.engine.interruption import interruptible
from bdkd.engine.meter import StepOutput
from bdkd.engine.ranges import in_range
from bdkd.engine.state import TrainingState
from bdkd.engine.step import (
    Forward,
    ForwardBackward,
    backward_of,
    eager,
    make_forward,
    outputs_and_gradients,
    overlapped,
)
from bdkd.errors import RunError
from bdkd.objectives import Objective


def choose_forward_backward(state: TrainingState, objective: Objective) -> ForwardBackward:
    """Return the implementation that the recipe asks for."""
    train = state.recipe.train
    if train.compile:
        forward_backward = compiled(state, objective, count_shapes(state.recipe))
        return announce_compilation(forward_backward, prints=state.context.is_rank0)
    return overlapped(state, objective) if train.overlap else eager(state, objective)


def compiled(
    state: TrainingState,
    objective: Objective,
    shapes: int = 1,
    backend: str | Callable = "inductor",
) -> ForwardBackward:
    """Compile the work on a micro-batch.

    Args:
        shapes: number of batch shapes. Each one is compiled by itself, because a graph for images
            of any size does without inductor's choice of layout (pytorch#102670).
    """
    forward = make_forward(state.model, objective, state.recipe.train, state.context)
    if state.context.is_distributed or not traces_backward():
        call = compile_shapes(forward, shapes, backend, backward=False)
        return backward_of(in_range("forward and loss, compiled")(call), state)
    parameters = [p for p in state.networks.parameters() if p.requires_grad]
    call = compile_shapes(_with_backward(forward), shapes, backend, backward=True)

    @in_range("forward, loss and backward, compiled")
    def forward_backward(micro_batch: Batch) -> StepOutput:
        *results, gradients = call(parameters, micro_batch, state.loss_scale())
        add_gradients(parameters, gradients)
        return StepOutput(micro_batch.target, *results)

    return forward_backward


def _with_backward(forward: Forward) -> Callable:
    """Return the one graph: logits, losses and the gradients of the parameters."""

    def losses_and_gradients(
        parameters: Sequence[nn.Parameter], batch: Batch, loss_scale: Tensor
    ) -> tuple[dict, dict, dict, tuple[Tensor | None, ...]]:
        logits, output = forward(batch, loss_scale)
        tensors, upstream = outputs_and_gradients(logits, output, loss_scale)
        gradients = torch.autograd.grad(tensors, parameters, upstream, allow_unused=True)
        # The results must not refer to autograd's graph, which is used up.
        losses = {name: loss.detach() for name, loss in output.losses.items()}
        logits = {name: x.detach() for name, x in logits.items()}
        return logits, losses, output.statistics, gradients

    return losses_and_gradients


def announce_compilation(forward_backward: ForwardBackward, prints: bool) -> ForwardBackward:
    """Print when a new batch shape is compiled, which takes minutes.

    Raises:
        RunError: when called, if torch cannot compile the step.
        CompilationInterrupted: when called, if a signal came while torch compiled.
    """
    seen = set()
    say = _say if prints else lambda line: None

    def announced(micro_batch: Batch) -> StepOutput:
        tensors = (*micro_batch.views, micro_batch.target)
        shape = tuple((x.shape, x.stride(), x.dtype) for x in tensors)
        if shape in seen:
            return forward_backward(micro_batch)
        size = "x".join(map(str, micro_batch.views[0].shape))
        say(f"compiling the step for batches of {size}, which may take minutes")
        began = time.monotonic()
        try:
            with interruptible():
                result = forward_backward(micro_batch)
        except Exception as error:
            if (reason := compile_error(error)) is None:
                raise
            raise RunError(
                f"train.compile: torch could not compile the step: {reason}; mend that or train "
                "without train.compile"
            ) from error
        seen.add(shape)
        say(f"compiled, and done once, in {time.monotonic() - began:.0f} s")
        return result

    return announced


def _say(line: str) -> None:
    with tqdm.external_write_mode():  # clears a progress bar first
        print(line, flush=True)


def count_shapes(recipe: Recipe) -> int:
    """Return how many shapes the batches of a run have."""
    return len(recipe.data.training_sizes()) * (
        1 if recipe.train.accumulate == 1 else 2
    )  # the last part may be smaller


def add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to those of the parameters. As after autograd's backward pass, each has the
    layout of its parameter and memory of its own: fused optimizers and clipping rely on it."""
    held, added, taken = [], [], set()
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if p.grad is not None:
            held.append(p.grad)
            added.append(gradient)
            continue
        # A compiler computes equal gradients once, for example those of two biases that are added.
        if gradient.stride() != p.stride() or gradient.data_ptr() in taken:
            gradient = torch.empty_like(p).copy_(gradient)
        taken.add(gradient.data_ptr())
        p.grad = gradient
    if held:
        foreach_add_(held, added)
