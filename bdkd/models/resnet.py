"""Residual networks for small images and for ImageNet.

He et al., *Deep Residual Learning*, arXiv 1512.03385.

Networks such as ``resnet20`` (section 4.2) have three stages of basic blocks, 6n + 2 layers, and
projection shortcuts as in the distillation literature. Networks such as ``resnet18`` (table 1) have
four stages. The stride of a bottleneck is in its 3x3 convolution ("v1.5").

The ``imagenet_`` networks start with a 7x7 convolution and a pooling, which divide the side of the
image by four. The others start with a 3x3 convolution of stride 1. Networks with four stages have
the parameter names of torchvision and timm. The ``imagenet_`` networks can load their weights.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from bdkd.bounds import Positive

from .layers import conv1x1, conv3x3, global_average, initialise, projection_shortcut, stage
from .registry import register_model

_NARROW = (16, 16, 32, 64)  # the stem and the three stages
_WIDE = (32, 64, 128, 256)  # the "x4" networks: only the stages are four times as wide
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut. An activation follows the sum."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = projection_shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut. The 3x3 has a quarter of the channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        inner = out_channels // 4
        self.conv1 = conv1x1(in_channels, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = projection_shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x), inplace=True)


class ResNetCIFAR(nn.Module):
    """Maps images ``(N, in_channels, H, W)`` of any size to logits ``(N, num_classes)``."""

    def __init__(self, num_classes: int, in_channels: int, *, depth: int, widths: tuple[int, ...]):
        super().__init__()
        self.num_features = widths[-1]
        self.conv = conv3x3(in_channels, widths[0])
        self.bn = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        for index, (before, after) in enumerate(pairwise(widths)):
            blocks = stage(BasicBlock, before, after, (depth - 2) // 6, 2 if index else 1)
            self.stages.append(blocks)
        self.classifier = nn.Linear(self.num_features, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        return global_average(self.stages(F.relu(self.bn(self.conv(x)), inplace=True)))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.forward_features(x))


@register_model(
    {f"resnet{n}": {"depth": n, "widths": _NARROW} for n in (8, 14, 20, 32, 44, 56, 110)}
    | {f"resnet{n}x4": {"depth": n, "widths": _WIDE} for n in (8, 32)}
)
def resnet_cifar(
    num_classes: int,
    in_channels: int,
    *,
    depth: int,
    widths: tuple[int, ...],
    width: Positive = 1.0,
) -> ResNetCIFAR:
    """Build a network with three stages. ``width`` multiplies all channels."""
    scaled = tuple(max(1, round(channels * width)) for channels in widths)
    return ResNetCIFAR(num_classes, in_channels, depth=depth, widths=scaled)


class ResNet(nn.Module):
    """Maps images ``(N, in_channels, H, W)`` of any size to logits ``(N, num_classes)``."""

    def __init__(self, num_classes: int, in_channels: int, *, depth: int, imagenet: bool):
        super().__init__()
        block, expansion = (Bottleneck, 4) if depth >= 50 else (BasicBlock, 1)
        self.num_features = 512 * expansion
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, 64, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()
        stages, before = [], 64
        for index, count in enumerate(_BLOCKS[depth]):
            after = 64 * 2**index * expansion
            stages.append(stage(block, before, after, count, 2 if index else 1))
            before = after
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(self.num_features, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return global_average(self.layer4(self.layer3(self.layer2(self.layer1(x)))))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.fc(self.forward_features(x))


@register_model(
    {f"resnet{n}": {"depth": n, "imagenet": False} for n in _BLOCKS}
    | {f"imagenet_resnet{n}": {"depth": n, "imagenet": True} for n in _BLOCKS}
)
def resnet(
    num_classes: int, in_channels: int, *, depth: int, imagenet: bool,
    zero_init_residual: bool = False,
) -> ResNet:  # fmt: skip
    """Build a network with four stages.

    Args:
        zero_init_residual: initialise the scale of the last norm of every block with 0, so that
            the block is its shortcut (Goyal et al., arXiv 1706.02677, section 5.1).
    """
    network = ResNet(num_classes, in_channels, depth=depth, imagenet=imagenet)
    if zero_init_residual:
        for module in network.modules():
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
    return network
