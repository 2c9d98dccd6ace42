"""Networks by name; importing a family registers it.

Bare names (``resnet20``, ``resnet50``, ``mobilenetv2``) are networks for small images, as in the
distillation literature. ``imagenet_`` names are torchvision's networks for 224x224 images.
``timm:NAME`` and ``torchvision:NAME`` are built by those libraries, if they are installed.
"""

from . import mobilenet, resnet, shufflenet, vgg, wide_resnet  # noqa: F401
from .registry import create_model, list_models, register_model

__all__ = ["create_model", "list_models", "register_model"]
