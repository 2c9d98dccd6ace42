"""Wide residual networks: pre-activation basic blocks, 6n + 4 layers deep, D-W for depth and width.

Zagoruyko and Komodakis, *Wide Residual Networks*, arXiv 1605.07146, table 1.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv1x1, conv3x3, global_average, initialise
from .registry import check_number, register


class PreActivationBlock(nn.Module):
    """Norm and activation before each of two 3x3 convolutions; a projection, where the shape
    changes, starts from the activated input, an identity from the raw one."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.dropout = dropout
        self.projection = (
            None
            if stride == 1 and in_channels == out_channels
            else conv1x1(in_channels, out_channels, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        y = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        if self.dropout > 0:
            y = F.dropout(y, self.dropout, training=self.training)
        shortcut = x if self.projection is None else self.projection(activated)
        return self.conv2(y) + shortcut


class WideResNet(nn.Module):
    """Logits ``(N, num_classes)`` from images ``(N, in_channels, H, W)`` of any size."""

    def __init__(
        self, num_classes: int, in_channels: int, *, depth: int, width: int, dropout: float
    ):
        super().__init__()
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.num_features = widths[-1]
        self.conv = conv3x3(in_channels, widths[0])
        self.stages = nn.Sequential()
        for index, (before, after) in enumerate(pairwise(widths)):
            first = PreActivationBlock(before, after, 1 if index == 0 else 2, dropout)
            rest = (
                PreActivationBlock(after, after, 1, dropout) for _ in range((depth - 4) // 6 - 1)
            )
            self.stages.append(nn.Sequential(first, *rest))
        self.bn = nn.BatchNorm2d(self.num_features)
        self.classifier = nn.Linear(self.num_features, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        return global_average(F.relu(self.bn(self.stages(self.conv(x))), inplace=True))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.forward_features(x))


@register(
    {
        f"wrn_{depth}_{width}": {"depth": depth, "width": width}
        for depth, width in (
            *((16, width) for width in (1, 2, 4, 6, 8, 10)),
            *((40, 1), (40, 2)),
            (28, 10),
        )
    },
    pattern=r"wrn_(?P<depth>\d+)_(?P<width>\d+)",
)
def wide_resnet(
    num_classes: int, in_channels: int, *, depth: int, width: int, dropout: float = 0.0
) -> WideResNet:
    """``dropout`` is the probability of dropping an activation between a block's convolutions."""
    if depth < 10 or depth % 6 != 4 or width < 1:
        raise ValueError(
            "wrn_D_W needs a depth D of 6n + 4 (10, 16, 22, 28, ...) and a width W >= 1, "
            f"got D = {depth}, W = {width}"
        )
    check_number("dropout", dropout, "a number in [0, 1)", lambda x: 0 <= x < 1)
    return WideResNet(num_classes, in_channels, depth=depth, width=width, dropout=dropout)
