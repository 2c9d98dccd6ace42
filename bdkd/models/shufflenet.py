"""ShuffleNetV1 for small images, and ShuffleNetV2 for small images and for ImageNet.

Zhang et al., *ShuffleNet*, arXiv 1707.01083, table 1 with three groups. ``shufflenetv1`` is the
variant of the distillation literature, with a 1x1 stem and an activation after the depthwise
convolution. Ma et al., *ShuffleNet V2*, arXiv 1807.11164, table 5. ``shufflenetv2`` is the x1.0
variant of the distillation literature, with a 1x1 stem. The ``imagenet_`` networks are those of
torchvision and can load its weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv1x1, conv3x3, conv_norm_act, global_average, stage
from .registry import register_model

_STEM, SHUFFLENET_UNITS = 24, (4, 8, 4)  # units of each stage
_V1_WIDTHS, _GROUPS = (240, 480, 960), 3
_V2_WIDTHS = {  # the three stages and the features
    "x0_5": (48, 96, 192, 1024),
    "x1_0": (116, 232, 464, 1024),
    "x1_5": (176, 352, 704, 1024),
    "x2_0": (244, 488, 976, 2048),
}


def _shuffle(x: Tensor, groups: int) -> Tensor:  # (N, C, H, W)
    """Move channel i of group g to channel g of group i. A single channels-last copy does this and
    keeps the memory format."""
    pixels = x.movedim(1, -1)  # (N, H, W, C)
    return pixels.unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2).movedim(-1, 1)


class UnitV1(nn.Module):
    """A grouped bottleneck. With stride 1, the input is added to its output. With stride 2, the
    input is pooled and concatenated."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        branch = out_channels - in_channels if stride == 2 else out_channels
        inner = branch // 4
        # The stem has too few channels for groups (section 3.2 of the paper).
        self.groups = 1 if in_channels == _STEM else _GROUPS
        self.conv1 = conv1x1(in_channels, inner, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, branch, groups=_GROUPS)
        self.bn3 = nn.BatchNorm2d(branch)

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
    """Maps images ``(N, in_channels, H, W)`` of any size to logits ``(N, num_classes)``."""

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.num_features = _V1_WIDTHS[-1]
        self.conv = conv1x1(in_channels, _STEM)
        self.bn = nn.BatchNorm2d(_STEM)
        widths = zip((_STEM, *_V1_WIDTHS), _V1_WIDTHS, SHUFFLENET_UNITS, strict=False)
        self.stages = nn.Sequential(*(stage(UnitV1, *sizes, 2) for sizes in widths))
        self.classifier = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        return global_average(self.stages(F.relu(self.bn(self.conv(x)), inplace=True)))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.forward_features(x))


@register_model({"shufflenetv1": {}}, pattern="shufflev1")
def shufflenetv1(num_classes: int, in_channels: int) -> ShuffleNetV1:
    """Build ShuffleNetV1, which the literature also calls ``ShuffleV1``."""
    return ShuffleNetV1(num_classes, in_channels)


class UnitV2(nn.Module):
    """Two branches whose channels alternate in the output. With stride 2, both branches process the
    whole input. With stride 1, the first branch is the first half of the channels, unchanged."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        half = out_channels // 2
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1.append(conv3x3(in_channels, in_channels, 2, groups=in_channels))
            self.branch1.append(nn.BatchNorm2d(in_channels))
            self.branch1.extend(conv_norm_act(conv1x1(in_channels, half)))
        self.branch2 = nn.Sequential(
            *conv_norm_act(conv1x1(in_channels if stride == 2 else half, half)),
            conv3x3(half, half, stride, groups=half),
            nn.BatchNorm2d(half),
            *conv_norm_act(conv1x1(half, half)),
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        first, second = (x, x) if self.stride == 2 else x.chunk(2, 1)
        halves = (self.branch1(first).movedim(1, -1), self.branch2(second).movedim(1, -1))
        # One channels-last copy concatenates, shuffles and keeps the memory format.
        return torch.stack(halves, -1).flatten(-2).movedim(-1, 1)


class ShuffleNetV2(nn.Module):
    """Maps images ``(N, in_channels, H, W)`` of any size to logits ``(N, num_classes)``."""

    def __init__(
        self, num_classes: int, in_channels: int, *, widths: tuple[int, ...], imagenet: bool
    ):
        super().__init__()
        *stages, self.num_features = widths
        stem = conv3x3(in_channels, _STEM, 2) if imagenet else conv1x1(in_channels, _STEM)
        self.conv1 = conv_norm_act(stem)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()
        sizes = zip((_STEM, *stages), stages, SHUFFLENET_UNITS, strict=False)
        self.stage2, self.stage3, self.stage4 = (stage(UnitV2, *size, 2) for size in sizes)
        self.conv5 = conv_norm_act(conv1x1(stages[-1], self.num_features))
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        x = self.stage4(self.stage3(self.stage2(self.pool(self.conv1(x)))))
        return global_average(self.conv5(x))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.fc(self.forward_features(x))


@register_model({"shufflenetv2": {}}, pattern="shufflev2")
def shufflenetv2(num_classes: int, in_channels: int) -> ShuffleNetV2:
    """Build ShuffleNetV2, which the literature also calls ``ShuffleV2``."""
    return ShuffleNetV2(num_classes, in_channels, widths=_V2_WIDTHS["x1_0"], imagenet=False)


@register_model({f"imagenet_shufflenet_v2_{size}": {"size": size} for size in _V2_WIDTHS})
def imagenet_shufflenet_v2(num_classes: int, in_channels: int, *, size: str) -> ShuffleNetV2:
    """Build torchvision's ShuffleNetV2."""
    return ShuffleNetV2(num_classes, in_channels, widths=_V2_WIDTHS[size], imagenet=True)
