"""Networks of timm and torchvision with bdkd's interface, and bdkd's networks compared to them."""

import sys

import pytest
import torch
from torch import nn

from bdkd.errors import RunError
from bdkd.models import create_model


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_imagenet_resnets_have_the_parameter_names_of_timm(timm, name):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=7)
        ours = create_model(f"imagenet_{name}", 7)
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize(("name", "width"), [("mobilenetv1_100", 1.0), ("mobilenetv1_125", 1.25)])
def test_mobilenet_v1_has_the_widths_of_timm(timm, name, width):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=7)
        ours = create_model("imagenet_mobilenet_v1", 7, width=width)
    assert list(shapes(ours).values()) == list(shapes(theirs).values())


@pytest.mark.parametrize("width", [0.35, 0.5, 1.4])
def test_mobilenet_v2_has_the_widths_of_torchvision(torchvision, width):
    with torch.device("meta"):
        theirs = torchvision.models.mobilenet_v2(width_mult=width)
        ours = create_model("imagenet_mobilenet_v2", 1000, width=width)
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("size", ["x0_5", "x1_0", "x1_5", "x2_0"])
def test_shufflenet_v2_has_the_widths_of_torchvision(torchvision, size):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(f"shufflenet_v2_{size}")
        ours = create_model(f"imagenet_shufflenet_v2_{size}", 1000)
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("timm:resnet18", 32, {"drop_rate": 0.1}),
        ("timm:mobilenetv1_100", 32, {}),
        ("timm:mobilenetv3_small_050", 32, {}),  # a hidden layer after the pooling
        ("timm:vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),
        ("TIMM:resnet18.a1_in1k", 32, {}),  # with a tag, and the library in any case
    ],
)
def test_timm_networks_have_features_and_logits(timm, name, size, options):
    torch.manual_seed(0)
    network = create_model(name, 7, 1, **options).eval()
    x = torch.randn(2, 1, size, size)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x).shape == (2, 7)
    features = network.forward_features(x)
    assert features.shape == (2, network.num_features)
    classifier = network.network.get_classifier()
    torch.testing.assert_close(classifier(features), network(x))
    network.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("torchvision:resnet18", 32, {"zero_init_residual": True}),
        ("torchvision:mobilenet_v3_small", 32, {}),
        ("torchvision:googlenet", 32, {}),
        ("torchvision:swin_t", 64, {}),
    ],
)
def test_torchvision_networks_have_features_and_logits(torchvision, name, size, options):
    torch.manual_seed(0)
    network = create_model(name, 7, **options).eval()
    x = torch.randn(2, 3, size, size)
    features = network.forward_features(x)
    assert features.shape == (2, network.num_features)
    torch.testing.assert_close(network.classifier(features), network(x))
    logits = network.train()(x)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_networks_of_timm_and_torchvision_keep_their_parameters(timm):
    with torch.device("meta"):
        for name in ("timm:resnet50", "torchvision:resnet50"):
            network = create_model(name, 1000)
            assert sum(p.numel() for p in network.parameters()) == 25_557_032


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (
            ("timm:resnt50", 7),
            {},
            "timm has no model 'resnt50'; the nearest name is 'timm:resnet50",
        ),
        (("timm:", 7), {}, "timm has no model ''; the nearest name is 'timm:"),
        (("timm:hf-hub:timm/resnet18", 7), {}, "timm has no model 'hf-hub:timm/resnet18'"),
        (("timm:resnet18", 7), {"foo": 1}, "timm:resnet18 cannot be built: TypeError.*'foo'"),
        (("timm:resnet18.foo", 7), {}, "Invalid pretrained tag"),
        (("timm:resnet18", 0), {}, "num_classes must be an integer >= 1"),
        (("torchvision:resnt50", 7), {}, "the nearest name is 'torchvision:resnet50'"),
        (("torchvision:fasterrcnn_resnet50_fpn", 7), {}, "the nearest name is 'torchvision:"),
        (("torchvision:resnet18", 7, 1), {}, "takes images of 3 channels, got in_channels = 1"),
        (("torchvision:resnet18", 7), {"foo": 1}, "torchvision:resnet18 cannot be built.*'foo'"),
        (("torchvision:resnet18", 7), {"pretrained": True}, "set weights = pretrained"),
        (("torchvision:resnet18", 7), {"weights": "DEFAULT"}, "set weights = pret"),
        (("torchvision:resnet50", 7), {"width_per_group": -64}, "resnet50 cannot be built: Runt"),
        (("timm:vit_tiny_patch16_224", 7), {"embed_dim": 190}, "cannot be built: AssertionError"),
        (("timm:VIT_TNY_PATCH16_224", 7), {}, "the nearest name is 'timm:vit_tiny_patch16_224'"),
        (("torchvision:squeezenet1_0", 7), {}, "no linear classifier"),
    ],
)
def test_bad_calls_say_what_is_needed(timm, call, options, message):
    with pytest.raises(ValueError, match=message) as error:
        create_model(*call, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, (32, 32), r"takes images of 224x224 pixels, got 32x32.*img_size"),
        ({"img_size": (32, 48)}, (48, 32), "takes images of 32x48 pixels, got 48x32"),
        ({"img_size": (32, 48)}, (64, 48), "takes images of 32x48 pixels, got 64x48"),
    ],
)
def test_an_error_names_the_supported_image_size(timm, options, given, message):
    network = create_model("timm:vit_tiny_patch16_224", 7, depth=1, **options)
    for compute in (network, network.forward_features):
        with pytest.raises(ValueError, match=message):
            compute(torch.zeros(1, 3, *given))
    size = options.get("img_size", (224, 224))
    assert network(torch.zeros(1, 3, *size)).shape == (1, 7)


def test_a_network_with_auxiliary_classifiers_returns_one_output(torchvision):
    with torch.device("meta"):
        network = create_model("torchvision:inception_v3", 7)
        assert network.train()(torch.empty(2, 3, 96, 96)).shape == (2, 7)


def test_missing_pretrained_weights_are_an_error_of_one_line(timm, monkeypatch, tmp_path):
    from huggingface_hub import constants

    # Use the offline mode of the Hub and an empty cache.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = r"weights of timm:resnet18.a1_in1k are not on this machine.*HF_HUB_OFFLINE is set"
    with pytest.raises(RunError, match=message) as error:
        create_model("timm:resnet18", 7, pretrained=True)
    assert "\n" not in str(error.value)
    with torch.device("meta"):  # a dry run needs no weights
        create_model("timm:resnet18", 7, pretrained=True)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_missing_library_is_an_error_that_names_the_extra(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RunError, match=rf"{library} is not installed: pip install 'bdkd\[imagenet"):
        create_model(f"{library}:resnet18", 10)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')",
         "does not import .RuntimeError: operator torchvision::nms does not exist.: install the "
         "torchvision that belongs to torch"),
        ("raise OSError('libcudart.so: cannot open')", "does not import .OSError: libcudart.so: c"),
        ("import math; math.no_such_name", "does not import .AttributeError: module 'math' has no"),
        ("raise RuntimeError('one\\ntwo')", "does not import .RuntimeError: one.: install"),
        ("raise RuntimeError", "does not import .RuntimeError.: install"),
        ("import no_such_module_here", "timm needs no_such_module_here: pip install"),
    ],
)  # fmt: skip
def test_an_import_error_of_a_library_is_shown_with_its_cause(code, message, monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(RunError, match=message) as error:
        create_model("timm:resnet18", 10)
    assert "\n" not in str(error.value)
