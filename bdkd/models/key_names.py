"""The parameter names of networks in timm, torchvision and RepDistiller.

A layout maps each key of a network's state dict to the key in a file of one of these libraries.
Only networks that compute the same function are listed. Equal shapes would not be enough, because
networks with different activations, for example, can have the same shapes.
"""

import re
from collections.abc import Callable, Iterator

from torch import nn

from .bridge import TimmNetwork, TorchvisionNetwork
from .mobilenet import MOBILENET_V2_BLOCKS, MobileNetV2
from .resnet import ResNet, ResNetCIFAR
from .shufflenet import SHUFFLENET_UNITS, ShuffleNetV1, ShuffleNetV2
from .vgg import VGG
from .wide_resnet import WideResNet

Layout = dict[str, str]

# Built-in network -> library -> the library's name of the same network
_COUNTERPARTS: dict[str, dict[str, str]] = {
    "imagenet_mobilenet_v2": {"timm": "mobilenetv2_100", "torchvision": "mobilenet_v2"},
    **{f"imagenet_resnet{n}": {"timm": f"resnet{n}", "torchvision": f"resnet{n}"}
       for n in (18, 34, 50)},
    **{f"imagenet_{name}": {"torchvision": name}
       for name in (f"shufflenet_v2_{width}" for width in ("x0_5", "x1_0", "x1_5", "x2_0"))},
}  # fmt: skip

# Key patterns of a built-in network -> their replacements in github.com/HobbitLong/RepDistiller
_Rule = tuple[str, str | Callable[[re.Match[str]], str]]
_REPDISTILLER: dict[type[nn.Module], tuple[_Rule, ...]] = {
    ResNetCIFAR: (
        (r"^conv\.", "conv1."), (r"^bn\.", "bn1."), (r"^classifier\.", "fc."),
        (r"^stages\.(\d+)\.", lambda match: f"layer{int(match[1]) + 1}."),
    ),
    WideResNet: (
        (r"^conv\.", "conv1."), (r"^bn\.", "bn1."), (r"^classifier\.", "fc."),
        (r"^stages\.(\d+)\.", lambda match: f"block{int(match[1]) + 1}.layer."),
        (r"\.projection\.", ".convShortcut."),
    ),
    ShuffleNetV1: (
        (r"^conv\.", "conv1."), (r"^bn\.", "bn1."), (r"^classifier\.", "linear."),
        (r"^stages\.(\d+)\.", lambda match: f"layer{int(match[1]) + 1}."),
    ),
    VGG: ((r"^stages\.(\d+)\.", r"block\1."),),
    ResNet: ((r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear.")),
}  # fmt: skip


def counterpart(model: str, library: str) -> str | None:
    """Return the name of a model in another library, ``timm`` or ``torchvision``, or None if the
    library has no network that computes the same function."""
    prefix, colon, name = model.partition(":")
    if colon:
        return name if prefix.lower() == library else None
    return _COUNTERPARTS.get(model.lower().replace("-", "_"), {}).get(library)


def layouts(network: nn.Module, model: str) -> dict[str, Layout]:
    """Return the known layouts of a network by the library that writes them: ``bdkd``, ``timm``,
    ``torchvision`` or ``RepDistiller``.

    Args:
        network: the network.
        model: its name in bdkd.
    """
    keys = list(network.state_dict())
    known = {"bdkd": {key: key for key in keys}}
    if isinstance(network, TimmNetwork):
        known["timm"] = {key: key.removeprefix("network.") for key in keys}
    elif isinstance(network, TorchvisionNetwork):
        known["torchvision"] = {key: _of_torchvision(key, network) for key in keys}
    elif counterpart(model, "timm") and isinstance(network, MobileNetV2):
        known["torchvision"] = known["bdkd"]
        known["timm"] = _in_order(network, _timm_mobilenet_v2())
    else:
        for library in ("timm", "torchvision"):
            if counterpart(model, library):
                known[library] = known["bdkd"]
    if "torchvision" in known:  # RepDistiller has only networks for small images
        return known
    for kind, rules in _REPDISTILLER.items():
        if isinstance(network, kind):
            known["RepDistiller"] = {key: _substituted(key, rules) for key in keys}
    if isinstance(network, MobileNetV2):
        known["RepDistiller"] = _in_order(network, _repdistiller_mobilenet_v2())
    elif isinstance(network, ShuffleNetV2):
        known["RepDistiller"] = _in_order(network, _repdistiller_shufflenet_v2())
    return known


def head_keys(network: nn.Module) -> set[str]:
    """Return the keys of a network's classifier, which is the layer that timm declares as the
    classifier, or otherwise the last linear layer."""
    names: list[str] = []
    if isinstance(network, TorchvisionNetwork):
        names = ["classifier"]
    elif isinstance(network, TimmNetwork):
        given = network.network.pretrained_cfg.get("classifier") or ()
        names = [f"network.{name}" for name in ([given] if isinstance(given, str) else given)]
        found = network.network.get_classifier()
        heads = list(found) if isinstance(found, tuple | list) else [found]
        names += [n for n, m in network.named_modules() if any(m is head for head in heads)]
    keys = {
        key for key in network.state_dict() if any(key.startswith(f"{name}.") for name in names)
    }
    if keys:
        return keys
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return {key for key in network.state_dict() if key.rpartition(".")[0] in linear[-1:]}


def _of_torchvision(key: str, network: TorchvisionNetwork) -> str:
    if key.startswith("classifier."):
        return key.replace("classifier", network.classifier_path, 1)
    return key.removeprefix("network.")


def _substituted(key: str, rules: tuple[_Rule, ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _in_order(network: nn.Module, layers: Iterator[str]) -> Layout:
    """Return a layout, given the names of the layers in the other library. Both libraries define
    the layers in the same order."""
    own = [name for name, module in network.named_modules() if len([*module.parameters(False)])]
    names = dict(zip(own, layers, strict=True))
    keys = (key.rpartition(".") for key in network.state_dict())
    return {f"{layer}.{leaf}": f"{names[layer]}.{leaf}" for layer, _, leaf in keys}


def _timm_mobilenet_v2() -> Iterator[str]:
    yield from ("conv_stem", "bn1")
    for stage, blocks in enumerate(MOBILENET_V2_BLOCKS):
        layers: tuple[str, ...] = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
        if stage == 0:  # does not expand its input
            layers = ("conv_dw", "bn1", "conv_pw", "bn2")
        for block in range(blocks):
            yield from (f"blocks.{stage}.{block}.{layer}" for layer in layers)
    yield from ("conv_head", "bn2", "classifier")


def _repdistiller_mobilenet_v2() -> Iterator[str]:
    yield from ("conv1.0", "conv1.1")
    for stage, blocks in enumerate(MOBILENET_V2_BLOCKS):
        for block in range(blocks):
            yield from (f"blocks.{stage}.{block}.conv.{layer}" for layer in (0, 1, 3, 4, 6, 7))
    yield from ("conv2.0", "conv2.1", "classifier.0")


def _repdistiller_shufflenet_v2() -> Iterator[str]:
    yield from ("conv1", "bn1")
    for stage, units in enumerate(SHUFFLENET_UNITS, 1):
        for unit in range(units):
            convolutions = 3 if unit else 5  # the first unit has two branches
            for layer in range(1, convolutions + 1):
                yield from (f"layer{stage}.{unit}.conv{layer}", f"layer{stage}.{unit}.bn{layer}")
    yield from ("conv2", "bn2", "linear")
