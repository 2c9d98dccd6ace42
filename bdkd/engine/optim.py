"""The optimizers of a recipe. Each one is an entry of :data:`OPTIMIZERS`; nothing else knows them.

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

from bdkd.config import NetworkConfig, OptimizerConfig
from bdkd.engine.networks import Networks
from bdkd.errors import RunError, UsageError

APEX_DEVICES = ("cuda",)

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer, and what the rest of the trainer must know about it."""

    build: Callable[[OptimizerConfig, Groups], Optimizer]
    moments: Callable[[OptimizerConfig], int]
    """Tensors of a parameter's size that it keeps for each parameter."""
    skips_on_device: bool = True
    """It reads ``found_inf`` on the device. Such an optimizer can be captured in a CUDA graph."""
    apex_class: str | None = None
    """Name in ``apex.optimizers``; it needs a GPU."""
    foreign_moments: Callable[[Mapping[str, Any]], bool] = lambda moments: False
    """Whether the loaded state of a parameter belongs to another optimizer."""


def _sgd(config: OptimizerConfig, groups: Groups) -> Optimizer:
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


def _adamw(config: OptimizerConfig, groups: Groups) -> Optimizer:
    return torch.optim.AdamW(groups, config.learning_rate, config.betas, fused=True)


def _apex(config: OptimizerConfig, groups: Groups) -> Optimizer:
    """Build an apex optimizer with its own defaults, except for what the recipe says."""
    check_optimizer(config, groups[0]["params"][0].device)
    make = getattr(_import_apex(config.name), str(OPTIMIZERS[config.name].apex_class))
    # train.clip_norm clips each network before. (A limit of 0 would divide by it.)
    own = {"max_grad_norm": math.inf} if config.name == "lamb" else {}
    try:
        return make(
            groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay,
            **own,
        )  # fmt: skip
    except (RuntimeError, ImportError) as error:
        raise RunError(
            f"optimizer.name = {config.name!r}: {error}: build apex with its CUDA extensions, see "
            "https://github.com/NVIDIA/apex"
        ) from error


OPTIMIZERS = {
    "sgd": OptimizerSpec(
        _sgd,
        moments=lambda config: int(config.momentum > 0),
        # torch loads AdamW's moments into SGD, which ignores them and starts without momentum.
        foreign_moments=lambda moments: bool(moments.keys() - {"momentum_buffer"}),
    ),
    "adamw": OptimizerSpec(_adamw, moments=lambda config: 2),
    "lamb": OptimizerSpec(
        _apex, moments=lambda config: 2, skips_on_device=False, apex_class="FusedLAMB"
    ),
    "novograd": OptimizerSpec(
        _apex, moments=lambda config: 1, skips_on_device=False, apex_class="FusedNovoGrad"
    ),
}


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
        UsageError, RunError: see :func:`check_optimizer`.
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
    return OPTIMIZERS[config.name].build(config, groups)


def check_optimizer(config: OptimizerConfig, device: torch.device) -> None:
    """Check that an optimizer can be built on a device, before there are networks.

    Raises:
        UsageError: it needs a GPU.
        RunError: NVIDIA's apex is missing, or the installed apex is another package.
    """
    apex_class = OPTIMIZERS[config.name].apex_class
    if apex_class is None:
        return
    if device.type not in APEX_DEVICES:
        raise UsageError(
            f"optimizer.name must be sgd or adamw on a CPU, got {config.name}: apex's {apex_class} "
            "needs a GPU"
        )
    _import_apex(config.name)


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
