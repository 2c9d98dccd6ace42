"""The optimizers of a recipe.

With each optimizer the trainer can skip a step. The fused kernels of torch read ``found_inf`` on
the device, so the host does not wait. LAMB and NovoGrad come from NVIDIA's apex, whose kernels do
not support this, so the host waits for the gradients of each step.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bdkd.config import NetworkConfig, OptimizerConfig, Rate
from bdkd.engine.networks import Networks
from bdkd.errors import RunError, UsageError
from bdkd.registry import OPTIMIZERS, Entry

APEX_DEVICES = ("cuda",)

Groups = list[dict[str, Any]]
Build = Callable[[Any, Groups], Optimizer]


@dataclass(frozen=True)
class OptimizerEntry(Entry):
    """A registered optimizer. See :func:`register_optimizer` for the fields."""

    moments: Callable[[Any], int]
    skips_on_device: bool
    check: Callable[[Any, torch.device], object]
    foreign_moments: Callable[[Mapping[str, Any]], bool]


def register_optimizer(
    name: str,
    config: type[OptimizerConfig] = OptimizerConfig,
    *,
    moments: Callable[[Any], int] = lambda config: 2,
    skips_on_device: bool = False,
    check: Callable[[Any, torch.device], object] = lambda config, device: None,
    foreign_moments: Callable[[Mapping[str, Any]], bool] = lambda moments: False,
) -> Callable[[Build], Build]:
    """Return a decorator that registers an optimizer.

    The decorated function receives a ``config`` and parameter groups, and returns a
    :class:`torch.optim.Optimizer`. Each group contains its ``weight_decay``. The trainer sets the
    key ``lr`` of the groups before each step.

    Args:
        name: the value of ``optimizer.name``.
        config: a frozen dataclass with the options of the optimizer, a subclass of
            :class:`bdkd.config.OptimizerConfig`.
        moments: returns how many tensors of a parameter's size the optimizer keeps. The estimate
            of the memory uses it.
        skips_on_device: whether the optimizer reads ``found_inf`` on the device, like the fused
            optimizers of torch. It can then be captured in a CUDA graph. Otherwise the trainer
            waits for the device in each step, and does not call the optimizer if gradients are not
            finite.
        check: raises ``UsageError`` or ``RunError`` if the optimizer cannot run on a device. The
            trainer calls it before it creates the data source and the networks.
        foreign_moments: returns whether the loaded state of a parameter belongs to another
            optimizer.
    """

    return OPTIMIZERS.decorator(
        name, config, OptimizerConfig, OptimizerEntry, moments=moments,
        skips_on_device=skips_on_device, check=check, foreign_moments=foreign_moments,
    )  # fmt: skip


def optimizer_entry(config: OptimizerConfig) -> OptimizerEntry:
    """Return the registered optimizer of a configuration."""
    entry = OPTIMIZERS.find(config.name)
    assert isinstance(entry, OptimizerEntry)
    return entry


@dataclass(frozen=True)
class SGDConfig(OptimizerConfig):
    """Options of sgd: stochastic gradient descent with momentum."""

    momentum: Rate = 0.9
    """Momentum. 0 disables it."""
    nesterov: bool = True
    """Use Nesterov momentum. Ignored if momentum is 0."""


@dataclass(frozen=True)
class AdamConfig(OptimizerConfig):
    """Options of adamw, lamb and novograd."""

    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """Decay rates of the moving averages of the gradient and of its square."""


@register_optimizer(
    "sgd", SGDConfig, moments=lambda config: int(config.momentum > 0), skips_on_device=True,
    # torch loads the moments of AdamW into SGD without an error. SGD then starts without momentum.
    foreign_moments=lambda moments: bool(moments.keys() - {"momentum_buffer"}),
)  # fmt: skip
def sgd(config: SGDConfig, groups: Groups) -> Optimizer:
    """Build torch's fused SGD."""
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(
        groups, config.learning_rate, config.momentum, nesterov=nesterov, fused=True
    )
    if config.momentum:
        # If the first step is skipped, the fused kernel does not initialise the momentum.
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


@register_optimizer("adamw", AdamConfig, skips_on_device=True)
def adamw(config: AdamConfig, groups: Groups) -> Optimizer:
    """Build torch's fused AdamW."""
    return torch.optim.AdamW(groups, config.learning_rate, config.betas, fused=True)


def _check_apex(config: AdamConfig, device: torch.device) -> None:
    if device.type not in APEX_DEVICES:
        raise UsageError(
            f"optimizer.name must be sgd or adamw on a CPU, got {config.name}: NVIDIA's apex needs "
            "a GPU"
        )
    _import_apex(config.name)


@register_optimizer("lamb", AdamConfig, check=_check_apex)
def lamb(config: AdamConfig, groups: Groups) -> Optimizer:
    """Build apex's LAMB without its own clipping. ``train.clip_norm`` clips each network before."""
    # apex divides by max_grad_norm, so 0 does not disable the clipping.
    return _build_apex("FusedLAMB", config, groups, max_grad_norm=math.inf)


@register_optimizer("novograd", AdamConfig, moments=lambda config: 1, check=_check_apex)
def novograd(config: AdamConfig, groups: Groups) -> Optimizer:
    """Build apex's NovoGrad."""
    return _build_apex("FusedNovoGrad", config, groups)


def _build_apex(name: str, config: AdamConfig, groups: Groups, **own: Any) -> Optimizer:
    """Build an apex optimizer. Options that the recipe does not set have the defaults of apex."""
    _check_apex(config, groups[0]["params"][0].device)
    try:
        return getattr(_import_apex(config.name), name)(
            groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay,
            **own,
        )  # fmt: skip
    except (RuntimeError, ImportError) as error:
        raise RunError(
            f"optimizer.name = {config.name!r}: {error}: build apex with its CUDA extensions, see "
            "https://github.com/NVIDIA/apex"
        ) from error


def build_optimizer(
    networks: Networks,
    configs: Mapping[str, NetworkConfig],
    config: OptimizerConfig,
    local_part: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
) -> Optimizer:
    """Build one optimizer for all networks that train.

    Each network has two parameter groups, one with weight decay and one without. Each group
    contains the name of its network and its peak learning rate.

    Args:
        configs: the networks of the recipe by name.
        local_part: returns the part of a sharded parameter that this rank updates.

    Raises:
        UsageError, RunError: the optimizer cannot run on this device.
    """
    groups: Groups = []
    for name, network in networks.trained().items():
        peak_rate = configs[name].learning_rate or config.learning_rate
        least = 0 if config.decay_norms else 2  # norms and biases have one dimension
        own = [local_part(p) for p in network.parameters()]
        decayed = [p for p in own if p.ndim >= least]
        not_decayed = [p for p in own if p.ndim < least]
        for parameters, decay in ((decayed, config.weight_decay), (not_decayed, 0.0)):
            if parameters:
                group = {"params": parameters, "weight_decay": decay}
                groups.append({**group, "network": name, "peak_rate": peak_rate})
    optimizer = optimizer_entry(config).build(config, groups)
    if not all("peak_rate" in group for group in optimizer.param_groups):
        raise UsageError(
            f"the optimizer {config.name!r} must be built from the parameter groups that its "
            "function receives, not from their parameters"
        )
    return optimizer


def _import_apex(option: str) -> Any:
    try:
        return importlib.import_module("apex.optimizers")
    except ImportError as error:
        remedy = "build NVIDIA's, see https://github.com/NVIDIA/apex, or use adamw"
        if importlib.util.find_spec("apex") is None:
            raise RunError(
                f"optimizer.name = {option!r} needs NVIDIA's apex, which is not installed: {remedy}"
            ) from error
        if importlib.util.find_spec("amp_C") is not None:
            raise  # NVIDIA's apex is installed, and its import failed
        raise RunError(
            f"optimizer.name = {option!r} needs NVIDIA's apex, and the installed apex is PyPI's "
            f"unrelated package: {sys.executable} -m pip uninstall apex, then {remedy}"
        ) from error
