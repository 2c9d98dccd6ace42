"""VGG networks with batch norm and one linear layer, as in the distillation literature.

Simonyan and Zisserman, arXiv 1409.1556, table 1, with a global average and one linear layer instead
of three linear layers. vgg8 has one convolution per stage.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import global_average, initialise
from .registry import register_model

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2)}
_MIN_SIDE = 8  # three poolings reduce 8 pixels to one


class VGG(nn.Module):
    """Maps images ``(N, in_channels, H, W)`` of at least 8x8 pixels to logits ``(N, num_classes)``.

    The first three stages halve the sides of the image. For images of at least 64x64 pixels, the
    fourth stage halves them too.
    """

    def __init__(self, num_classes: int, in_channels: int, *, depth: int):
        super().__init__()
        self.num_features = _WIDTHS[-1]
        self.stages = nn.ModuleList()
        before = in_channels
        for after, count in zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True):
            stage = nn.Sequential()
            for _ in range(count):
                # The bias is redundant before a norm, but the literature counts its parameters.
                convolution = nn.Conv2d(before, after, 3, padding=1)
                stage.extend([convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)])
                before = after
            self.stages.append(stage)
        self.classifier = nn.Linear(self.num_features, num_classes)
        initialise(self, small_classifier=True)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        height, width = x.shape[-2:]
        if min(height, width) < _MIN_SIDE:
            raise ValueError(
                f"VGG networks need images of at least {_MIN_SIDE}x{_MIN_SIDE} pixels, "
                f"got {height}x{width}"
            )
        poolings = 4 if min(height, width) >= 64 else 3
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < poolings:
                x = F.max_pool2d(x, 2)
        return global_average(x)

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.forward_features(x))


@register_model({f"vgg{depth}": {"depth": depth} for depth in _CONVOLUTIONS})
def vgg(num_classes: int, in_channels: int, *, depth: int) -> VGG:
    """Build a VGG network."""
    return VGG(num_classes, in_channels, depth=depth)
