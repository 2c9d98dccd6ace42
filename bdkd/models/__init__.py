"""Networks by name; importing a family registers it.

Bare names (``resnet20``, ``resnet50``, ``mobilenetv2``) are networks for small images, as the
distillation literature defines them; ``imagenet_`` names are torchvision's for 224x224 images;
``timm:NAME`` and ``torchvision:NAME`` are made by those libraries, where they are installed.
"""

from . import (  # noqa: F401
    mobilenet_v1,
    mobilenet_v2,
    resnet,
    resnet_cifar,
    shufflenet_v1,
    shufflenet_v2,
    vgg,
    wide_resnet,
)
from .registry import create_model, list_models

__all__ = ["create_model", "list_models"]
