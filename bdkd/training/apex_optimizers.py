"""LAMB and NovoGrad from NVIDIA's apex, where it is installed. PyPI's package of that name is
another."""

import importlib
import importlib.util
import math
import sys
from typing import Any

import torch

from bdkd.config import OptimizerConfig
from bdkd.errors import RunError, UsageError

CLASSES = {"lamb": "FusedLAMB", "novograd": "FusedNovoGrad"}
DEVICES = ("cuda",)


def build(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """FusedLAMB or FusedNovoGrad over parameter groups, with apex's own defaults but for what the
    recipe says: learning rates, ``betas`` and weight decay.

    They cannot skip a step on the device: where one must be, the host waits to learn of it.

    Raises:
        UsageError: the networks are on a CPU.
        RunError: apex is missing, is PyPI's, or was built without its CUDA extensions.
    """
    name = CLASSES[config.name]
    check(config, groups[0]["params"][0].device)
    optimizers = _import(config.name)
    # Gradients are clipped before, network by network, by train.clip_norm. (A limit of 0 would
    # divide by it.)
    own = {"max_grad_norm": math.inf} if config.name == "lamb" else {}
    try:
        return getattr(optimizers, name)(
            groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay,
            **own,
        )  # fmt: skip
    except (RuntimeError, ImportError) as error:
        raise RunError(
            f"optimizer.name = {config.name!r}: {error}: build apex with its CUDA extensions, see "
            "https://github.com/NVIDIA/apex"
        ) from error


def check(config: OptimizerConfig, device: torch.device) -> None:
    """Raise ``UsageError`` or ``RunError``, as :func:`build` does, before there are networks."""
    if config.name not in CLASSES:
        return
    if device.type not in DEVICES:
        raise UsageError(
            f"optimizer.name must be sgd or adamw on a CPU, got {config.name}: apex's "
            f"{CLASSES[config.name]} needs a GPU"
        )
    _import(config.name)


def _import(option: str) -> Any:
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
