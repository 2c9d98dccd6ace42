"""MobileNetV1 for ImageNet, and MobileNetV2 for small images and for ImageNet.

Howard et al., *MobileNets*, arXiv 1704.04861, table 1, with the paper's ReLU (timm's
``mobilenetv1_100`` has ReLU6). Sandler et al., *MobileNetV2*, arXiv 1801.04381, table 2:
``mobilenetv2`` is the variant of the distillation literature, with half the width, ReLU, one stride
fewer, and an expansion in the first block. ``imagenet_mobilenet_v2`` is torchvision's network and
can load its weights.
"""

from torch import Tensor, nn

from bdkd.bounds import Count, Positive, Rate

from .layers import conv1x1, conv3x3, conv_norm_act, divisible_by_8, global_average, initialise
from .registry import register_model

# MobileNetV1: output channels and stride of each of the thirteen blocks
_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
# MobileNetV2: the stem and the seven stages, and the number of blocks of each stage
_CHANNELS = (32, 16, 24, 32, 64, 96, 160, 320)
MOBILENET_V2_BLOCKS = (1, 2, 3, 4, 3, 3, 1)


class MobileNetV1(nn.Module):
    """Maps images ``(N, in_channels, H, W)`` of any size to logits ``(N, num_classes)``."""

    def __init__(self, num_classes: int, in_channels: int, *, width: float):
        super().__init__()
        before = divisible_by_8(32 * width)
        self.stem = conv_norm_act(conv3x3(in_channels, before, stride=2))
        self.blocks = nn.Sequential()
        for channels, stride in _BLOCKS:
            after = divisible_by_8(channels * width)
            depthwise = conv_norm_act(conv3x3(before, before, stride, groups=before))
            self.blocks.append(nn.Sequential(depthwise, conv_norm_act(conv1x1(before, after))))
            before = after
        self.num_features = before
        self.classifier = nn.Linear(before, num_classes)
        initialise(self, small_classifier=True)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        return global_average(self.blocks(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.forward_features(x))


@register_model({"imagenet_mobilenet_v1": {}})
def imagenet_mobilenet_v1(
    num_classes: int, in_channels: int, *, width: Positive = 1.0
) -> MobileNetV1:
    """Build MobileNetV1. ``width`` multiplies the channels, rounded to multiples of 8."""
    return MobileNetV1(num_classes, in_channels, width=width)


class InvertedResidual(nn.Module):
    """Expands the channels (unless ``hidden`` is None), filters them depthwise and projects them.
    If input and output have the same shape, the input is added."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, hidden: int | None,
        activation: type[nn.Module],
    ):  # fmt: skip
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential()
        if hidden is not None:
            self.conv.append(conv_norm_act(conv1x1(in_channels, hidden), activation))
        inner = hidden or in_channels
        self.conv.append(conv_norm_act(conv3x3(inner, inner, stride, groups=inner), activation))
        self.conv.extend([conv1x1(inner, out_channels), nn.BatchNorm2d(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Maps images ``(N, in_channels, H, W)`` of any size to logits ``(N, num_classes)``.

    Args:
        widths: channels of the stem, the seven stages and the features.
        strides: strides of the seven stages.
    """

    def __init__(
        self, num_classes: int, in_channels: int, *, widths: tuple[int, ...],
        strides: tuple[int, ...], expansion: int, expand_first: bool, activation: type[nn.Module],
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        before, *stages, self.num_features = widths
        self.features = nn.Sequential(conv_norm_act(conv3x3(in_channels, before, 2), activation))
        for index, after in enumerate(stages):
            for repeat in range(MOBILENET_V2_BLOCKS[index]):
                stride = strides[index] if repeat == 0 else 1
                hidden = before * expansion if index else before if expand_first else None
                self.features.append(InvertedResidual(before, after, stride, hidden, activation))
                before = after
        self.features.append(conv_norm_act(conv1x1(before, self.num_features), activation))
        linear = nn.Linear(self.num_features, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), linear)
        initialise(self, small_classifier=True)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        return global_average(self.features(x))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.forward_features(x))


@register_model({"mobilenetv2": {}})
def mobilenetv2(
    num_classes: int, in_channels: int, *, width: Positive = 0.5, expansion: Count = 6
) -> MobileNetV2:
    """Build MobileNetV2 for small images.

    Args:
        width: multiplies the channels, rounded down.
        expansion: multiplies the channels inside a block.
    """
    widths = tuple(max(1, int(channels * width)) for channels in _CHANNELS)
    return MobileNetV2(
        num_classes, in_channels, widths=(*widths, int(1280 * max(1.0, width))),
        strides=(1, 1, 2, 2, 1, 2, 1), expansion=expansion, expand_first=True,
        activation=nn.ReLU,
    )  # fmt: skip


@register_model({"imagenet_mobilenet_v2": {}})
def imagenet_mobilenet_v2(
    num_classes: int, in_channels: int, *, width: Positive = 1.0, dropout: Rate = 0.2
) -> MobileNetV2:
    """Build torchvision's MobileNetV2.

    Args:
        width: multiplies the channels, rounded to multiples of 8.
        dropout: probability of dropping a feature before the classifier.
    """
    widths = tuple(divisible_by_8(channels * width) for channels in _CHANNELS)
    return MobileNetV2(
        num_classes, in_channels, widths=(*widths, divisible_by_8(1280 * max(1.0, width))),
        strides=(1, 2, 2, 2, 1, 2, 1), expansion=6, expand_first=False, activation=nn.ReLU6,
        dropout=dropout,
    )  # fmt: skip
