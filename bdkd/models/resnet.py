"""Residual networks with four stages, for small images and for ImageNet.

He et al., *Deep Residual Learning*, arXiv 1512.03385, table 1; a bottleneck strides in its 3x3
convolution ("v1.5"). The ``imagenet_`` names start with a 7x7 convolution and a pooling, which
quarter the image, the others with a 3x3 convolution of stride 1. Parameters are called as in
torchvision and timm, so that their ImageNet weights load as they are.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv1x1, conv3x3, global_average, initialise
from .registry import register
from .resnet_cifar import BasicBlock

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the 3x3 has a quarter of the channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        inner = out_channels // 4
        self.conv1 = conv1x1(in_channels, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else nn.Sequential(
                conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


class ResNet(nn.Module):
    """Logits ``(N, num_classes)`` from images ``(N, in_channels, H, W)`` of any size."""

    def __init__(self, num_classes: int, in_channels: int, *, depth: int, imagenet: bool):
        super().__init__()
        block, expansion = (Bottleneck, 4) if depth >= 50 else (BasicBlock, 1)
        self.num_features = 512 * expansion
        self.conv1 = (
            nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            if imagenet
            else conv3x3(in_channels, 64)
        )
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()
        stages, before = [], 64
        for index, count in enumerate(_BLOCKS[depth]):
            after = 64 * 2**index * expansion
            first = block(before, after, stride=1 if index == 0 else 2)
            rest = (block(after, after, stride=1) for _ in range(count - 1))
            stages.append(nn.Sequential(first, *rest))
            before = after
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(self.num_features, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return global_average(self.layer4(self.layer3(self.layer2(self.layer1(x)))))

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.fc(self.forward_features(x))


@register(
    {
        **{f"resnet{n}": {"depth": n, "imagenet": False} for n in _BLOCKS},
        **{f"imagenet_resnet{n}": {"depth": n, "imagenet": True} for n in _BLOCKS},
    }
)
def resnet(
    num_classes: int,
    in_channels: int,
    *,
    depth: int,
    imagenet: bool,
    zero_init_residual: bool = False,
) -> ResNet:
    """``zero_init_residual`` starts every block as its shortcut: the scale of its last norm is 0
    (Goyal et al., arXiv 1706.02677, section 5.1)."""
    if not isinstance(zero_init_residual, bool):
        raise ValueError(f"zero_init_residual must be true or false, got {zero_init_residual!r}")
    network = ResNet(num_classes, in_channels, depth=depth, imagenet=imagenet)
    if zero_init_residual:
        for module in network.modules():
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
    return network
