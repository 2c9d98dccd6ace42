"""Networks of timm and torchvision. The libraries are imported only when they are needed.

A ``timm:`` or ``torchvision:`` network has the same interface as the built-in networks: it maps
images to logits and has ``forward_features`` and ``num_features``. Its parameter names start with
``network.``.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from bdkd.errors import RunError, first_line

from .libraries import described, import_library, is_installed
from .published import locate, timm_weights


class TimmNetwork(nn.Module):
    """A network of timm: maps images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``.

    Args:
        image_size: the only supported size (a number, or height and width), or None.
    """

    def __init__(self, name: str, network: Any, image_size: Any):
        super().__init__()
        self.name = name
        self.network: Any = network  # Any: timm's modules have more methods than nn.Module
        # The input of the classifier. In MobileNetV3, for example, it comes after a hidden layer of
        # the head, which timm's num_features does not include.
        self.num_features: int = getattr(network, "head_hidden_size", network.num_features)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        self._check(x)
        return self.network.forward_head(self.network.forward_features(x), pre_logits=True)

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        self._check(x)
        return self.network(x)

    def _check(self, x: Tensor) -> None:
        if self.image_size is not None and tuple(x.shape[-2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(
                f"{self.name} takes images of {height}x{width} pixels, "
                f"got {x.shape[-2]}x{x.shape[-1]}: set its option img_size for another size"
            )


class TorchvisionNetwork(nn.Module):
    """A network of torchvision: maps images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""

    def __init__(self, name: str, network: nn.Module):
        super().__init__()
        layers = [path for path, m in network.named_modules() if isinstance(m, nn.Linear)]
        if not layers:
            raise ValueError(
                f"{name} has no linear classifier, which bdkd needs to find the features: use "
                "another network"
            )
        # The classifier is the last linear layer. Without it, the network returns the features.
        self.classifier_path = layers[-1]  # in torchvision's network
        classifier: Any = network.get_submodule(self.classifier_path)
        self.num_features: int = classifier.in_features
        self.classifier: nn.Module = classifier
        network.set_submodule(self.classifier_path, nn.Identity())
        self.network = network

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        return self.network(x)

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.network(x))


def create_timm(name: str, num_classes: int, in_channels: int, **options: object) -> nn.Module:
    """Build the network that timm calls ``name``. Options are arguments of ``timm.create_model``.

    ``pretrained=True`` loads timm's weights, and downloads them if they are not on this machine.
    Under ``torch.device("meta")``, no weights are loaded.
    """
    timm = import_library("timm")
    shown = f"timm:{name}"
    if not timm.is_model(name):
        raise _unknown(shown, name, timm.list_models())
    on_meta = torch.get_default_device().type == "meta"
    if bool(options.pop("pretrained", False)) and not on_meta:
        published = timm_weights(name, options)
        if published is None:
            raise ValueError(f"timm publishes no weights of {shown}: leave out pretrained")
        content = _read(locate(published))
        network = _build_timm(name, num_classes, in_channels, content, options)
    else:
        network = _build_timm(name, num_classes, in_channels, None, options)
    known = network.pretrained_cfg  # also set without pretrained weights
    image_size = None
    if known.get("fixed_input_size"):
        image_size = options.get("img_size") or tuple(known["input_size"][-2:])
    return TimmNetwork(shown, network, image_size)


def adapted_to_timm(
    name: str, content: Any, num_classes: int, in_channels: int, options: Mapping[str, object]
) -> dict[str, Tensor]:
    """Return the state dict of a timm network with weights that timm publishes.

    timm renames the tensors of old files, and resizes position embeddings and the first
    convolution.

    Args:
        content: the loaded content of the file.
        num_classes: number of classes of the weights.
        in_channels: channels of the images of the network.
        options: options of the network.

    Raises:
        ValueError: the weights do not fit the network.
    """
    others = {key: value for key, value in options.items() if key != "pretrained"}
    return _build_timm(name, num_classes, in_channels, content, others).state_dict()


def _build_timm(
    name: str, num_classes: int, in_channels: int, content: Any, options: Mapping[str, object]
) -> Any:
    given: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels, **options}
    if content is not None:
        given["pretrained_cfg_overlay"] = {"state_dict": content}
    create = import_library("timm").create_model
    return _build(f"timm:{name}", create, name, content is not None, **given)


def _read(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise RunError(
            f"cannot read the weights {path}: {first_line(error)}; remove this file to download it "
            "again"
        ) from error


def create_torchvision(
    name: str, num_classes: int, in_channels: int, **options: object
) -> nn.Module:
    """Build the network that torchvision calls ``name``. Options are arguments of the function in
    torchvision that builds it."""
    models = import_library("torchvision").models
    shown = f"torchvision:{name}"
    names = models.list_models(module=models)
    if name not in names:
        raise _unknown(shown, name, names)
    if in_channels != 3:
        raise ValueError(
            f"{shown} takes images of 3 channels, got in_channels = {in_channels}: use a network "
            "of timm or bdkd"
        )
    if "weights" in options or "pretrained" in options:
        raise ValueError(
            f"{shown} has no option pretrained: set weights = pretrained in the section of the "
            "network in the recipe instead"
        )
    fixed: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):  # auxiliary classifiers make the output a tuple
        fixed |= {"aux_logits": False, "init_weights": True}
    network = _build(shown, models.get_model_builder(name), **fixed, **options)
    return TorchvisionNetwork(shown, network)


LIBRARIES = {"timm": create_timm, "torchvision": create_torchvision}


def in_timm(name: str) -> str:
    """Return a hint if timm has a model of this name, or an empty string."""
    if not is_installed("timm"):
        return ""
    try:
        found = import_library("timm").is_model(name)
    except RunError:
        return ""
    return f"timm has one: 'timm:{name}'" if found else ""


def image_size_of(library: str, name: str, options: Mapping[str, object]) -> int | None:
    """Return the side in pixels of the images for which a network of a library was made, or None if
    the name is unknown."""
    if library == "torchvision":
        return 299 if name == "inception_v3" else 224
    size = options.get("img_size")
    if isinstance(size, int):
        return size
    known = import_library("timm").models.get_pretrained_cfg(name)
    return None if known is None else int(known.input_size[-1])


def fixed_image_size_of(library: str, name: str, options: Mapping[str, object]) -> int | None:
    """Return the side in pixels of the only images that a network of a library supports, or None if
    it supports several sizes or the name is unknown."""
    known = import_library("timm").models.get_pretrained_cfg(name) if library == "timm" else None
    fixed = known is not None and known.fixed_input_size
    return image_size_of(library, name, options) if fixed else None


def _build(shown: str, build: Callable[..., nn.Module], /, *args: Any, **options: Any) -> nn.Module:
    try:
        return build(*args, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # caused by options
        raise ValueError(f"{shown} cannot be built: {described(error)}") from error


def _unknown(shown: str, name: str, names: list[str]) -> ValueError:
    nearest = get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0]
    library = shown.partition(":")[0]
    return ValueError(f"{library} has no model {name!r}; the nearest name is '{library}:{nearest}'")
