"""Wide residual networks (``wrn_DEPTH_WIDTH``): pre-activation basic blocks, 6n + 4 layers.

Zagoruyko and Komodakis, *Wide Residual Networks*, arXiv 1605.07146, table 1.
"""

from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from bdkd.bounds import Rate

from .layers import conv1x1, conv3x3, global_average, initialise, stage
from .registry import register_model

# Depth and width
_LISTED = ((16, 1), (16, 2), (16, 4), (16, 6), (16, 8), (16, 10), (40, 1), (40, 2), (28, 10))


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after a norm and an activation, with a shortcut. If the shape
    changes, the shortcut is a projection of the activated input, otherwise the input itself."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.dropout = dropout
        same = stride == 1 and in_channels == out_channels
        self.projection = None if same else conv1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        y = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        if self.dropout > 0:
            y = F.dropout(y, self.dropout, training=self.training)
        shortcut = x if self.projection is None else self.projection(activated)
        return self.conv2(y) + shortcut


class WideResNet(nn.Module):
    """Maps images ``(N, in_channels, H, W)`` of any size to logits ``(N, num_classes)``."""

    def __init__(
        self, num_classes: int, in_channels: int, *, depth: int, width: int, dropout: float
    ):
        super().__init__()
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.num_features = widths[-1]
        self.conv = conv3x3(in_channels, widths[0])
        self.stages = nn.Sequential()
        block = partial(PreActivationBlock, dropout=dropout)
        for index, (before, after) in enumerate(pairwise(widths)):
            self.stages.append(stage(block, before, after, (depth - 4) // 6, 2 if index else 1))
        self.bn = nn.BatchNorm2d(self.num_features)
        self.classifier = nn.Linear(self.num_features, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        return global_average(F.relu(self.bn(self.stages(self.conv(x))), inplace=True))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.forward_features(x))


@register_model(
    {f"wrn_{depth}_{width}": {"depth": depth, "width": width} for depth, width in _LISTED},
    pattern=r"wrn_(?P<depth>\d+)_(?P<width>\d+)",
)
def wide_resnet(
    num_classes: int, in_channels: int, *, depth: int, width: int, dropout: Rate = 0.0
) -> WideResNet:
    """Build a wide residual network.

    Args:
        dropout: probability of dropping an activation between a block's convolutions.
    """
    if depth < 10 or depth % 6 != 4 or width < 1:
        raise ValueError(
            "wrn_D_W needs a depth D of 6n + 4 (10, 16, 22, 28, ...) and a width W >= 1, "
            f"got D = {depth}, W = {width}"
        )
    return WideResNet(num_classes, in_channels, depth=depth, width=width, dropout=dropout)
