"""ShuffleNetV1 for small images: grouped 1x1 convolutions, mixed by a shuffle of the channels.

Zhang et al., *ShuffleNet*, arXiv 1707.01083, table 1 with three groups, as the distillation
literature trains it: a 1x1 stem, and an activation after the depthwise convolution too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv1x1, depthwise3x3, global_average
from .registry import register

_STEM, _WIDTHS, _REPEATS, _GROUPS = 24, (240, 480, 960), (4, 8, 4), 3


def _shuffle(x: Tensor, groups: int) -> Tensor:  # (N, C, H, W)
    """Channel i of group g becomes channel g of group i; done channels-last, where it is a copy
    of whole pixels and the layout is kept."""
    pixels = x.movedim(1, -1)  # (N, H, W, C)
    return pixels.unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2).movedim(-1, 1)


class Unit(nn.Module):
    """A grouped bottleneck, summed with its input, or, with stride 2, beside its average."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        made = out_channels - in_channels if stride == 2 else out_channels
        inner = made // 4
        # The stem's few channels are not worth splitting (section 3.2 of the paper).
        self.groups = 1 if in_channels == _STEM else _GROUPS
        self.conv1 = conv1x1(in_channels, inner, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = depthwise3x3(inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, made, groups=_GROUPS)
        self.bn3 = nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.groups > 1:
            y = _shuffle(y, self.groups)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        if self.stride == 1:
            return F.relu(y + x, inplace=True)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], 1), inplace=True)


class ShuffleNetV1(nn.Module):
    """Logits ``(N, num_classes)`` from images ``(N, in_channels, H, W)`` of any size."""

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.num_features = _WIDTHS[-1]
        self.conv = conv1x1(in_channels, _STEM)
        self.bn = nn.BatchNorm2d(_STEM)
        self.stages = nn.Sequential()
        before = _STEM
        for after, count in zip(_WIDTHS, _REPEATS, strict=True):
            rest = (Unit(after, after, stride=1) for _ in range(count - 1))
            self.stages.append(nn.Sequential(Unit(before, after, stride=2), *rest))
            before = after
        self.classifier = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        return global_average(self.stages(F.relu(self.bn(self.conv(x)), inplace=True)))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.forward_features(x))


@register({"shufflenetv1": {}}, pattern="shufflev1")
def shufflenetv1(num_classes: int, in_channels: int) -> ShuffleNetV1:
    """Also under the literature's name, ``ShuffleV1``."""
    return ShuffleNetV1(num_classes, in_channels)
