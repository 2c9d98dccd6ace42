"""Each network computes the function of its paper: outputs, gradients and running statistics."""

import functools

import plain_networks as plain
import pytest
import torch
from torch import nn

from bdkd.models import create_model

RESNET18 = {"counts": (2, 2, 2, 2), "widths": (64, 128, 256, 512)}

# Name, options, the plain function and its arguments. Families with a depth or a width have one
# network with two blocks per stage here, and the smallest network for every other option.
CASES = [
    ("resnet14", {}, plain.resnet_cifar, {"depth": 14, "widths": (16, 32, 64)}),
    ("resnet8x4", {}, plain.resnet_cifar, {"depth": 8, "widths": (64, 128, 256)}),
    ("resnet20", {"width": 0.5}, plain.resnet_cifar, {"depth": 20, "widths": (8, 16, 32)}),
    ("wrn_10_2", {}, plain.wide_resnet, {"depth": 10, "width": 2}),
    ("wrn_16_1", {"dropout": 0.3}, plain.wide_resnet, {"depth": 16, "width": 1, "dropout": 0.3}),
    ("resnet18", {}, plain.resnet, RESNET18),
    ("vgg8", {}, plain.vgg, {"counts": (1, 1, 1, 1, 1), "poolings": 3}),
    ("vgg11", {}, plain.vgg, {"counts": (1, 1, 2, 2, 2), "poolings": 3}),
    ("imagenet_mobilenet_v1", {"width": 0.25}, plain.mobilenet_v1, {}),
    ("mobilenetv2", {}, plain.mobilenet_v2, {"expansion": 6}),
    # So narrow that a block of stride 2 keeps its one channel. It still has no shortcut.
    ("mobilenetv2", {"width": 0.05, "expansion": 2}, plain.mobilenet_v2, {"expansion": 2}),
    ("shufflenetv1", {}, plain.shufflenet_v1, {}),
    ("shufflenetv2", {}, plain.shufflenet_v2, {}),
]


# No stride divides the sides of the images, so a stride in the wrong place changes the average.
# There are three images, so that a norm over one pixel still has a deviation.
IMAGES = torch.randn(3, 3, 13, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DIRECTION = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)


def shaken(network: nn.Module) -> nn.Module:
    """Move norms, biases and running statistics away from their initial values 0 and 1. The scales
    are so large that some activations exceed 6, the limit of ReLU6."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.ndim == 1:
                by = 6.0 if name.endswith("weight") else 0.3
                value += by * torch.rand(value.shape, generator=generator, dtype=value.dtype)
    return network


def assert_all_close(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Compare with a tolerance relative to the largest value, because the gradient of a bias before
    a norm is 0 except for rounding."""
    assert ours.keys() == wanted.keys()
    largest = max(value.abs().max().item() for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-6, atol=1e-9 * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def gradients(logits: torch.Tensor, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad((logits * DIRECTION).sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "function", "told"), CASES, ids=[case[0] for case in CASES]
)
def test_a_network_is_its_papers_function(name, options, function, told):
    torch.manual_seed(0)
    network = shaken(create_model(name, 7, **options).double()).train()
    weights = plain.Weights(network, training=True)
    torch.manual_seed(2)  # for the dropout
    _, wanted = function(weights, IMAGES, **told)
    torch.manual_seed(2)
    logits = network(IMAGES)
    close(logits, wanted)
    assert not weights.unread
    wanted_gradients = gradients(wanted, weights.parameters)
    assert_all_close(gradients(logits, dict(network.named_parameters())), wanted_gradients)
    assert_all_close(dict(network.named_buffers()), weights.after)

    with torch.no_grad():
        features, wanted = function(plain.Weights(network, training=False), IMAGES, **told)
        close(network.eval()(IMAGES), wanted)
        close(network.forward_features(IMAGES), features)
    assert network.num_features == features.shape[1]


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_imagenet_networks_equal_torchvision_with_the_same_weights(torchvision, name):
    torch.manual_seed(0)
    theirs = shaken(torchvision.models.get_model(name, num_classes=7).double()).train()
    ours = create_model(f"imagenet_{name}", 7).double().train()
    ours.load_state_dict(theirs.state_dict())  # strict: every name, every shape
    torch.manual_seed(2)  # MobileNetV2 drops features by default
    wanted = theirs(IMAGES)
    torch.manual_seed(2)
    logits = ours(IMAGES)
    close(logits, wanted)
    wanted_gradients = gradients(wanted, dict(theirs.named_parameters()))
    assert_all_close(gradients(logits, dict(ours.named_parameters())), wanted_gradients)
    assert_all_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    with torch.no_grad():
        close(ours.eval()(IMAGES), theirs.eval()(IMAGES))


@pytest.mark.parametrize(
    ("size", "poolings"), [((8, 8), 3), ((63, 70), 3), ((64, 66), 4)], ids=["8", "63", "64"]
)
@torch.no_grad()
def test_vgg_pools_once_more_from_64_pixels(size, poolings):
    torch.manual_seed(0)
    network = shaken(create_model("vgg8", 7)).eval()
    x = torch.randn(1, 3, *size)
    weights = plain.Weights(network, training=False)
    _, wanted = plain.vgg(weights, x, (1, 1, 1, 1, 1), poolings)
    torch.testing.assert_close(network(x), wanted, rtol=1e-4, atol=1e-4)
