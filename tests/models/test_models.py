"""The registry and the built-in networks: names, parameter counts, shapes, and training modes."""

import functools

import pytest
import torch
from torch import nn

from bdkd.models import create_model, list_models, register_model

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
    "wrn_28_10": 36_536_884,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
    "resnet50": 23_705_252,
}
# The counts of torchvision, and of timm for MobileNetV1.
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


@functools.cache
def parameters(name: str, num_classes: int, **options) -> int:
    with torch.device("meta"):
        network = create_model(name, num_classes, **options)
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [(name, 100, count) for name, count in PARAMETERS_100.items()]
    + [(name, 10, count) for name, count in PARAMETERS_10.items()]
    + [(name, 1000, count) for name, count in PARAMETERS_1000.items()],
)
def test_parameter_counts(name, classes, expected):
    assert parameters(name, classes) == expected


def test_every_name_is_listed_once():
    names = list_models()
    between = {"resnet14", "resnet44"}
    assert set(PARAMETERS_100) | set(PARAMETERS_1000) | between == set(names)
    assert len(names) == len(set(names))
    # Small networks come first, sorted by family and depth.
    assert names.index("resnet20") < names.index("resnet110") < names.index("resnet8x4")
    assert [name.startswith("imagenet_") for name in names] == sorted(
        name.startswith("imagenet_") for name in names
    )


def test_resnet14_and_resnet44_have_the_parameters_of_their_depth():
    # Each step of 6 layers adds one block per stage: 8, 14, 20 and, in steps of two, 20, 32, 44.
    assert parameters("resnet44", 100) == 2 * 472_756 - 278_324
    assert 2 * parameters("resnet14", 100) == 83_892 + 278_324


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("wrn-16-2", "wrn_16_2"),
        ("WRN_16_2", "wrn_16_2"),
        ("Wrn-16_2", "wrn_16_2"),
        # The spelling in the code of the distillation literature.
        ("ResNet50", "resnet50"),
        ("MobileNetV2", "mobilenetv2"),
        ("ShuffleV1", "shufflenetv1"),
        ("ShuffleV2", "shufflenetv2"),
    ],
)
def test_hyphens_and_case_do_not_matter(alias, name):
    assert parameters(alias, 100) == PARAMETERS_100[name]


@pytest.mark.parametrize(
    ("name", "width", "channels"),
    [
        ("resnet8", 0.6, [10, 10, 19, 38]),  # 9.6, 9.6, 19.2, 38.4: to the nearest
        ("resnet8x4", 0.01, [1, 1, 1, 3]),  # at least one
        ("mobilenetv2", 0.35, [11, 5, 8, 11, 22, 33, 56, 112, 1280]),  # 5.6, 33.6: down
        ("mobilenetv2", 0.01, [1, 1, 1, 1, 1, 1, 1, 3, 1280]),
        ("mobilenetv2", 1.5, [48, 24, 36, 48, 96, 144, 240, 480, 1920]),
        # 9.6 and 19.2 up, since 8 and 16 are less than nine tenths of them; 153.6 and 307.2 down.
        ("imagenet_mobilenet_v1", 0.3, [16, 24, 40, 40, 80, 80, *[152] * 6, 304, 304]),
    ],
)
def test_a_width_multiplies_the_channels_of_every_stage(name, width, channels):
    with torch.device("meta"):
        network = create_model(name, 10, width=width)
    if name == "mobilenetv2":
        blocks = [network.features[i].conv[-1] for i in (1, 2, 4, 7, 11, 14, 17)]
        norms = [network.features[0][1], *blocks, network.features[18][1]]
    elif name == "imagenet_mobilenet_v1":
        norms = [network.stem[1], *(block[1][1] for block in network.blocks)]
    else:
        norms = [network.bn, *(stage[0].bn2 for stage in network.stages)]
    assert [norm.num_features for norm in norms] == channels
    assert network.num_features == channels[-1]


def test_wide_resnets_have_the_depth_and_width_in_their_name():
    # A block has two convolutions and two norms. Its parameters grow with the square of the width.
    assert parameters("wrn_22_1", 100) - parameters("wrn_16_1", 100) == sum(
        2 * (9 * c * c) + 4 * c for c in (16, 32, 64)
    )
    with torch.device("meta"):
        assert create_model("wrn_10_3", 10).num_features == 192


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("resnet21", 10), "no model named 'resnet21'; the nearest name is 'resnet20'"),
        (("wrn16-2", 10), "the nearest name is 'wrn_16_2'"),
        (("", 10), "the nearest name is"),
        # Names in torchvision.
        (("mobilenet_v2", 1000), "the nearest name is 'imagenet_mobilenet_v2'"),
        (("shufflenet_v2_x1_0", 1000), "the nearest name is 'imagenet_shufflenet_v2_x1_0'"),
        (("mobilenet-v1", 1000), "the nearest name is 'imagenet_mobilenet_v1'"),
        (("keras:resnet50", 1000), "no model named 'keras:resnet50'"),
        (("wrn_16_2x", 10), "no model named 'wrn_16_2x'; the nearest name is 'wrn_16_2'"),
        (("WRN-99", 10), "no model named 'WRN-99'; the nearest name is 'wrn_"),
        (("wrn_17_2", 10), r"depth D of 6n \+ 4 .* got D = 17, W = 2"),
        (("wrn_18_2", 10), "got D = 18"),
        (("wrn_4_2", 10), "got D = 4"),
        (("wrn_16_0", 10), "W = 0"),
        (("resnet8", 0), "num_classes must be an integer >= 1, got 0"),
        (("resnet8", 10, 0), "in_channels must be an integer >= 1, got 0"),
        (("resnet8", True), "num_classes must be an integer >= 1, got True"),
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
        ("resnet8", {"width": 0}, "width must be a finite number above 0, got 0"),
        ("resnet8", {"width": float("nan")}, "width must be a finite number above 0, got nan"),
        ("resnet8", {"width": True}, "width must be a finite number above 0, got True"),
        ("resnet8", {"width": float("inf")}, "width must be a finite number above 0, got inf"),
        ("resnet8", {"width": "2"}, "width must be a finite number above 0, got '2'"),
        ("wrn_16_1", {"dropout": 1.0}, r"dropout must be a finite number in \[0, 1\), got 1.0"),
        ("vgg8", {"width": 2}, "'vgg8' has no option 'width'; it takes no option"),
        ("shufflenetv2", {"size": "x2_0"}, "it takes no option"),
        ("resnet18", {"zero_init": True}, "it takes zero_init_residual"),
        ("resnet18", {"zero_init_residual": "no"}, "must be true or false, got 'no'"),
        ("mobilenetv2", {"expansion": 1.5}, "expansion must be an integer at least 1, got 1.5"),
        ("mobilenetv2", {"expansion": 0}, "expansion must be an integer at least 1, got 0"),
        ("mobilenetv2", {"width": -1}, "width must be a finite number above 0, got -1"),
        ("imagenet_mobilenet_v1", {"width": 0}, "width must be a finite number above 0, got 0"),
        ("imagenet_mobilenet_v2", {"width": 0}, "width must be a finite number above 0, got 0"),
        ("imagenet_mobilenet_v2", {"dropout": 1}, r"dropout must be a finite number in \[0, 1\)"),
    ],
)
def test_bad_options_say_what_is_needed(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, 10, **options)


def test_a_name_must_be_a_string():
    with pytest.raises(TypeError, match=r"name must be a string such as 'resnet20', got 20 .int"):
        create_model(20, 10)


def test_two_families_cannot_have_one_name():
    with pytest.raises(ValueError, match=r"the model 'resnet8' is registered by bdkd\.models"):
        register_model("resnet8")(lambda num_classes, in_channels: None)
    assert parameters("resnet8", 10) > 0


# The smallest network of each family.
FAMILIES = [
    "resnet8", "wrn_10_2", "resnet18", "imagenet_resnet50", "vgg8", "mobilenetv2", "shufflenetv1",
    "shufflenetv2", "imagenet_mobilenet_v1", "imagenet_mobilenet_v2",
    "imagenet_shufflenet_v2_x0_5",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_grey_images_of_few_pixels(name):
    """Digits have one channel and 8x8 pixels, of which deeper layers process a single pixel."""
    network = create_model(name, 7, 1)
    logits = network(torch.randn(2, 1, 8, 11))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(("height", "width"), [(8, 7), (7, 8)])
def test_vgg_refuses_images_below_8_pixels(height, width):
    network = create_model("vgg8", 10)
    message = f"images of at least 8x8 pixels, got {height}x{width}"
    with pytest.raises(ValueError, match=message):
        network(torch.randn(1, 3, height, width))


@pytest.mark.parametrize("name", ["resnet18", "imagenet_resnet50"])  # each kind of block
@torch.no_grad()
def test_zero_init_residual_starts_blocks_as_their_shortcuts(name):
    network = create_model(name, 10, zero_init_residual=True).eval()
    blocks = [*network.layer1, *network.layer2, *network.layer3, *network.layer4]
    for block in blocks:
        x = torch.randn(1, block.conv1.in_channels, 3, 3)
        assert torch.equal(block(x), block.downsample(x).relu())
        last = block.bn3 if hasattr(block, "bn3") else block.bn2
        assert not last.weight.any()  # the weight itself, so that it gets a gradient at once
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(not norm.weight.any() for norm in norms) == len(blocks)  # and no other norm


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_last_and_bf16_autocast(name):
    torch.manual_seed(0)
    network = create_model(name, 10)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.9
        network(x)  # use the statistics of these images, because untrained norms let values explode
    network.eval()
    plain = network(x)
    network = network.to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(last), plain, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(last)
    assert low.dtype is torch.bfloat16
    # bfloat16 has about three significant digits, so the tolerance is large. It is still small
    # enough to detect another function.
    assert (low.float() - plain).abs().max() < 0.1 * plain.abs().max() + 0.1
    # In training, every weight gets a finite gradient, and all layers keep the memory format.
    layouts = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
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


def without_repeats(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """Remove repeated blocks. Of the blocks in a stage that keep the shape of their input, only the
    first one stays."""
    keeps_shape = {}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, y: keeps_shape.update({module: inputs[0].shape == y.shape})
        )
        for module in network.modules()
        if list(module.children())
    ]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    for stage in [m for m in network.modules() if isinstance(m, nn.Sequential)]:
        repeats = [i for i, block in enumerate(stage) if keeps_shape.get(block)]
        for i in reversed(repeats[1:]):
            del stage[i]
    return network


# Each kind of block and of network once. Wide networks are compiled below.
@pytest.mark.parametrize(
    "name",
    ["resnet8", "imagenet_resnet50", "vgg8", "imagenet_mobilenet_v1", "imagenet_mobilenet_v2",
     "shufflenetv1", "imagenet_shufflenet_v2_x0_5"],
)  # fmt: skip
def test_traces_without_a_graph_break(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    network = without_repeats(create_model(name, 10), x)
    # Only trace, because generating code for forward and backward takes up to a minute per network.
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.manual_seed(1)  # for the dropout
    logits = compiled(x)
    torch.manual_seed(1)
    torch.testing.assert_close(logits, network(x))


def test_compiles_forward_and_backward():
    torch.manual_seed(0)
    network = create_model("wrn_10_1", 10, dropout=0.3)
    x = torch.randn(4, 3, 16, 16)
    # aot_eager traces forward and backward as inductor does, without a minute of C++ compilation.
    compiled = torch.compile(network.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
    compiled.train()
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
