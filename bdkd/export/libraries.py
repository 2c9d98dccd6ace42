"""Export a network to a file that timm or torchvision loads without bdkd."""

import io
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bdkd.config import parse_recipe
from bdkd.data.imagenet.options import DecodedImagesConfig
from bdkd.errors import RunError, UsageError
from bdkd.export.export import (
    PLAIN,
    Options,
    Written,
    check_validation_images,
    refuse_existing,
    same_logits,
    with_temperature,
    write_files,
)
from bdkd.export.facts import Facts
from bdkd.export.formats import built_without_weights
from bdkd.export.trained import Trained
from bdkd.models.key_names import counterpart, layouts
from bdkd.models.libraries import import_library

Library = Literal["timm", "torchvision"]
FILES = {"timm": "model.safetensors", "torchvision": "model.pth"}
CONFIG = "config.json"  # timm reads it in the folder of the weights


def export_to_library(
    trained: Trained, library: Library, output: Path, force: bool, options: Options = PLAIN
) -> Written:
    """Write a network as weights of the same network in a library. The file is read back into the
    library's network, and its logits are compared.

    Args:
        output: path of the file. timm's ``config.json`` is written next to it.
        force: replace existing files.
        options: only ``fit_temperature`` is used.

    Raises:
        UsageError: the library has no network that computes the same function, or the file name
            does not have the suffix of its format.
        RunError: a file exists, a file cannot be written, the library computes different logits, or
            the library is not installed.
    """
    check_library_output(library, output, force)
    facts = trained.facts
    name = counterpart(facts.model, library)
    if name is None:
        raise UsageError(
            f"--to {library} needs a network that {library} also has, got {facts.model}: use --to "
            "safetensors, onnx or export"
        )
    if options.fit_temperature:
        check_validation_images(trained, options)
        trained = with_temperature(trained, trained.network)
    theirs, built_with = _build(facts, library, name)
    state = trained.network.state_dict()
    names = layouts(trained.network, facts.model)[library]
    tensors = {names[key]: value.detach().clone().contiguous() for key, value in state.items()}
    contents = {output: _encode(library, tensors)}
    if library == "timm":
        config = json.dumps(_timm_config(facts, name, theirs, built_with), indent=2)
        contents[output.with_name(CONFIG)] = config.encode()
    try:
        theirs.load_state_dict(_decode(library, contents[output]))
    except RuntimeError as error:
        raise RunError(
            f"{library}'s {name} has different weights from {facts.network} ({facts.model}): "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    difference, largest = same_logits(trained, library, theirs.eval())
    return Written(output, write_files(contents), difference, largest, trained.facts)


def check_library_output(library: Library, output: Path, force: bool) -> None:
    """Raise ``UsageError`` or ``RunError`` for an output that cannot be written."""
    suffix = Path(FILES[library]).suffix
    if output.suffix != suffix or output.is_dir():
        raise UsageError(f"--output must be a file named *{suffix} with --to {library}: {output}")
    refuse_existing(output, force)
    if library == "timm":
        refuse_existing(output.with_name(CONFIG), force)


def _build(facts: Facts, library: Library, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the library's network, and the options that it was built with."""
    module = import_library(library)
    recipe = parse_recipe(facts.recipe, source=facts.network, of_run=True)
    options: dict[str, Any] = {}
    if ":" in facts.model:  # the options are arguments of the library's function
        options = built_without_weights(recipe.networks[facts.network.removesuffix("_ema")])
    if library == "timm":
        if facts.channels != 3:
            options["in_chans"] = facts.channels
        return module.create_model(name, num_classes=len(facts.classes), **options), options
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    build = module.models.get_model
    return build(name, weights=None, num_classes=len(facts.classes), **options), options


def _encode(library: Library, tensors: dict[str, Tensor]) -> bytes:
    if library == "timm":
        from safetensors.torch import save

        return save(tensors, {"format": "pt"})
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def _decode(library: Library, content: bytes) -> dict[str, Tensor]:
    if library == "timm":
        from safetensors.torch import load

        return load(content)
    return torch.load(io.BytesIO(content), weights_only=True)


def _timm_config(facts: Facts, name: str, network: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the config.json that ``timm.create_model("local-dir:FOLDER",
    pretrained=True)`` reads."""
    recipe = parse_recipe(facts.recipe, source=facts.network, of_run=True)
    pretrained: dict[str, Any] = {
        "num_classes": len(facts.classes), "input_size": facts.input_shape,
        "interpolation": "bilinear", "crop_mode": "center",
        # Evaluation resizes images to 256/224 of the crop. Data sources in memory do not crop.
        "crop_pct": 0.875 if isinstance(recipe.data, DecodedImagesConfig) else 1.0,
        "fixed_input_size": bool(network.pretrained_cfg.get("fixed_input_size")),
        "classifier": network.pretrained_cfg.get("classifier"),
    }  # fmt: skip
    if (scale := facts.normalisation) is not None:  # timm's pixels are in [0, 1]
        for key, values in (("mean", scale.mean), ("std", scale.std)):
            pretrained[key] = [value / scale.largest for value in values]
    return {
        "architecture": name, "num_classes": len(facts.classes),
        "num_features": network.num_features, "label_names": facts.classes,
        "model_args": options, "pretrained_cfg": pretrained,
    }  # fmt: skip
