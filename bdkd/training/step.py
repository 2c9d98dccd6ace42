"""One batch's way through: the whole of a training step, top to bottom."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bdkd.config import TrainConfig
from bdkd.data import Batch
from bdkd.objectives import Objective, ObjectiveOutput
from bdkd.training.distributed import Ranks
from bdkd.training.networks import RunAll, SavedBuffers, in_turn
from bdkd.training.profile import named_range
from bdkd.training.state import TrainingState

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a ``train.precision``; for fp32 it does nothing."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


# Of one part of a step's batch; the gradients are added to what the parameters hold.
Passes = Callable[
    [nn.Module, Objective, Batch, TrainConfig, float, Tensor, Ranks],
    tuple[dict[str, Tensor], ObjectiveOutput],
]


def forward_and_loss(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    options: TrainConfig,
    normaliser: float,
    loss_scale: Tensor,
    ranks: Ranks,
    run: RunAll = in_turn,
) -> tuple[dict[str, Tensor], ObjectiveOutput]:
    """Logits and losses of all networks."""
    with autocast(batch.target.device, options.precision):
        logits = model(batch.views, run)
    active = None
    if objective.controls:  # on the whole batch, so that all ranks decide alike
        sums = objective.measure(logits, batch.target)
        ranks.sum(sums)
        active = objective.active((sums / normaliser).cpu())
    with named_range("loss"):
        return logits, objective(logits, batch.target, normaliser, loss_scale, active)


def scaled_sum(losses: Mapping[str, Tensor], loss_scale: Tensor) -> Tensor:
    """What a step differentiates. Where a loss is not finite it makes every network's gradients
    NaN, on all ranks: all of them skip the step together, or they would drift apart."""
    total = torch.stack(list(losses.values())).sum()
    return total * torch.where(total.detach().isfinite(), loss_scale, torch.nan)


def forward_and_backward(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    options: TrainConfig,
    normaliser: float,
    loss_scale: Tensor,
    ranks: Ranks,
    forward: Passes = forward_and_loss,
) -> tuple[dict[str, Tensor], ObjectiveOutput]:
    """Both passes of all networks, as autograd makes the second of the first."""
    logits, output = forward(model, objective, batch, options, normaliser, loss_scale, ranks)
    with named_range("backward"):
        scaled_sum(output.losses, loss_scale).backward()
    return logits, output


def train_step(
    state: TrainingState,
    objective: Objective,
    batch: Batch,
    options: TrainConfig,
    passes: Passes = forward_and_backward,
) -> None:
    """One optimizer step of all networks over one batch, of which ``batch`` is this rank's part.
    Nothing is read from the device."""
    state.set_learning_rate()
    update(state, objective, batch, options, passes)
    state.advance(options.batch_size)


def update(
    state: TrainingState,
    objective: Objective,
    batch: Batch,
    options: TrainConfig,
    passes: Passes = forward_and_backward,
) -> None:
    """What the device does in a step. It is the same work in every step, and what outlives it is
    changed in place: so it can be captured once and replayed."""
    buffers = SavedBuffers(state.networks.buffers())
    samples, scale = float(options.batch_size), state.loss_scale()
    parts = batch.split(options.accumulate)
    for part in parts:
        with state.exchanging(part is parts[-1]):
            logits, output = passes(
                state.model, objective, part, options, samples, scale, state.ranks
            )
        with named_range("statistics"):
            state.meter.update(logits, part.target, output.losses, output.statistics, samples)

    with named_range("optimizer"):
        state.unscale_gradients()
        finite = state.check_and_clip(options.clip_norm)
        state.optimizer_step(finite)
        buffers.restore(where=~finite)  # a forward with a NaN has moved batch norm's statistics
        state.update_ema(finite)
        state.networks.zero_grad()
        state.count_skipped(finite)


def warm_up(
    state: TrainingState,
    objective: Objective,
    batch: Batch,
    options: TrainConfig,
    passes: Passes = forward_and_backward,
) -> None:
    """Two passes over a batch, whose gradients are thrown away; of the state nothing changes."""
    buffers, rng = SavedBuffers(state.networks.buffers()), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(state.device) if state.device.type == "cuda" else None
    part, training = batch.split(options.accumulate)[-1], state.networks.training
    state.networks.train()
    for _ in range(2):
        passes(
            state.model, objective, part, options, float(options.batch_size), state.loss_scale(),
            state.ranks,
        )  # fmt: skip
        state.networks.zero_grad()
    state.networks.train(training)
    buffers.restore(where=torch.ones((), dtype=torch.bool, device=state.device))
    torch.set_rng_state(rng)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, state.device)
