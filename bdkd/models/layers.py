"""What the families share: bias-free convolutions (a batch norm follows each) and their start."""

from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, groups=groups, bias=False)


def depthwise3x3(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


def global_average(x: Tensor) -> Tensor:  # (N, F, H, W) -> (N, F)
    return x.mean((2, 3))


def divisible_by_8(channels: float) -> int:
    """The nearest multiple of 8, never less than 0.9 of ``channels``: how the MobileNets scale."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def initialise(network: nn.Module) -> None:
    """He's normal initialisation over the fan-out (arXiv 1502.01852) for every convolution, with
    zero biases; norms and classifiers keep PyTorch's."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialise_with_small_classifier(network: nn.Module) -> None:
    """:func:`initialise`, and classifiers that start near zero (0.01), as VGG's and MobileNet's."""
    initialise(network)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
