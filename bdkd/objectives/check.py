"""Check an objective from a plugin on random logits before training starts."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bdkd.errors import UsageError
from bdkd.objectives.base import Objective, ObjectiveOutput


def check_objective(
    objective: Objective, networks: Iterable[str], samples: int, classes: int, device: torch.device
) -> None:
    """Check that an objective implements its interface, on random logits ``(samples, classes)``.

    Random states do not change. The objective may change its own state, so pass an instance that
    is not used for training.

    Args:
        networks: names of the networks.

    Raises:
        UsageError: the objective raises an error, a loss is missing or not 0-dim, a loss depends on
            the logits of another network, or a statistic does not have one value per sample.
    """
    generator = torch.Generator().manual_seed(0)
    logits = {
        name: torch.randn(samples, classes, generator=generator).to(device) for name in networks
    }
    trained = [name for name in logits if name not in objective.frozen]
    for name in trained:
        logits[name].requires_grad_()
    target = (torch.arange(samples) % classes).to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            objective.advance(0.0, device)
            active = None
            if objective.has_dynamic_active_set:
                active = objective.active((objective.measure(logits, target) / samples).cpu())
            output = objective.loss_and_grad(logits, target, float(samples), 1.0, active)
        except Exception as error:
            failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UsageError(
                f"the objective {objective.config.name!r} fails on logits {(samples, classes)}: "
                f"{failed} (--debug shows where)"
            ) from error
    expected = [name for name in trained if active is None or name in active]
    problem = _shapes(output, expected, logits) or _dependence(output, logits, trained)
    if problem:
        raise UsageError(f"the objective {objective.config.name!r} {problem}")


def _shapes(output: Any, trained: list[str], logits: Mapping[str, Tensor]) -> str:
    """Return what is wrong with the shapes and names of an output, or an empty string."""
    if not isinstance(output, ObjectiveOutput):
        return f"must return an ObjectiveOutput, got {type(output).__name__}"
    if output.losses.keys() != set(trained):
        return (
            f"must return a loss for each network that trains ({', '.join(trained)}), got "
            f"{', '.join(output.losses) or 'none'}"
        )
    for name, loss in output.losses.items():
        if loss.ndim:
            found = tuple(loss.shape)
            return f"must return 0-dim losses; the loss of {name} has the shape {found}"
    for name, statistic in output.statistics.items():
        samples = len(next(iter(logits.values())))
        if statistic.shape != (samples,):
            found = tuple(statistic.shape)
            return (
                f"must return statistics of the shape ({samples},), one value for each sample; "
                f"{name} has the shape {found}"
            )
    for name, gradient in (output.gradients or {}).items():
        if name not in output.losses or gradient.shape != logits[name].shape:
            return (
                "must return gradients with the shapes of the logits, and only for networks that "
                f"train; {name} does not match"
            )
    return ""


def _dependence(output: ObjectiveOutput, logits: Mapping[str, Tensor], trained: list[str]) -> str:
    """Return which loss does not depend on exactly its own logits, or an empty string."""
    if output.gradients is not None:
        return ""  # the trainer does not differentiate these losses
    for name, loss in output.losses.items():
        if not loss.requires_grad:
            return f"returns a loss of {name} that does not depend on its logits"
        inputs = [logits[other] for other in trained]
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        for other, gradient in zip(trained, gradients, strict=True):
            if other != name and gradient is not None and bool((gradient != 0).any()):
                return (
                    f"returns a loss of {name} that depends on the logits of {other}: detach them"
                )
    return ""
