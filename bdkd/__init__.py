"""bdkd: train a compact image classifier together with its teacher (BD-KD).

``import bdkd`` imports torch and nothing heavier. The trainer's packages are imported when used.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

from bdkd.interrupts import exit_during_imports

exit_during_imports()
with warnings.catch_warnings():
    # Without numpy, which the loss does not need, torch warns when it is imported.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    from bdkd_kernels import (
        BDKDLoss,
        BDKDOutput,
        BDKDStats,
        available_backends,
        bdkd_loss,
        bdkd_loss_and_grad,
    )

if TYPE_CHECKING:
    from bdkd_kernels.compat import DistillKL, LigerJSD, LigerKLDIVLoss, kd_loss

    from bdkd.data import register_source
    from bdkd.engine.optim import register_optimizer
    from bdkd.metrics import register_metric
    from bdkd.models import create_model, list_models, register_model
    from bdkd.objectives import register_objective

    __version__: str

# Imported when they are first used
_LATE = {
    **dict.fromkeys(("DistillKL", "LigerJSD", "LigerKLDIVLoss", "kd_loss"), "bdkd_kernels.compat"),
    **dict.fromkeys(("create_model", "list_models", "register_model"), "bdkd.models"),
    "register_metric": "bdkd.metrics",
    "register_objective": "bdkd.objectives",
    "register_optimizer": "bdkd.engine.optim",
    "register_source": "bdkd.data",
}

__all__ = [
    "BDKDLoss", "BDKDOutput", "BDKDStats", "DistillKL", "LigerJSD", "LigerKLDIVLoss",
    "available_backends", "bdkd_loss", "bdkd_loss_and_grad", "create_model", "kd_loss",
    "list_models", "register_metric", "register_model", "register_objective", "register_optimizer",
    "register_source",
]  # fmt: skip


def __getattr__(name: str):
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    if name == "__version__":
        return import_module("bdkd.extras").bdkd_version()
    raise AttributeError(f"module 'bdkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
