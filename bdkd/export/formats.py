"""Write and read the files of ``bdkd export``: one network and its metadata.

Files may be untrusted, so they are read as data and never as code. Sizes are checked before
loading.
"""

import dataclasses
import math
import os
import tomllib
from pathlib import Path

import msgspec
import torch
from torch import nn

from bdkd.config import NetworkConfig, Recipe
from bdkd.engine.state import EMA_SUFFIX
from bdkd.errors import RunError, first_line, reason_of
from bdkd.export import facts as shared
from bdkd.export.facts import DIGEST, FACTS, VERSION, Exported, Facts, FileFormat, Format, corrupt
from bdkd.export.onnx_format import ONNX
from bdkd.export.program_format import PROGRAM
from bdkd.export.safetensors_format import SAFETENSORS
from bdkd.registry import OBJECTIVES
from bdkd.text import open_regular

FORMATS: dict[Format, FileFormat] = {
    "onnx": ONNX, "export": PROGRAM, "safetensors": SAFETENSORS,
}  # fmt: skip

MAX_FACTS_BYTES = 2**24  # 21,841 class names take 1 MB
MAX_RECIPE_CHARACTERS, MAX_DOTS = 2**16, 1000  # typical recipes have 2,000 characters
MAX_PIXELS = 2**28  # of one image, all channels


def without_others(recipe: Recipe, network: str) -> Recipe:
    """Return a recipe in which ``network`` is the only network, and a student. Raise ``RunError``
    if the recipe has no such network."""
    name = network.removesuffix(EMA_SUFFIX)
    if (config := recipe.networks.get(name)) is None:
        raise RunError(f"the file contains {network!r}, but its recipe has no such network")
    student = NetworkConfig(config.model, "student", options=built_without_weights(config))
    objective = OBJECTIVES.configure("independent")
    return dataclasses.replace(recipe, networks={name: student}, objective=objective)


# Options of timm.create_model that load or download weights. checkpoint_path unpickles a file.
_WEIGHT_OPTIONS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
                   "cache_dir"}  # fmt: skip


def built_without_weights(config: NetworkConfig) -> dict[str, bool | int | float | str]:
    """Return a network's options without those that load or download other weights."""
    return {key: value for key, value in config.options.items() if key not in _WEIGHT_OPTIONS}


class ForeignFile(RunError):
    """A file of a known format that ``bdkd export`` did not write. Its content passed the checks
    for untrusted files."""

    def __init__(self, path: Path, kind: Format, content: bytes) -> None:
        message = (
            f"{path} was not written by bdkd export: it has no recipe and no description of its "
            "images"
        )
        remedy = "; --recipe RECIPE names the data to evaluate it on" if kind == "onnx" else ""
        super().__init__(f"{message}{remedy}")
        self.path, self.kind, self.content = path, kind, content


def is_exported(path: Path) -> bool:
    """Return whether a path has the suffix of an exported file. The content is not checked."""
    return path.suffix in [known.suffix for known in FORMATS.values()]


def encode(kind: Format, network: nn.Module, facts: Facts) -> bytes:
    """Return the file of a network, which must be in evaluation mode on the CPU. Raise ``RunError``
    if a package is missing, or the network cannot be written in this format."""
    text = msgspec.json.encode(facts).decode()
    try:
        return FORMATS[kind].encode(network, text, facts.input_shape)
    except RunError:
        raise
    except Exception as error:  # the exporters raise many types
        what = f"{facts.network} ({facts.model}) to {kind}"
        reason = f"{first_line(error)} (--debug shows where)"
        raise RunError(f"cannot export {what}: {reason}") from error


def read_exported(path: Path) -> Exported:
    """Read a file and its facts. Raise ``RunError`` if the file is missing, too large, corrupt, or
    changed since it was written, and ``ForeignFile`` if ``bdkd export`` did not write it."""
    kind = next(kind for kind, known in FORMATS.items() if known.suffix == path.suffix)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            limit = min(FORMATS[kind].max_bytes, shared.memory_limit())
            if size > limit:
                allowed = f"the limit for {path.suffix} files on this machine is {limit:,} bytes"
                raise RunError(f"cannot read {path}: it has {size:,} bytes, and {allowed}")
            FORMATS[kind].check(path, file)
            file.seek(0)
            content = file.read(size)
    except OSError as error:
        raise RunError(f"cannot read {path}: {reason_of(error)}") from error
    except MemoryError as error:
        raise RunError(f"cannot read {path}: not enough memory for its {size:,} bytes") from error
    return decode(path, kind, content)


def decode(path: Path, kind: Format, content: bytes) -> Exported:
    """Decode the content of a file, as :func:`read_exported` does. ``path`` is for messages."""
    metadata, digest = FORMATS[kind].decode(path, content)
    if FACTS not in metadata and DIGEST not in metadata:
        raise ForeignFile(path, kind, content)
    if FACTS not in metadata or DIGEST not in metadata:
        raise corrupt(path, "a part of bdkd's metadata is missing")
    if len(metadata[FACTS]) > MAX_FACTS_BYTES:
        raise corrupt(path, f"its facts have {len(metadata[FACTS]):,} characters")
    if metadata[DIGEST] != digest(metadata[FACTS]):
        raise RunError(f"{path} was damaged or changed since bdkd export wrote it: export it again")
    try:
        facts = msgspec.json.decode(metadata[FACTS], type=Facts)
        _check_recipe(facts.recipe)
    except ValueError as error:  # raised by msgspec and by tomllib
        remedy = f"export it again ({first_line(error)})"
        raise RunError(f"{path} was written by another version of bdkd: {remedy}") from error
    except RecursionError as error:
        raise corrupt(path, "its facts are nested too deeply") from error
    if facts.version != VERSION:
        reads = f"this bdkd reads version {VERSION}: export it again"
        raise RunError(f"{path} has facts of version {facts.version}, but {reads}")
    if min(facts.input_shape) < 1 or math.prod(facts.input_shape) > MAX_PIXELS:
        raise corrupt(path, f"its images have the shape {facts.input_shape}")
    return Exported(path, kind, content, facts, digest(""))


def _check_recipe(recipe: str) -> None:
    """Raise ``ValueError`` or ``RecursionError`` unless a recipe is TOML of limited size."""
    # tomllib's memory is quadratic in the number of parts of a dotted key: 40 GB for 100,000 parts.
    dots = max((line.count(".") for line in recipe.splitlines()), default=0)
    if len(recipe) > MAX_RECIPE_CHARACTERS or dots > MAX_DOTS:
        raise ValueError(
            f"its recipe has {len(recipe):,} characters, and a line with {dots:,} dots"
        )
    tomllib.loads(recipe)


def open_network(exported: Exported, network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network in a file, as a function of images on ``device``.

    Args:
        network: the network of the file's recipe, with any weights.

    Raises:
        RunError: the file contains a different network or program.
    """
    return FORMATS[exported.format].open(exported, network, device)
