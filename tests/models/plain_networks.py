"""Independent implementations of the networks, as plain functions of the weights in a state dict.

Each function follows the paper that it cites and the code of the distillation literature. It shares
only the names of the weights with ``bdkd.models``, because checkpoints contain them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Weights:
    """A copy of a network's weights, and the layers that read them.

    ``after`` holds the running statistics after one training pass. ``unread`` holds the names of
    the weights that no layer has read.
    """

    def __init__(self, network: nn.Module, training: bool):
        trainable = dict(network.named_parameters())
        self.state = {
            name: value.detach().clone().requires_grad_(name in trainable)
            for name, value in network.state_dict().items()
        }
        self.parameters = {name: self.state[name] for name in trainable}
        self.training = training
        self.unread = set(self.state)
        self.after: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        self.unread.discard(name)
        return self.state[name]

    def conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1, bias=False) -> Tensor:
        weight = self.read(f"{name}.weight")
        padding = weight.shape[-1] // 2
        b = self.read(f"{name}.bias") if bias else None
        return F.conv2d(x, weight, b, stride, padding, groups=groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Batch norm, arXiv 1502.03167, with epsilon 1e-5 and momentum 0.1."""
        names = [f"{name}.running_mean", f"{name}.running_var"]
        mean, var = (self.read(n) for n in names)
        seen = self.read(f"{name}.num_batches_tracked")
        if self.training:
            kept = mean, var
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            samples = x.numel() / x.shape[1]
            unbiased = var * samples / (samples - 1)
            for n, old, new in zip(names, kept, (mean, unbiased), strict=True):
                self.after[n] = (0.9 * old + 0.1 * new).detach()
            self.after[f"{name}.num_batches_tracked"] = seen + 1
        scale, shift = self.read(f"{name}.weight"), self.read(f"{name}.bias")
        column = (1, -1, 1, 1)
        x = (x - mean.view(column)) / (var.view(column) + 1e-5).sqrt()
        return x * scale.view(column) + shift.view(column)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.read(f"{name}.weight").T + self.read(f"{name}.bias")


def average(x: Tensor) -> Tensor:  # (N, F, H, W) -> (N, F)
    return x.flatten(2).mean(2)


def projected(w: Weights, x: Tensor, name: str, channels: int, stride: int) -> Tensor:
    """The shortcut of a residual block: the input itself, or its projection to another shape."""
    if stride == 1 and x.shape[1] == channels:
        return x
    return w.norm(w.conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")


def basic_block(w: Weights, x: Tensor, name: str, channels: int, stride: int) -> Tensor:
    y = w.norm(w.conv(x, f"{name}.conv1", stride), f"{name}.bn1").relu()
    y = w.norm(w.conv(y, f"{name}.conv2"), f"{name}.bn2")
    return (y + projected(w, x, name, channels, stride)).relu()


def resnet_cifar(w: Weights, x: Tensor, depth: int, widths: tuple) -> tuple[Tensor, Tensor]:
    """arXiv 1512.03385, section 4.2, with projections."""
    x = w.norm(w.conv(x, "conv"), "bn").relu()
    for stage, channels in enumerate(widths):
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            x = basic_block(w, x, f"stages.{stage}.{block}", channels, stride)
    features = average(x)
    return features, w.linear(features, "classifier")


def resnet(w: Weights, x: Tensor, counts: tuple, widths: tuple) -> tuple[Tensor, Tensor]:
    """arXiv 1512.03385, table 1, with a 3x3 stem of stride 1 and no pooling."""
    x = w.norm(w.conv(x, "conv1"), "bn1").relu()
    for stage, (count, channels) in enumerate(zip(counts, widths, strict=True), start=1):
        for index in range(count):
            stride = 2 if stage > 1 and index == 0 else 1
            x = basic_block(w, x, f"layer{stage}.{index}", channels, stride)
    features = average(x)
    return features, w.linear(features, "fc")


def wide_resnet(
    w: Weights, x: Tensor, depth: int, width: int, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """arXiv 1605.07146, table 1 and figure 1 (d)."""
    x = w.conv(x, "conv")
    for stage, channels in enumerate((16 * width, 32 * width, 64 * width)):
        for block in range((depth - 4) // 6):
            name = f"stages.{stage}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            activated = w.norm(x, f"{name}.bn1").relu()
            y = w.conv(activated, f"{name}.conv1", stride)
            y = w.norm(y, f"{name}.bn2").relu()
            y = F.dropout(y, dropout, w.training)
            y = w.conv(y, f"{name}.conv2")
            if block == 0 and x.shape[1] != channels:
                x = w.conv(activated, f"{name}.projection", stride)
            x = x + y
    features = average(w.norm(x, "bn").relu())
    return features, w.linear(features, "classifier")


def vgg(w: Weights, x: Tensor, counts: tuple, poolings: int) -> tuple[Tensor, Tensor]:
    """arXiv 1409.1556, table 1, with batch norm, and a pooling after each of the first stages."""
    for stage, count in enumerate(counts):
        for index in range(0, 3 * count, 3):
            x = w.conv(x, f"stages.{stage}.{index}", bias=True)
            x = w.norm(x, f"stages.{stage}.{index + 1}").relu()
        if stage < poolings:
            x = F.max_pool2d(x, kernel_size=2, stride=2)
    features = average(x)
    return features, w.linear(features, "classifier")


def mobilenet_v1(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 1704.04861, table 1."""
    x = w.norm(w.conv(x, "stem.0", stride=2), "stem.1").relu()
    for block, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)):
        name = f"blocks.{block}"
        x = w.norm(w.conv(x, f"{name}.0.0", stride, groups=x.shape[1]), f"{name}.0.1").relu()
        x = w.norm(w.conv(x, f"{name}.1.0"), f"{name}.1.1").relu()
    features = average(x)
    return features, w.linear(features, "classifier")


def mobilenet_v2(w: Weights, x: Tensor, expansion: int) -> tuple[Tensor, Tensor]:
    """arXiv 1801.04381, table 2, with ReLU, a convolution before every depthwise one, and stage 2
    of stride 1."""
    stage_strides = (1, 1, 2, 2, 1, 2, 1)
    x = w.norm(w.conv(x, "features.0.0", stride=2), "features.0.1").relu()
    strides = []
    for stride, count in zip(stage_strides, (1, 2, 3, 4, 3, 3, 1), strict=True):
        strides += [stride] + [1] * (count - 1)
    for block, stride in enumerate(strides, start=1):
        name = f"features.{block}.conv"
        y = w.norm(w.conv(x, f"{name}.0.0"), f"{name}.0.1").relu()
        assert y.shape[1] == x.shape[1] * (1 if block == 1 else expansion)
        y = w.norm(w.conv(y, f"{name}.1.0", stride, groups=y.shape[1]), f"{name}.1.1").relu()
        y = w.norm(w.conv(y, f"{name}.2"), f"{name}.3")
        x = x + y if stride == 1 and x.shape == y.shape else y
    x = w.norm(w.conv(x, "features.18.0"), "features.18.1").relu()
    features = average(x)
    return features, w.linear(features, "classifier.1")


def shufflenet_v1(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 1707.01083, table 1 with 3 groups and figure 2 (b, c), with a 1x1 stem and a ReLU
    after the depthwise convolution."""
    x = w.norm(w.conv(x, "conv"), "bn").relu()
    for stage, count in enumerate((4, 8, 4)):
        for unit in range(count):
            name = f"stages.{stage}.{unit}"
            first = stage == 0 and unit == 0
            y = w.conv(x, f"{name}.conv1", groups=1 if first else 3)
            y = w.norm(y, f"{name}.bn1").relu()
            if not first:
                y = torch.stack(y.chunk(3, 1), 2).flatten(1, 2)  # one of each group in turn
            stride = 2 if unit == 0 else 1
            y = w.norm(w.conv(y, f"{name}.conv2", stride, groups=y.shape[1]), f"{name}.bn2").relu()
            y = w.norm(w.conv(y, f"{name}.conv3", groups=3), f"{name}.bn3")
            if stride == 1:
                x = (x + y).relu()
            else:
                x = torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], 1).relu()
    features = average(x)
    return features, w.linear(features, "classifier")


def shufflenet_v2(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 1807.11164, table 5 and figure 3 (c, d), with a 1x1 stem and no pooling."""
    x = w.norm(w.conv(x, "conv1.0"), "conv1.1").relu()
    for stage, count in enumerate((4, 8, 4), start=2):
        for unit in range(count):
            branch = f"stage{stage}.{unit}.branch"
            stride = 2 if unit == 0 else 1
            left, right = (x, x) if stride == 2 else x.chunk(2, 1)
            if stride == 2:
                left = w.conv(left, f"{branch}1.0", 2, groups=left.shape[1])
                left = w.norm(left, f"{branch}1.1")
                left = w.norm(w.conv(left, f"{branch}1.2"), f"{branch}1.3").relu()
            right = w.norm(w.conv(right, f"{branch}2.0"), f"{branch}2.1").relu()
            right = w.conv(right, f"{branch}2.3", stride, groups=right.shape[1])
            right = w.norm(right, f"{branch}2.4")
            right = w.norm(w.conv(right, f"{branch}2.5"), f"{branch}2.6").relu()
            x = torch.stack((left, right), 2).flatten(1, 2)  # left and right in turn
    x = w.norm(w.conv(x, "conv5.0"), "conv5.1").relu()
    features = average(x)
    return features, w.linear(features, "fc")
