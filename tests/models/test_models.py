"""The registry and the CIFAR families: names, counts, shapes, and the ways a trainer runs them."""

import pytest
import torch

from bdkd.models import create_model, list_models

# The distillation literature's counts for 32x32x3 images.
PARAMETERS_100 = {
    "resnet8": 83_892,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_16_4": 2_772_020,
    "wrn_16_6": 6_206_772,
    "wrn_16_8": 11_007_540,
    "wrn_16_10": 17_174_324,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "resnet18": 11_220_132,
    "resnet50": 23_705_252,
}
# torchvision's; timm's for MobileNetV1.
PARAMETERS_1000 = {
    "imagenet_resnet18": 11_689_512,
    "imagenet_resnet34": 21_797_672,
    "imagenet_resnet50": 25_557_032,
    "imagenet_mobilenet_v1": 4_231_976,
    "imagenet_mobilenet_v2": 3_504_872,
    "imagenet_shufflenet_v2_x0_5": 1_366_792,
    "imagenet_shufflenet_v2_x1_0": 2_278_604,
    "imagenet_shufflenet_v2_x1_5": 3_503_624,
    "imagenet_shufflenet_v2_x2_0": 7_393_996,
}
PARAMETERS_10 = {"resnet20": 272_474, "wrn_16_1": 175_066, "wrn_16_8": 10_961_370}


def parameters(name: str, num_classes: int, in_channels: int = 3, **options) -> int:
    with torch.device("meta"):
        network = create_model(name, num_classes, in_channels, **options)
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [(name, 100, count) for name, count in PARAMETERS_100.items()]
    + [(name, 10, count) for name, count in PARAMETERS_10.items()]
    + [(name, 1000, count) for name, count in PARAMETERS_1000.items()],
)
def test_parameter_counts(name, classes, expected):
    assert parameters(name, classes) == expected


def test_every_name_is_listed_once_and_builds():
    names = list_models()
    between = {"resnet14", "resnet44", "resnet34", "wrn_28_10", "vgg11"}
    assert set(PARAMETERS_100) | set(PARAMETERS_1000) | between == set(names)
    assert len(names) == len(set(names))
    assert all(parameters(name, 10) > 0 for name in names)
    # What a newcomer reads first are the small networks, each family together and growing.
    assert [name.startswith("imagenet_") for name in names] == sorted(
        name.startswith("imagenet_") for name in names
    )


def test_a_layer_costs_what_its_depth_says():
    # Two more blocks a stage: 44 lies as far from 32 as 32 from 20, and 14 as far from 8 as 20.
    assert parameters("resnet44", 100) == 2 * 472_756 - 278_324
    assert 2 * parameters("resnet14", 100) == 83_892 + 278_324


def test_ten_classes_cost_ninety_rows_of_the_classifier_less():
    for name, count in PARAMETERS_100.items():
        with torch.device("meta"):
            features = create_model(name, 10).num_features
        assert parameters(name, 10) == count - 90 * (features + 1), name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("wrn-16-2", "wrn_16_2"),
        ("WRN_16_2", "wrn_16_2"),
        ("Wrn-16_2", "wrn_16_2"),
        # As the distillation literature's code spells them.
        ("ResNet50", "resnet50"),
        ("MobileNetV2", "mobilenetv2"),
        ("ShuffleV1", "shufflenetv1"),
        ("ShuffleV2", "shufflenetv2"),
    ],
)
def test_hyphens_and_case_do_not_matter(alias, name):
    assert parameters(alias, 100) == PARAMETERS_100[name]


def test_widths_beyond_the_list():
    assert parameters("wrn_16_3", 100) > PARAMETERS_100["wrn_16_2"]
    assert parameters("wrn_10_1", 100) < PARAMETERS_100["wrn_16_1"]
    half = create_model("resnet20", 10, width=0.5)
    assert half.num_features == 32
    assert create_model("resnet8x4", 10, width=0.01).num_features == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("resnet21", 10), "no model named 'resnet21'; the nearest name is 'resnet20'"),
        (("wrn16-2", 10), "the nearest name is 'wrn_16_2'"),
        (("", 10), "the nearest name is"),
        # As torchvision's users would write.
        (("mobilenet_v2", 1000), "the nearest name is 'imagenet_mobilenet_v2'"),
        (("shufflenet_v2_x1_0", 1000), "the nearest name is 'imagenet_shufflenet_v2_x1_0'"),
        (("mobilenet-v1", 1000), "the nearest name is 'imagenet_mobilenet_v1'"),
        (("keras:resnet50", 1000), "no model named 'keras:resnet50'"),
        (("wrn_17_2", 10), r"depth D of 6n \+ 4 .* got D = 17, W = 2"),
        (("wrn_4_2", 10), "got D = 4"),
        (("wrn_16_0", 10), "W = 0"),
        (("resnet8", 0), "num_classes must be an integer >= 1, got 0"),
        (("resnet8", 10, 0), "in_channels must be an integer >= 1, got 0"),
        (("resnet8", 10.0), "num_classes must be an integer >= 1, got 10.0"),
    ],
)
def test_bad_calls_say_what_is_needed(call, message):
    with pytest.raises(ValueError, match=message) as error:
        create_model(*call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet8", {"widht": 2}, "'resnet8' has no option 'widht'; it takes width"),
        ("resnet8", {"depth": 20}, "no option 'depth'"),
        ("wrn-16-2", {"width": 4}, "'wrn_16_2' has no option 'width'; it takes dropout"),
        ("resnet8", {"width": 0}, "width must be a finite number > 0, got 0"),
        ("resnet8", {"width": float("nan")}, "width must be a finite number > 0, got nan"),
        ("resnet8", {"width": "2"}, "width must be a finite number > 0, got '2'"),
        ("wrn_16_1", {"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ("vgg8", {"width": 2}, "'vgg8' has no option 'width'; it takes no option"),
        ("shufflenetv2", {"size": "x2_0"}, "it takes no option"),
        ("resnet18", {"zero_init": True}, "it takes zero_init_residual"),
        ("resnet18", {"zero_init_residual": "no"}, "must be true or false, got 'no'"),
        ("mobilenetv2", {"expansion": 1.5}, "expansion must be an integer >= 1, got 1.5"),
        ("mobilenetv2", {"width": -1}, "width must be a finite number > 0, got -1"),
        ("imagenet_mobilenet_v1", {"width": 0}, "width must be a finite number > 0, got 0"),
        ("imagenet_mobilenet_v2", {"dropout": 1}, r"dropout must be a number in \[0, 1\)"),
    ],
)
def test_bad_options_say_what_is_needed(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, 10, **options)


# One of each family, its smallest.
FAMILIES = [
    "resnet8", "wrn_10_2", "resnet18", "resnet50", "vgg8", "mobilenetv2", "shufflenetv1",
    "shufflenetv2", "imagenet_resnet18", "imagenet_mobilenet_v1", "imagenet_mobilenet_v2",
    "imagenet_shufflenet_v2_x0_5",
]  # fmt: skip


@pytest.mark.parametrize("name", [*FAMILIES, "resnet8x4", "vgg13"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (4, 13)])
def test_any_channels_and_size(name, channels, size):
    network = create_model(name, 7, channels)
    x = torch.randn(2, channels, size, size + 3)
    features = network.forward_features(x)
    assert features.shape == (2, network.num_features)
    logits = network(x)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2"])
def test_convolutions_start_with_unit_gain_over_the_fan_out(name):
    torch.manual_seed(0)
    for module in create_model(name, 10).modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@torch.no_grad()
def test_a_wide_block_projects_the_activated_input_and_passes_on_the_raw_one():
    network = create_model("wrn_16_2", 10).eval()
    first, second = network.stages[0]
    for block in (first, second):  # no activation comes through the first norm
        block.bn1.weight.zero_()
        block.bn1.bias.fill_(-1.0)
        block.bn2.bias.fill_(-1.0)
        block.bn2.weight.zero_()
    assert torch.equal(first(torch.randn(2, 16, 8, 8)), torch.zeros(2, 32, 8, 8))
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(second(x), x)


@torch.no_grad()
def test_a_residual_block_activates_the_sum():
    first, second = create_model("resnet14", 10).eval().stages[1]
    for block in (first, second):
        block.bn2.weight.zero_()  # the shortcut alone is left
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(first(x), first.downsample(x).relu())
    y = torch.randn(2, 32, 4, 4)
    assert torch.equal(second(y), y.relu())


@pytest.mark.parametrize("name", ["vgg8", "vgg13"])
def test_vgg_names_the_smallest_image(name):
    network = create_model(name, 10).eval()
    with pytest.raises(ValueError, match="images of at least 8x8 pixels, got 8x7"):
        network(torch.randn(1, 3, 8, 7))
    # Tiny-ImageNet's 64 pixels are halved once more: what comes to the average is no larger.
    sizes = []
    network.stages[-1].register_forward_hook(lambda _, __, y: sizes.append(tuple(y.shape[2:])))
    with torch.no_grad():
        network(torch.randn(1, 3, 32, 32))
        network(torch.randn(1, 3, 64, 64))
    assert sizes == [(4, 4), (4, 4)]


@pytest.mark.parametrize("name", ["resnet18", "imagenet_resnet50"])
@torch.no_grad()
def test_zero_init_residual_starts_blocks_as_their_shortcuts(name):
    network = create_model(name, 10, zero_init_residual=True).eval()
    block = network.layer2[1]
    x = torch.rand(2, block.conv1.in_channels, 4, 4)
    assert torch.equal(block(x), x)
    assert not torch.equal(create_model(name, 10).eval().layer2[1](x), x)


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_last_and_bf16_autocast(name):
    torch.manual_seed(0)
    network = create_model(name, 10)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for _ in range(20):  # statistics of these images: untrained norms let values explode
            network(x)
    network.eval()
    plain = network(x)
    network = network.to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(last), plain, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(last)
    assert low.dtype is torch.bfloat16
    # Three significant digits a layer: far from exact, far from another function.
    assert (low.float() - plain).abs().max() < 0.1 * plain.abs().max() + 0.1
    # As a trainer runs it: every weight gets a finite gradient, and the layout is kept throughout.
    layouts = []
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _, inputs, __: layouts.append(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(last).float().square().mean()
    loss.backward()
    assert layouts
    assert all(layouts)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_traces_without_a_graph_break(name):
    torch.manual_seed(0)
    network = create_model(name, 10)
    x = torch.randn(2, 3, 16, 16)
    # The trace alone: generating code, forward and backward, costs up to a minute a network.
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.manual_seed(1)  # for the dropout
    logits = compiled(x)
    torch.manual_seed(1)
    torch.testing.assert_close(logits, network(x))


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1"])
def test_compiles_forward_and_backward(name):
    torch.manual_seed(0)
    network = create_model(name, 10, dropout=0.3) if name[0] == "w" else create_model(name, 10)
    x = torch.randn(4, 3, 16, 16)
    # aot_eager traces forward and backward as inductor would, without its minute of C++.
    compiled = torch.compile(network.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
    compiled.train()
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    network = create_model("wrn_10_1", 10, dropout=0.5)
    x = torch.randn(4, 3, 8, 8)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
