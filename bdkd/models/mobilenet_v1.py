"""MobileNetV1 for ImageNet: depthwise and pointwise convolutions in turn.

Howard et al., *MobileNets*, arXiv 1704.04861, table 1. Its activation is the paper's ReLU; timm's
``mobilenetv1_100`` has ReLU6.
"""

import math

from torch import Tensor, nn

from .layers import (
    conv1x1,
    conv3x3,
    depthwise3x3,
    divisible_by_8,
    global_average,
    initialise_with_small_classifier,
)
from .registry import check_number, register

# Output channels and stride of each of the thirteen blocks.
_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


def _activated(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(
        convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)
    )


class MobileNetV1(nn.Module):
    """Logits ``(N, num_classes)`` from images ``(N, in_channels, H, W)`` of any size."""

    def __init__(self, num_classes: int, in_channels: int, *, width: float):
        super().__init__()
        before = divisible_by_8(32 * width)
        self.stem = _activated(conv3x3(in_channels, before, stride=2))
        self.blocks = nn.Sequential()
        for channels, stride in _BLOCKS:
            after = divisible_by_8(channels * width)
            self.blocks.append(
                nn.Sequential(
                    _activated(depthwise3x3(before, stride)), _activated(conv1x1(before, after))
                )
            )
            before = after
        self.num_features = before
        self.classifier = nn.Linear(before, num_classes)
        initialise_with_small_classifier(self)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        return global_average(self.blocks(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.forward_features(x))


@register({"imagenet_mobilenet_v1": {}})
def imagenet_mobilenet_v1(num_classes: int, in_channels: int, *, width: float = 1.0) -> MobileNetV1:
    """``width`` multiplies the channels, rounded to multiples of 8."""
    check_number("width", width, "a finite number > 0", lambda x: 0 < x < math.inf)
    return MobileNetV1(num_classes, in_channels, width=width)
