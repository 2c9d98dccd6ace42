"""Layers and initialisation that several families share. Convolutions have no bias, because a
batch norm follows each."""

from collections.abc import Callable

from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, groups=groups, bias=False)


def conv_norm_act(convolution: nn.Conv2d, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Append a batch norm and an activation to a convolution."""
    norm = nn.BatchNorm2d(convolution.out_channels)
    return nn.Sequential(convolution, norm, activation(inplace=True))


def projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return a 1x1 convolution with batch norm if the shape changes, and the identity otherwise."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


def stage(
    block: Callable[[int, int, int], nn.Module], before: int, after: int, count: int, stride: int
) -> nn.Sequential:
    """Return ``count`` blocks; the first changes the channels and applies the stride."""
    rest = (block(after, after, 1) for _ in range(count - 1))
    return nn.Sequential(block(before, after, stride), *rest)


def global_average(x: Tensor) -> Tensor:  # (N, F, H, W) -> (N, F)
    return x.mean((2, 3))


def divisible_by_8(channels: float) -> int:
    """Round to the nearest multiple of 8 that is at least 0.9 of ``channels``, as MobileNets do."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def initialise(network: nn.Module, small_classifier: bool = False) -> None:
    """Initialise convolutions with He's normal initialisation over the fan-out (arXiv 1502.01852)
    and zero biases. Norms and classifiers keep PyTorch's initialisation. With ``small_classifier``,
    classifiers are initialised with deviation 0.01 and zero biases, as in VGG and MobileNet."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif small_classifier and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
