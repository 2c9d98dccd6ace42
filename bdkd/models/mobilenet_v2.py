"""MobileNetV2 for small images and for ImageNet: inverted residuals with linear bottlenecks.

Sandler et al., *MobileNetV2*, arXiv 1801.04381, table 2. ``mobilenetv2`` is the distillation
literature's: half the width, ReLU, one stride fewer, and an expansion in the first block too.
``imagenet_mobilenet_v2`` is torchvision's, whose weights load as they are.
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

_CHANNELS = (16, 24, 32, 64, 96, 160, 320)
_REPEATS = (1, 2, 3, 4, 3, 3, 1)


def _activated(convolution: nn.Conv2d, activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        convolution, nn.BatchNorm2d(convolution.out_channels), activation(inplace=True)
    )


class InvertedResidual(nn.Module):
    """Expand (unless ``hidden`` is None), filter depthwise, project; a sum where shapes agree."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        hidden: int | None,
        activation: type[nn.Module],
    ):
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential()
        if hidden is not None:
            self.conv.append(_activated(conv1x1(in_channels, hidden), activation))
        inner = hidden or in_channels
        self.conv.append(_activated(depthwise3x3(inner, stride), activation))
        self.conv.append(conv1x1(inner, out_channels))
        self.conv.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Logits ``(N, num_classes)`` from images ``(N, in_channels, H, W)`` of any size."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        widths: tuple[int, ...],  # the stem, the seven stages, the features
        strides: tuple[int, ...],  # of the seven stages
        expansion: int,
        expand_first: bool,
        activation: type[nn.Module],
        dropout: float = 0.0,
    ):
        super().__init__()
        stem, *stages, self.num_features = widths
        self.features = nn.Sequential(_activated(conv3x3(in_channels, stem, 2), activation))
        before = stem
        for index, after in enumerate(stages):
            for repeat in range(_REPEATS[index]):
                stride = strides[index] if repeat == 0 else 1
                hidden = before * expansion if index else before if expand_first else None
                self.features.append(InvertedResidual(before, after, stride, hidden, activation))
                before = after
        self.features.append(_activated(conv1x1(before, self.num_features), activation))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(self.num_features, num_classes)
        )
        initialise_with_small_classifier(self)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        return global_average(self.features(x))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.forward_features(x))


def _check_width(width: float) -> None:
    check_number("width", width, "a finite number > 0", lambda x: 0 < x < math.inf)


@register({"mobilenetv2": {}})
def mobilenetv2(
    num_classes: int, in_channels: int, *, width: float = 0.5, expansion: int = 6
) -> MobileNetV2:
    """``width`` multiplies the channels, rounded down; ``expansion`` those inside a block."""
    _check_width(width)
    check_number("expansion", expansion, "an integer >= 1", lambda x: x >= 1 and x == int(x))
    widths = tuple(max(1, int(channels * width)) for channels in (32, *_CHANNELS))
    return MobileNetV2(
        num_classes,
        in_channels,
        widths=(*widths, int(1280 * max(1.0, width))),
        strides=(1, 1, 2, 2, 1, 2, 1),
        expansion=int(expansion),
        expand_first=True,
        activation=nn.ReLU,
    )


@register({"imagenet_mobilenet_v2": {}})
def imagenet_mobilenet_v2(
    num_classes: int, in_channels: int, *, width: float = 1.0, dropout: float = 0.2
) -> MobileNetV2:
    """``width`` multiplies the channels, rounded to multiples of 8; ``dropout`` is the probability
    of dropping a feature before the classifier."""
    _check_width(width)
    check_number("dropout", dropout, "a number in [0, 1)", lambda x: 0 <= x < 1)
    widths = tuple(divisible_by_8(channels * width) for channels in (32, *_CHANNELS))
    return MobileNetV2(
        num_classes,
        in_channels,
        widths=(*widths, divisible_by_8(1280 * max(1.0, width))),
        strides=(1, 2, 2, 2, 1, 2, 1),
        expansion=6,
        expand_first=False,
        activation=nn.ReLU6,
        dropout=dropout,
    )
