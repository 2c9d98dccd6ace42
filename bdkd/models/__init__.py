"""Networks by name; importing a family registers it."""

from . import resnet_cifar, wide_resnet  # noqa: F401
from .registry import create_model, list_models

__all__ = ["create_model", "list_models"]
