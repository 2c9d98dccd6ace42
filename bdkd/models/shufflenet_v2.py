"""ShuffleNetV2 for small images and for ImageNet: half of the channels pass each unit untouched.

Ma et al., *ShuffleNet V2*, arXiv 1807.11164, table 5. ``shufflenetv2`` is the distillation
literature's (x1.0, a 1x1 stem); the ``imagenet_`` names are torchvision's, whose weights load as
they are.
"""

import torch
from torch import Tensor, nn

from .layers import conv1x1, conv3x3, depthwise3x3, global_average
from .registry import register

_STEM, _REPEATS = 24, (4, 8, 4)
_WIDTHS = {  # the three stages, then the features
    "x0_5": (48, 96, 192, 1024),
    "x1_0": (116, 232, 464, 1024),
    "x1_5": (176, 352, 704, 1024),
    "x2_0": (244, 488, 976, 2048),
}


def _norm(channels: int, activate: bool) -> list[nn.Module]:
    norm = nn.BatchNorm2d(channels)
    return [norm, nn.ReLU(inplace=True)] if activate else [norm]


class Unit(nn.Module):
    """Two branches, whose channels alternate in the output. With stride 1 the first is one half
    of the input as it is; with stride 2 each sees the whole input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        half = out_channels // 2
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1.extend([depthwise3x3(in_channels, 2), *_norm(in_channels, False)])
            self.branch1.extend([conv1x1(in_channels, half), *_norm(half, True)])
        self.branch2 = nn.Sequential(
            conv1x1(in_channels if stride == 2 else half, half),
            *_norm(half, True),
            depthwise3x3(half, stride),
            *_norm(half, False),
            conv1x1(half, half),
            *_norm(half, True),
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        first, second = (x, x) if self.stride == 2 else x.chunk(2, 1)
        halves = (self.branch1(first).movedim(1, -1), self.branch2(second).movedim(1, -1))
        # Concatenation and shuffle in one copy, channels-last: the layout is kept.
        return torch.stack(halves, -1).flatten(-2).movedim(-1, 1)


class ShuffleNetV2(nn.Module):
    """Logits ``(N, num_classes)`` from images ``(N, in_channels, H, W)`` of any size."""

    def __init__(
        self, num_classes: int, in_channels: int, *, widths: tuple[int, ...], imagenet: bool
    ):
        super().__init__()
        stem = conv3x3(in_channels, _STEM, 2) if imagenet else conv1x1(in_channels, _STEM)
        self.conv1 = nn.Sequential(stem, *_norm(_STEM, True))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()
        stages, before = [], _STEM
        for after, count in zip(widths, _REPEATS, strict=False):
            rest = (Unit(after, after, stride=1) for _ in range(count - 1))
            stages.append(nn.Sequential(Unit(before, after, stride=2), *rest))
            before = after
        self.stage2, self.stage3, self.stage4 = stages
        self.num_features = widths[-1]
        self.conv5 = nn.Sequential(
            conv1x1(before, self.num_features), *_norm(self.num_features, True)
        )
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        x = self.stage4(self.stage3(self.stage2(self.pool(self.conv1(x)))))
        return global_average(self.conv5(x))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.fc(self.forward_features(x))


@register({"shufflenetv2": {}}, pattern="shufflev2")
def shufflenetv2(num_classes: int, in_channels: int) -> ShuffleNetV2:
    """Also under the literature's name, ``ShuffleV2``."""
    return ShuffleNetV2(num_classes, in_channels, widths=_WIDTHS["x1_0"], imagenet=False)


@register({f"imagenet_shufflenet_v2_{size}": {"size": size} for size in _WIDTHS})
def imagenet_shufflenet_v2(num_classes: int, in_channels: int, *, size: str) -> ShuffleNetV2:
    return ShuffleNetV2(num_classes, in_channels, widths=_WIDTHS[size], imagenet=True)
