"""The BD-KD loss and its kernels. For each sample, the loss balances the forward and reverse KL.

Importing this package imports torch, but no other large package and no part of the trainer.
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
