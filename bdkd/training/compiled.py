"""The two passes of all networks through ``torch.compile``: forward, losses and backward.

One rank alone has them as one graph: dynamo takes the backward pass into the graph of the forward
pass (behind a flag that torch 2.8 does not have and 2.13 has). With several ranks DDP's hooks must
see the gradients while autograd is making them, and where torch lacks the flag nothing else is
possible: there forward passes and losses are one graph and their backward passes another.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bdkd.config import Recipe, TrainConfig
from bdkd.data import Batch
from bdkd.errors import RunError
from bdkd.objectives import Objective, ObjectiveOutput
from bdkd.training.checkpoint import first_line
from bdkd.training.distributed import Ranks
from bdkd.training.profile import in_range
from bdkd.training.step import Passes, forward_and_backward, forward_and_loss, scaled_sum

if TYPE_CHECKING:
    from bdkd.training.setup import Setup

_FLAG = "trace_autograd_ops"
_WITHOUT = "or train without train.compile"


def compiled(
    model: nn.Module, alone: bool, shapes: int = 1, backend: str | Callable = "inductor"
) -> Passes:
    """:func:`forward_and_backward`, compiled.

    Args:
        model: the networks that it will be called with.
        alone: one rank trains, without DDP.
        shapes: of batches that will come. Each is compiled by itself: a graph for images of any
            size does without inductor's choice of layout (pytorch#102670).
    """
    from torch._dynamo import config  # a second to import

    one_graph = alone and hasattr(config, _FLAG)
    # Beyond its limit dynamo goes on uncompiled, so that must be more than the shapes.
    settings = {"recompile_limit": config.recompile_limit + shapes}
    if one_graph:
        settings[_FLAG] = True
    function = losses_and_gradients if one_graph else forward_and_loss
    call = config.patch(settings)(torch.compile(function, dynamic=False, backend=backend))
    if not one_graph:
        return partial(forward_and_backward, forward=in_range("forward and loss, compiled")(call))
    parameters = [p for p in model.parameters() if p.requires_grad]

    @in_range("forward, loss and backward, compiled")
    def passes(*arguments: object) -> tuple[dict[str, Tensor], ObjectiveOutput]:
        logits, output, gradients = call(parameters, *arguments)
        add_gradients(parameters, gradients)
        return logits, output

    return passes


def announced(passes: Passes) -> Passes:
    """Compiled passes, whose first rank says when they compile, which takes minutes, and which
    raise ``RunError`` where torch cannot compile them."""
    seen = set()

    def watched(*arguments: Any) -> tuple[dict[str, Tensor], ObjectiveOutput]:
        _, _, batch, _, _, _, ranks = arguments
        say = _say if ranks.first else lambda line: None
        shape = tuple((x.shape, x.stride(), x.dtype) for x in (*batch.views, batch.target))
        if shape in seen:
            return passes(*arguments)
        size = "x".join(map(str, batch.views[0].shape))
        say(f"compiling the step for batches of {size}, which may take minutes")
        began = time.monotonic()
        try:
            result = passes(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            inner = getattr(error, "inner_exception", error)
            raise RunError(
                f"train.compile: torch could not compile the step: {type(inner).__name__}: "
                f"{first_line(inner)}; mend that {_WITHOUT}"
            ) from error
        seen.add(shape)
        say(f"compiled, and done once, in {time.monotonic() - began:.0f} s")
        return result

    return watched


def _say(line: str) -> None:
    with tqdm.external_write_mode():  # a progress bar makes way for it
        print(line, flush=True)


def check(setup: "Setup") -> None:
    """Raise ``RunError`` where nothing can be compiled on a CPU."""
    if setup.device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RunError(
            "train.compile needs a C++ compiler on a CPU, and there is none: install g++, name "
            f"another in the environment variable CXX, {_WITHOUT}"
        ) from error


def count_shapes(recipe: Recipe) -> int:
    """How many shapes the batches of a run have."""
    sides = {side for _, side in recipe.data.progressive} | {recipe.data.image_size}
    return len(sides) * (1 if recipe.train.accumulate == 1 else 2)  # the last part may be smaller


def losses_and_gradients(
    parameters: Sequence[nn.Parameter],
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    options: TrainConfig,
    normaliser: float,
    loss_scale: Tensor,
    ranks: Ranks,
) -> tuple[dict[str, Tensor], ObjectiveOutput, tuple[Tensor | None, ...]]:
    """Logits, losses and the gradients of the parameters: the one graph."""
    logits, output = forward_and_loss(
        model, objective, batch, options, normaliser, loss_scale, ranks
    )
    gradients = torch.autograd.grad(
        scaled_sum(output.losses, loss_scale), parameters, allow_unused=True
    )
    # What leaves the graph must not hold on to autograd's, which is used up.
    losses = {name: loss.detach() for name, loss in output.losses.items()}
    return (
        {name: x.detach() for name, x in logits.items()},
        ObjectiveOutput(losses, output.statistics),
        gradients,
    )


def add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to what the parameters hold, in their own layout, each in memory of its own:
    what autograd sees to, and what fused optimizers and clipping rely on."""
    held, added, taken = [], [], set()
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if p.grad is not None:
            held.append(p.grad)
            added.append(gradient)
            continue
        # A compiler makes equal gradients once: those of two biases that are added up, say.
        if gradient.stride() != p.stride() or gradient.data_ptr() in taken:
            gradient = torch.empty_like(p).copy_(gradient)
        taken.add(gradient.data_ptr())
        p.grad = gradient
    if held:
        torch._foreach_add_(held, added)
