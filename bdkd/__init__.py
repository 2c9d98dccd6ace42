"""bdkd: train a compact image classifier beside its teacher, with BD-KD's balanced divergences.

``import bdkd`` imports torch and nothing heavier; the trainer's rooms are imported when used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from bdkd_kernels import (
    BDKDLoss,
    BDKDOutput,
    BDKDStats,
    available_backends,
    bdkd_loss,
    bdkd_loss_and_grad,
)

if TYPE_CHECKING:
    from bdkd.models import create_model, list_models

__all__ = [
    "BDKDLoss",
    "BDKDOutput",
    "BDKDStats",
    "available_backends",
    "bdkd_loss",
    "bdkd_loss_and_grad",
    "create_model",
    "list_models",
]


def __getattr__(name: str):
    if name in ("create_model", "list_models"):
        return getattr(import_module("bdkd.models"), name)
    raise AttributeError(f"module 'bdkd' has no attribute {name!r}")
