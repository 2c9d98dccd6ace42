"""One batch's way through: the whole of a training step, top to bottom."""

from collections.abc import Callable

import torch
from torch import Tensor

from bdkd.config import TrainConfig
from bdkd.data import Batch
from bdkd.objectives import Objective, ObjectiveOutput
from bdkd.training.networks import Networks, SavedBuffers
from bdkd.training.state import TrainingState

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Forward = Callable[
    [Networks, Objective, Batch, TrainConfig, float, Tensor],
    tuple[dict[str, Tensor], ObjectiveOutput],
]


def forward_and_loss(
    networks: Networks,
    objective: Objective,
    batch: Batch,
    options: TrainConfig,
    normaliser: float,
    loss_scale: Tensor,
) -> tuple[dict[str, Tensor], ObjectiveOutput]:
    """Logits and losses of all networks: what ``train.compile`` compiles as one."""
    dtype = AUTOCAST[options.precision]
    with torch.autocast(batch.target.device.type, dtype=dtype, enabled=dtype is not None):
        logits = networks(batch.views)
    active = None
    if objective.controls:
        active = objective.active((objective.measure(logits, batch.target) / normaliser).cpu())
    return logits, objective(logits, batch.target, normaliser, loss_scale, active)


def train_step(
    state: TrainingState,
    objective: Objective,
    batch: Batch,
    options: TrainConfig,
    forward: Forward = forward_and_loss,
) -> None:
    """One optimizer step of all networks over one batch. Nothing is read from the device."""
    buffers = SavedBuffers(state.networks.buffers())
    samples = float(len(batch.target))
    for part in batch.split(options.accumulate):
        logits, output = forward(
            state.networks, objective, part, options, samples, state.loss_scale()
        )
        total = torch.stack(list(output.losses.values())).sum()
        # A loss that is not finite makes every network's gradients NaN: all of them skip the step
        # together, or the pair would drift apart.
        total = total * torch.where(total.detach().isfinite(), 1.0, torch.nan)
        state.scaler.scale(total).backward()
        state.meter.update(logits, part.target, output.losses, output.statistics, samples)

    state.scaler.unscale_(state.optimizer)
    finite = state.check_and_clip(options.clip_norm)
    state.set_learning_rate()
    state.optimizer_step(finite)
    buffers.restore(where=~finite)  # a forward pass with a NaN has moved batch norm's statistics
    state.update_ema(finite)
    state.optimizer.zero_grad()
    state.advance(len(batch.target), finite)
