"""Residual networks for small images: three stages of basic blocks, 6n + 2 layers deep.

He et al., *Deep Residual Learning*, arXiv 1512.03385, section 4.2, with the projection shortcuts
(1x1 convolution and batch norm where the shape changes) that the distillation literature uses.
"""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv1x1, conv3x3, global_average, initialise
from .registry import check_number, register

_NARROW = (16, 16, 32, 64)  # the stem, then the three stages
_WIDE = (32, 64, 128, 256)  # the "x4" networks: only their stages are four times as wide


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the activation comes after the sum."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else nn.Sequential(
                conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class ResNetCIFAR(nn.Module):
    """Logits ``(N, num_classes)`` from images ``(N, in_channels, H, W)`` of any size."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        depth: int,
        widths: tuple[int, int, int, int],
    ):
        super().__init__()
        self.num_features = widths[-1]
        self.conv = conv3x3(in_channels, widths[0])
        self.bn = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        for index, (before, after) in enumerate(pairwise(widths)):
            first = BasicBlock(before, after, stride=1 if index == 0 else 2)
            rest = (BasicBlock(after, after, stride=1) for _ in range((depth - 2) // 6 - 1))
            self.stages.append(nn.Sequential(first, *rest))
        self.classifier = nn.Linear(self.num_features, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        return global_average(self.stages(x))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.forward_features(x))


@register(
    {
        **{f"resnet{n}": {"depth": n, "widths": _NARROW} for n in (8, 14, 20, 32, 44, 56, 110)},
        **{f"resnet{n}x4": {"depth": n, "widths": _WIDE} for n in (8, 32)},
    }
)
def resnet_cifar(
    num_classes: int,
    in_channels: int,
    *,
    depth: int,
    widths: tuple[int, int, int, int],
    width: float = 1.0,
) -> ResNetCIFAR:
    """``width`` multiplies the channels of the stem and of every stage, rounded to at least one."""
    check_number("width", width, "a finite number > 0", lambda x: 0 < x < math.inf)
    stem, first, second, third = (max(1, round(channels * width)) for channels in widths)
    return ResNetCIFAR(num_classes, in_channels, depth=depth, widths=(stem, first, second, third))
