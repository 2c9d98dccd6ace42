"""Forward passes, losses and backward passes of all networks on one micro-batch.

A step calls a :data:`ForwardBackward` function for each micro-batch. It has three implementations:
eager, overlapped (each network on a separate CUDA stream) and compiled
(:mod:`bdkd.engine.compiled`). A CUDA graph (:mod:`bdkd.engine.cuda_graph`) captures a whole step
with any of these implementations.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bdkd.config import TrainConfig
from bdkd.data import Batch
from bdkd.device import autocast
from bdkd.distributed.context import DistributedContext
from bdkd.engine.meter import StepOutput
from bdkd.engine.networks import RunAll, SavedBuffers, run_sequentially
from bdkd.engine.ranges import named_range
from bdkd.engine.state import TrainingState
from bdkd.objectives import Objective, ObjectiveOutput

ForwardBackward = Callable[[Batch], StepOutput]
"""Compute the losses of a micro-batch, and add its gradients to the gradients of the parameters."""

Forward = Callable[[Batch, Tensor], tuple[dict[str, Tensor], ObjectiveOutput]]
"""Compute the logits and losses of a micro-batch, given a 0-dim loss scale."""


def make_forward(
    model: nn.Module,
    objective: Objective,
    options: TrainConfig,
    context: DistributedContext,
    run_all: RunAll = run_sequentially,
) -> Forward:
    """Return a function that computes the forward passes and losses of a micro-batch.

    It is a closure and not a method, so that ``torch.compile`` only adds guards for the variables
    that it uses.
    """
    precision, normaliser = options.precision, float(options.batch_size)

    def forward(batch: Batch, loss_scale: Tensor) -> tuple[dict[str, Tensor], ObjectiveOutput]:
        with autocast(batch.target.device, precision):
            logits = model(batch.views, run_all)
        active = None
        if objective.has_dynamic_active_set:  # all ranks decide from the sums over the whole batch
            sums = objective.measure(logits, batch.target)
            context.all_reduce_sum(sums)
            active = objective.active((sums / normaliser).cpu())
        with named_range("loss"):
            output = objective.loss_and_grad(logits, batch.target, normaliser, loss_scale, active)
            if output.gradients is not None:
                _spread_nan(output.losses, output.gradients)
            return logits, output

    return forward


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([loss.detach() for loss in losses.values()]).sum()


def _spread_nan(losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """If a loss is not finite, set an element of a gradient to NaN.

    All networks on all ranks must skip the same steps, or their weights would diverge. One NaN is
    sufficient, because gradients are averaged over the ranks and a step is skipped if the norm of
    any network is not finite.
    """
    gradient = next(iter(gradients.values()))
    gradient[:1, :1] += torch.where(_total(losses).isfinite(), 0.0, torch.nan)


def outputs_and_gradients(
    logits: Mapping[str, Tensor], output: ObjectiveOutput, loss_scale: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors from which the backward pass starts, and their gradients."""
    if output.gradients is not None:
        return [logits[name] for name in output.gradients], list(output.gradients.values())
    # See _spread_nan.
    factor = torch.where(_total(output.losses).isfinite(), loss_scale, torch.nan)
    losses = list(output.losses.values())
    return losses, [factor.to(loss.dtype) for loss in losses]


def backward_of(forward: Forward, state: TrainingState) -> ForwardBackward:
    """Return a function that calls ``forward`` and then runs autograd's backward pass."""

    def forward_backward(micro_batch: Batch) -> StepOutput:
        loss_scale = state.loss_scale()
        logits, output = forward(micro_batch, loss_scale)
        with named_range("backward"):
            torch.autograd.backward(*outputs_and_gradients(logits, output, loss_scale))
        return StepOutput(micro_batch.target, logits, output.losses, output.statistics)

    return forward_backward


def eager(
    state: TrainingState, objective: Objective, run_all: RunAll = run_sequentially
) -> ForwardBackward:
    """Return a function that runs the forward passes with ``run_all``, without compilation."""
    train = state.recipe.train
    return backward_of(make_forward(state.model, objective, train, state.context, run_all), state)


def overlapped(state: TrainingState, objective: Objective) -> ForwardBackward:
    """Return a function that runs each network on a separate CUDA stream.

    A small network does not use all multiprocessors, so another network can run at the same time.
    This function only assigns the forward passes to streams. Autograd runs each backward pass on
    the stream of its forward pass, after the gradients of the loss, and joins the streams at the
    end. In a CUDA graph the streams become parallel branches.
    """
    streams = Streams(state.device, len(state.networks.members))
    return eager(state, objective, streams.run_all)


class Streams:
    """``count`` streams of a device. The current stream is one of them."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.device, self.module = device, torch.get_device_module(device)
        self.others = [self.module.Stream(device) for _ in range(count - 1)]

    def run_all(self, calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Run each call on a separate stream and return the results.

        The calls start after all earlier work of the current stream. Later work of the current
        stream waits for all calls.
        """
        current = self.module.current_stream(self.device)
        for stream in self.others:  # before the first call, so that they do not wait for it
            stream.wait_stream(current)
        results = []
        for stream, call in zip((current, *self.others), calls, strict=True):
            with self.module.stream(stream):
                results.append(call())
        for stream, result in zip(self.others, results[1:], strict=True):
            current.wait_stream(stream)
            if result.is_cuda:
                result.record_stream(current)  # the other stream allocated its memory
        return results


def warm_up(state: TrainingState, forward_backward: ForwardBackward, micro_batch: Batch) -> None:
    """Run two passes over a micro-batch and discard the gradients, without changing the state."""
    buffers, rng = SavedBuffers(state.networks.buffers()), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(state.device) if state.device.type == "cuda" else None
    training = state.networks.training
    state.networks.train()
    for _ in range(2):
        forward_backward(micro_batch)
        state.networks.zero_grad()
    state.networks.train(training)
    buffers.restore(where=torch.ones((), dtype=torch.bool, device=state.device))
    torch.set_rng_state(rng)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, state.device)
