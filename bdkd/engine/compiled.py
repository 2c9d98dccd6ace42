"""Compile the forward passes, losses and backward passes of all networks with ``torch.compile``.

With one rank and torch 2.9 or later, all of them are one graph. With several ranks, the hooks of
DDP must receive the gradients during autograd's backward pass. The forward passes and losses are
then one graph, and the backward passes are another graph.
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
    """Return the implementation that the recipe selects."""
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
        shapes: number of batch shapes. Each shape is compiled separately, because inductor does not
            optimize the memory layout in graphs with dynamic shapes (pytorch#102670).
        backend: the backend of ``torch.compile``.
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
    """Return a function that computes logits, losses and the gradients of the parameters."""

    def losses_and_gradients(
        parameters: Sequence[nn.Parameter], batch: Batch, loss_scale: Tensor
    ) -> tuple[dict, dict, dict, tuple[Tensor | None, ...]]:
        logits, output = forward(batch, loss_scale)
        tensors, upstream = outputs_and_gradients(logits, output, loss_scale)
        gradients = torch.autograd.grad(tensors, parameters, upstream, allow_unused=True)
        # The results must not refer to autograd's graph, whose buffers are freed.
        losses = {name: loss.detach() for name, loss in output.losses.items()}
        logits = {name: x.detach() for name, x in logits.items()}
        return logits, losses, output.statistics, gradients

    return losses_and_gradients


def announce_compilation(forward_backward: ForwardBackward, prints: bool) -> ForwardBackward:
    """Return a function that also prints a message when it compiles a new batch shape.

    Compilation may take minutes.

    Args:
        prints: whether this rank prints.

    Raises:
        RunError: raised by the returned function if torch cannot compile the step.
        CompilationInterrupted: raised by the returned function if a signal came during compilation.
    """
    seen = set()
    say = _say if prints else lambda line: None

    def announced(micro_batch: Batch) -> StepOutput:
        tensors = (*micro_batch.views, micro_batch.target)
        shape = tuple((x.shape, x.stride(), x.dtype) for x in tensors)
        if shape in seen:
            return forward_backward(micro_batch)
        size = "x".join(map(str, micro_batch.views[0].shape))
        say(f"compiling the step for batches of {size}; this may take minutes")
        began = time.monotonic()
        try:
            with interruptible():
                result = forward_backward(micro_batch)
        except Exception as error:
            if (reason := compile_error(error)) is None:
                raise
            raise RunError(
                f"train.compile: torch could not compile the step: {reason}; fix the cause or "
                "train without train.compile"
            ) from error
        seen.add(shape)
        say(f"compiled and ran the step once in {time.monotonic() - began:.0f} s")
        return result

    return announced


def _say(line: str) -> None:
    with tqdm.external_write_mode():  # clears the progress bar before printing
        print(line, flush=True)


def count_shapes(recipe: Recipe) -> int:
    """Return the number of different micro-batch shapes in a run."""
    return len(recipe.data.training_sizes()) * (
        1 if recipe.train.accumulate == 1 else 2
    )  # the last micro-batch may be smaller


def add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to ``p.grad`` of each parameter.

    As after autograd's backward pass, each ``p.grad`` has the layout of its parameter and does not
    share memory with another gradient. Fused optimizers and gradient clipping rely on this.
    """
    held, added, taken = [], [], set()
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if p.grad is not None:
            held.append(p.grad)
            added.append(gradient)
            continue
        # A compiler may return one tensor for equal gradients, for example for two added biases.
        if gradient.stride() != p.stride() or gradient.data_ptr() in taken:
            gradient = torch.empty_like(p).copy_(gradient)
        taken.add(gradient.data_ptr())
        p.grad = gradient
    if held:
        foreach_add_(held, added)
