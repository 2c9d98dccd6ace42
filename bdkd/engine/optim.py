"""The optimizers of a recipe.

All of them can skip a step. torch's fused kernels read ``found_inf`` on the device and never ask
the host. LAMB and NovoGrad come from NVIDIA's apex, whose kernels cannot, so the host waits.
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
    """One optimizer, and what the rest of the trainer must know about it."""

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

    It decorates a function of a ``config`` and parameter groups, which returns a
    :class:`torch.optim.Optimizer`. Each group has its ``weight_decay``. The trainer sets the key
    ``lr`` of the groups before each step.

    Args:
        name: the value of ``optimizer.name``.
        config: a frozen dataclass with the options of the optimizer, a subclass of
            :class:`bdkd.config.OptimizerConfig`.
        moments: how many tensors of a parameter's size it keeps, for the estimate of memory.
        skips_on_device: it reads ``found_inf`` on the device, as torch's fused optimizers do. It
            can then be captured in a CUDA graph. Otherwise the trainer waits for the device in each
            step, and does not call it if gradients are not finite.
        check: raises ``UsageError`` or ``RunError`` if it cannot run on a device. It is called
            before data and networks are created.
        foreign_moments: whether the loaded state of a parameter belongs to another optimizer.
    """

    return OPTIMIZERS.decorator(
        name, config, OptimizerConfig, OptimizerEntry, moments=moments,
        skips_on_device=skips_on_device, check=check, foreign_moments=foreign_moments,
    )  # fmt: skip


def optimizer_entry(config: OptimizerConfig) -> OptimizerEntry:
    """Return the registered optimizer that a recipe names."""
    entry = OPTIMIZERS.find(config.name)
    assert isinstance(entry, OptimizerEntry)
    return entry


@dataclass(frozen=True)
class SGDConfig(OptimizerConfig):
    """Options of sgd: stochastic gradient descent with momentum."""

    momentum: Rate = 0.9
    """Momentum."""
    nesterov: bool = True
    """Use Nesterov momentum."""


@dataclass(frozen=True)
class AdamConfig(OptimizerConfig):
    """Options of adamw, lamb and novograd."""

    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """Decay rates of the two moments."""


@register_optimizer(
    "sgd", SGDConfig, moments=lambda config: int(config.momentum > 0), skips_on_device=True,
    # torch loads AdamW's moments into SGD, which ignores them and starts without momentum.
    foreign_moments=lambda moments: bool(moments.keys() - {"momentum_buffer"}),
)  # fmt: skip
def sgd(config: SGDConfig, groups: Groups) -> Optimizer:
    """Build torch's fused SGD."""
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(
        groups, config.learning_rate, config.momentum, nesterov=nesterov, fused=True
    )
    if config.momentum:
        # The fused kernel leaves new momentum uninitialised if the very first step is skipped.
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
    """Build apex's LAMB without its own clipping: ``train.clip_norm`` clips each network before."""
    # A limit of 0 would divide by it.
    return _build_apex("FusedLAMB", config, groups, max_grad_norm=math.inf)


@register_optimizer("novograd", AdamConfig, moments=lambda config: 1, check=_check_apex)
def novograd(config: AdamConfig, groups: Groups) -> Optimizer:
    """Build apex's NovoGrad."""
    return _build_apex("FusedNovoGrad", config, groups)


def _build_apex(name: str, config: AdamConfig, groups: Groups, **own: Any) -> Optimizer:
    """Build an apex optimizer with its own defaults, except for what the recipe says."""
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
    """Build one optimizer with two parameter groups for each network that trains: with weight decay
    and without. Each group has its network's name and its peak learning rate.

    Args:
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
            f"the optimizer {config.name!r} must be built from the parameter groups that it is "
            "given, not from their parameters"
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
            raise  # NVIDIA's extensions are there, so this is its own failure
        raise RunError(
            f"optimizer.name = {option!r} needs NVIDIA's apex, and the installed apex is PyPI's "
            f"unrelated package: {sys.executable} -m pip uninstall apex, then {remedy}"
        ) from error
