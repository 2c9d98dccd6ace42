"""Networks by name. Importing a family registers its networks.

Names without a prefix (``resnet20``, ``resnet50``, ``mobilenetv2``) are networks for small images,
as in the distillation literature. Names with ``imagenet_`` are networks for 224x224 images, most of
them torchvision's. ``timm:NAME`` and ``torchvision:NAME`` are networks of these libraries.
"""

from . import mobilenet, resnet, shufflenet, vgg, wide_resnet  # noqa: F401
from .registry import create_model, list_models, register_model

__all__ = ["create_model", "list_models", "register_model"]
