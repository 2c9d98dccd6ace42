"""The BD-KD loss, forward and reverse KL balanced sample by sample, and its kernels.

The package imports torch and nothing heavier, and nothing of the trainer.
"""

from .backends import available_backends
from .loss import BDKDLoss, bdkd_loss, bdkd_loss_and_grad
from .types import BDKDOutput, BDKDStats

__all__ = [
    "BDKDLoss",
    "BDKDOutput",
    "BDKDStats",
    "available_backends",
    "bdkd_loss",
    "bdkd_loss_and_grad",
]
