"""Read weights from torch files, safetensors files, and folders that contain one of them.

Reading a file never runs code from it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from bdkd.config import NetworkConfig
from bdkd.errors import RunError, first_line, reason_of
from bdkd.models.key_names import counterpart
from bdkd.models.libraries import import_library
from bdkd.runs.checkpoint import load_file
from bdkd.runs.folder import RunFolder, selected_checkpoint
from bdkd.runs.pickled import not_weights
from bdkd.runs.state_dicts import Misfit
from bdkd.text import open_regular, read_text

# Names of weight files in a folder of Accelerate, transformers or the Hugging Face Hub
_NAMES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip
_SECOND = ("model_1.safetensors", "pytorch_model_1.bin")
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|random_states|training_args|.*optim_states")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_MAX_INDEX_BYTES = 2**26


def weight_file(path: Path) -> Path:
    """Return the weight file of a path.

    Args:
        path: a file, the folder of a run (its selected checkpoint is returned), or a folder that
            contains one weight file.

    Raises:
        RunError: the folder contains no weight file, or several.
    """
    if not path.is_dir():
        return path
    run = RunFolder(path)
    if run.config.exists():
        return selected_checkpoint(path)
    if (path / ".metadata").exists():
        raise RunError(
            f"{path} is a checkpoint of torch.distributed.checkpoint: convert it with python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch"
        )
    if any((path / name).exists() for name in _SECOND):  # Accelerate saves one for each model
        raise RunError(f"{path} contains the weights of several networks: pass the path of a file")
    for name in _NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(
        file for file in path.iterdir()
        if file.suffix in _SUFFIXES and file.is_file() and not _NO_WEIGHTS.match(file.name)
    )  # fmt: skip
    if len(found) == 1:
        return found[0]
    if not found:
        raise RunError(f"{path} is not the folder of a run, and contains no weight file")
    names = ", ".join(file.name for file in found[:5])
    raise RunError(f"{path} contains several weight files: pass the path of one of {names}")


class WeightFile(NamedTuple):
    """The content of a weight file, and the description of its network."""

    content: Any
    classes: list[str] | None = None  # names of the classes that the network was trained on
    architecture: str | None = None  # name of the model in timm
    options: Mapping[str, Any] = MappingProxyType({})  # arguments of the model in timm


def read_weights(path: Path) -> WeightFile:
    """Read a weight file.

    The names of the classes come from the metadata that ``bdkd export`` writes, or from timm's
    ``config.json`` in the same folder.

    Raises:
        RunError: the file cannot be read.
    """
    if path.name.endswith(".index.json"):
        file = WeightFile(_read_parts(path))
    elif path.suffix == ".safetensors":
        file = WeightFile(*_read_safetensors(path))
    else:
        content = load_file(path)
        file = WeightFile(content, architecture=_architecture(content))
    config = _timm_config(path.with_name("config.json"))
    if not isinstance(config.get("architecture"), str):
        return file
    options = config.get("model_args")
    return file._replace(
        classes=file.classes or _names(config.get("label_names")),
        architecture=config["architecture"],
        options=options if isinstance(options, dict) else {},
    )


def check_architecture(file: WeightFile, config: NetworkConfig) -> None:
    """Raise ``Misfit`` if the description in the file names another network than ``config``.

    Comparing shapes is not sufficient, because two networks of timm may have the same shapes and
    compute different functions.
    """
    name = counterpart(config.model, "timm")
    if name is None or file.architecture is None:
        return
    came, needed = file.architecture.partition(".")[0], name.partition(".")[0]  # without the tag
    if came != needed and _is_of_timm(came):
        raise Misfit(f"it contains weights of timm's {came}, and the network is timm's {needed}")
    for option, value in file.options.items():
        given_by_data = option in ("in_chans", "num_classes")
        if not (given_by_data or option.startswith("drop")) and config.options.get(option) != value:
            raise Misfit(f"its network was built with {option} = {value!r}: set this in options")


def _is_of_timm(name: str) -> bool:
    try:
        return import_library("timm").is_model(name)
    except RunError:  # not installed
        return False


def _architecture(content: Any) -> str | None:
    """Return the model name in a checkpoint of timm's train.py or a similar script, or None."""
    if not isinstance(content, Mapping):
        return None
    arguments = getattr(content.get("args"), "__dict__", {})
    found = content.get("arch") or arguments.get("model")
    return found if isinstance(found, str) else None


def _timm_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path, limit=_MAX_INDEX_BYTES))
    except (OSError, RunError, ValueError, RecursionError):  # missing, or not of timm
        return {}
    return config if isinstance(config, dict) else {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], list[str] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as begin:
            if reason := not_weights(begin.read(32)):
                raise RunError(f"cannot read {path}: {reason}; use another file")
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except OSError as error:
        raise RunError(f"cannot read the weights {path}: {reason_of(error)}") from error
    except SafetensorError as error:
        reason = f"it is truncated, or not a safetensors file ({first_line(error)})"
        raise RunError(f"cannot read the weights {path}: {reason}; use another file") from error
    return tensors, _classes(metadata)


def _classes(metadata: Mapping[str, str]) -> list[str] | None:
    """Return the class names in the metadata that ``bdkd export`` writes, or None."""
    try:
        return _names(json.loads(metadata.get("bdkd", "{}")).get("classes"))
    except (ValueError, AttributeError, RecursionError):
        return None


def _names(classes: Any) -> list[str] | None:
    valid = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return classes if valid else None


def _read_parts(index: Path) -> dict[str, Any]:
    """Return the tensors of a checkpoint that consists of several files."""
    try:
        with open_regular(index) as file:
            places = json.loads(file.read(_MAX_INDEX_BYTES))["weight_map"].items()
        parts: dict[str, set[str]] = {}
        for key, name in places:
            parts.setdefault(str(name), set()).add(key)
    except OSError as error:
        raise RunError(f"cannot read {index}: {reason_of(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{index} has no list of files under 'weight_map'") from error
    tensors: dict[str, Any] = {}
    for name, keys in sorted(parts.items()):
        part = index.with_name(name) if Path(name).name == name else None
        if part is None or part.suffix == ".json":
            raise RunError(f"{index} names {name!r}, which is not a file of weights next to it")
        content = read_weights(part).content
        if not isinstance(content, Mapping) or not keys <= content.keys():
            raise RunError(f"{part} does not contain all tensors that {index} names")
        tensors |= {key: content[key] for key in keys}
    return tensors
