"""Initial weights have the distribution of their family."""

import math

import pytest
import torch
from torch import nn

from bdkd.models import create_model

# He's rule over the fan-out, or PyTorch's default, which is uniform.
CONVOLUTIONS = {
    "he": lambda w: ("normal", (2 / (w.shape[0] * w[0, 0].numel())) ** 0.5),
    "default": lambda w: ("uniform", 1 / (3 * w[0].numel()) ** 0.5),
}
# A small classifier without a bias, or PyTorch's default.
CLASSIFIERS = {
    "small": lambda w: ("normal", 0.01),
    "default": lambda w: ("uniform", 1 / (3 * w.shape[1]) ** 0.5),
}
FAMILIES = [
    ("resnet20", "he", "default"),
    ("wrn_16_2", "he", "default"),
    ("resnet18", "he", "default"),
    ("vgg8", "he", "small"),
    ("mobilenetv2", "he", "small"),
    ("imagenet_mobilenet_v1", "he", "small"),
    ("imagenet_mobilenet_v2", "he", "small"),
    ("shufflenetv1", "default", "default"),
    ("shufflenetv2", "default", "default"),
    # torchvision initialises these networks in the same way.
    ("torchvision:mobilenet_v2", "he", "small"),
    ("torchvision:shufflenet_v2_x1_0", "default", "default"),
]


def assert_drawn_from(values: torch.Tensor, kind: str, deviation: float, name: str) -> None:
    """Check mean and deviation to six standard errors, and the tails of the distribution."""
    z = values.double().flatten() / deviation
    error = 6 * math.sqrt(1 / z.numel())
    assert abs(z.mean()) < error, name
    assert abs(z.std() - 1) < error, name
    if kind == "uniform":
        assert z.abs().max() <= math.sqrt(3) + 1e-4, name
    elif z.numel() > 500:  # 8% of a normal distribution lie further out
        assert z.abs().max() > math.sqrt(3) + 0.2, name


@pytest.mark.parametrize(("name", "convolutions", "classifier"), FAMILIES)
@torch.no_grad()
def test_weights_start_by_the_rule_of_their_family(torchvision, name, convolutions, classifier):
    torch.manual_seed(0)
    for path, module in create_model(name, 100).named_modules():
        if isinstance(module, nn.Conv2d):
            assert_drawn_from(module.weight, *CONVOLUTIONS[convolutions](module.weight), path)
            assert module.bias is None or not module.bias.any(), path
        elif isinstance(module, nn.Linear):
            kind, deviation = CLASSIFIERS[classifier](module.weight)
            assert_drawn_from(module.weight, kind, deviation, path)
            if classifier == "small":
                assert not module.bias.any()
            else:
                assert_drawn_from(module.bias, kind, deviation, path)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), path
            assert not module.bias.any(), path
            assert not module.running_mean.any(), path
            assert (module.running_var == 1).all(), path


@torch.no_grad()
def test_googlenet_is_initialised_as_in_torchvision(torchvision):
    """torchvision lets its caller choose this initialisation: a normal distribution, cut at 2."""
    torch.manual_seed(0)
    for path, module in create_model("torchvision:googlenet", 100).named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert_drawn_from(module.weight, "normal", 0.01, path)


def test_initial_weights_depend_on_the_seed():
    def first_weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(create_model("resnet8", 10).parameters())

    assert torch.equal(first_weights(0), first_weights(0))
    assert not torch.equal(first_weights(0), first_weights(1))
