"""What the families share: bias-free convolutions (a batch norm follows each) and their start."""

from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def global_average(x: Tensor) -> Tensor:  # (N, F, H, W) -> (N, F)
    return x.mean((2, 3))


def initialise(network: nn.Module) -> None:
    """He's normal initialisation over the fan-out (arXiv 1502.01852) for every convolution; norms
    and classifiers keep PyTorch's."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
