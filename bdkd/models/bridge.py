"""Networks of timm and torchvision, made by those libraries; each is imported when it is asked for.

A ``timm:`` or ``torchvision:`` network has the interface of the others: images to logits,
``forward_features`` and ``num_features``. In a state dict its names start with ``network.``.
"""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bdkd.errors import RunError

_NEED_NEITHER = "the imagenet_ networks of bdkd need neither timm nor torchvision"
# Their auxiliary classifiers would make the output a tuple.
_TORCHVISION_FIXED = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


class TimmNetwork(nn.Module):
    """Logits ``(N, num_classes)`` from images ``(N, in_channels, H, W)`` by a network of timm."""

    def __init__(self, name: str, network: Any, image_size: Any):
        """``image_size``, a number or height and width, is the only one that fits, or None."""
        super().__init__()
        self.name = name
        self.network: Any = network  # a module with timm's further methods
        # The features are what the classifier sees: in MobileNetV3, say, after the head's hidden
        # layer, which timm's num_features does not count.
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
                f"got {x.shape[-2]}x{x.shape[-1]}: its option img_size sets another size"
            )


class TorchvisionNetwork(nn.Module):
    """Logits ``(N, num_classes)`` from images ``(N, 3, H, W)`` by a network of torchvision."""

    def __init__(self, name: str, network: nn.Module):
        super().__init__()
        layers = [path for path, m in network.named_modules() if isinstance(m, nn.Linear)]
        if not layers:
            raise ValueError(f"{name} has no linear classifier, so it has no features to give")
        # The classifier is the last linear layer; it is taken out, for the features go in there.
        classifier: Any = network.get_submodule(layers[-1])
        self.num_features: int = classifier.in_features
        self.classifier: nn.Module = classifier
        network.set_submodule(layers[-1], nn.Identity())
        self.network = network

    def forward_features(self, x: Tensor) -> Tensor:  # (N, num_features)
        return self.network(x)

    def forward(self, x: Tensor) -> Tensor:  # (N, num_classes)
        return self.classifier(self.network(x))


def create_timm(name: str, num_classes: int, in_channels: int, **options: object) -> nn.Module:
    """The network that timm calls ``name``; ``options`` are those of ``timm.create_model``.

    ``pretrained=True`` downloads timm's weights, unless under ``torch.device("meta")``, where
    nothing has values.
    """
    timm = _import("timm")
    shown = f"timm:{name}"
    if not timm.is_model(name):
        raise _unknown(shown, name, timm.list_models())
    pretrained = bool(options.pop("pretrained", False))
    if torch.get_default_device().type == "meta":
        pretrained = False

    def build() -> nn.Module:
        return timm.create_model(
            name, pretrained, num_classes=num_classes, in_chans=in_channels, **options
        )

    try:
        network: Any = _build(shown, build)
    except OSError as error:  # no network, a full disk, a proxy's refusal
        raise RunError(
            f"timm's weights for {name} could not be had ({_first_line(error)}): connect, or set "
            "HF_HOME to a folder that holds them, or start from a file (weights) instead"
        ) from error
    known = network.pretrained_cfg  # timm's facts about the network; made for no weights too
    image_size = None
    if known.get("fixed_input_size"):
        image_size = options.get("img_size") or tuple(known["input_size"][-2:])
    return TimmNetwork(shown, network, image_size)


def create_torchvision(
    name: str, num_classes: int, in_channels: int, **options: object
) -> nn.Module:
    """The network that torchvision calls ``name``, freshly initialised; ``options`` are those of
    its function."""
    models = _import("torchvision").models
    shown = f"torchvision:{name}"
    names = models.list_models(module=models)
    if name not in names:
        raise _unknown(shown, name, names)
    if in_channels != 3:
        raise ValueError(
            f"{shown} takes images of 3 channels, got in_channels = {in_channels}; "
            "timm's networks and bdkd's take any number"
        )
    if "weights" in options or "pretrained" in options:
        raise ValueError(f"{shown} starts fresh; pretrained networks come from timm:")

    def build() -> nn.Module:
        make = models.get_model_builder(name)
        fixed = _TORCHVISION_FIXED.get(name, {})
        return make(weights=None, num_classes=num_classes, **fixed, **options)

    return TorchvisionNetwork(shown, _build(shown, build))


LIBRARIES: dict[str, Callable[..., nn.Module]] = {
    "timm": create_timm,
    "torchvision": create_torchvision,
}


def _import(library: str) -> ModuleType:
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise RunError(f"{library} needs {error.name}: pip install {error.name}") from error
        raise RunError(
            f"{library} is not installed: pip install 'bdkd[imagenet]' ({_NEED_NEITHER})"
        ) from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # Mostly a torchvision that was built for another torch, which timm imports too.
        raise RunError(
            f"{library} is installed but does not import ({_first_line(error)}): install the "
            f"torchvision that belongs to torch {torch.__version__} ({_NEED_NEITHER})"
        ) from error


def _build(shown: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # what options cause
        raise ValueError(f"{shown} cannot be built: {_first_line(error)}") from error


def _unknown(shown: str, name: str, names: list[str]) -> ValueError:
    nearest = get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0]
    library = shown.partition(":")[0]
    return ValueError(f"{library} has no model {name!r}; the nearest name is '{library}:{nearest}'")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")
