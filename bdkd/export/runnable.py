"""Check files for :mod:`bdkd.export.latency`, which runs them in other processes."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from bdkd.config import parse_recipe
from bdkd.engine.networks import build_networks, with_model_options
from bdkd.errors import RunError, first_line
from bdkd.export.facts import Exported, Facts, Format, Precision, corrupt
from bdkd.export.formats import (
    MAX_PIXELS,
    ForeignFile,
    decode,
    open_network,
    read_exported,
    without_others,
)
from bdkd.export.onnx_format import check_model
from bdkd.export.onnx_session import CPU, require
from bdkd.export.program_format import checked_program
from bdkd.plugins import load_plugins


class Runnable(NamedTuple):
    """A file that passed all checks."""

    path: Path
    format: Format
    precision: Precision
    size: int
    """Size of the file, in bytes."""
    content: bytes
    """The bytes that a process loads: an ONNX model without metadata, a program that torch.export
    made in this process, or the safetensors file."""
    shape: tuple[int, ...]
    """Shape of one image."""
    batch: int | None
    """The only batch size that the file takes, or None if it takes any batch size."""
    input: str
    """Name of the input of an ONNX model."""
    facts: Facts | None
    """None for an ONNX file that ``bdkd export`` did not write."""


def read_runnable(path: Path) -> Runnable:
    """Read and check a file.

    Raises:
        RunError: the file cannot be read, is damaged or refused, or is a foreign file that does not
            say which images it takes.
    """
    try:
        exported = read_exported(path)
    except ForeignFile as foreign:
        if foreign.kind != "onnx":
            raise
        return _runnable_onnx(path, foreign.content, None)
    if exported.format == "onnx":
        return _runnable_onnx(path, exported.content, exported.facts)
    facts, content = exported.facts, exported.content
    network = build_network(exported)
    if exported.format == "export":
        content = checked_program(exported, network)
    else:
        open_network(exported, network, CPU)
    size = len(exported.content)
    return Runnable(path, exported.format, facts.precision, size, content, facts.input_shape, None,
                    "", facts)  # fmt: skip


def _runnable_onnx(path: Path, content: bytes, facts: Facts | None) -> Runnable:
    require("onnxruntime")
    checked = check_model(path, content)
    graph = require("onnx").ModelProto.FromString(checked).graph
    name, batch, shape = _input_of(path, graph)
    if facts is not None:
        precision = facts.precision
    else:
        quantized = any(node.op_type == "QuantizeLinear" for node in graph.node)
        precision = "int8" if quantized else "fp32"
    size = len(content)
    return Runnable(path, "onnx", precision, size, checked, shape, batch, name,
                    facts)  # fmt: skip


def _input_of(path: Path, graph: Any) -> tuple[str, int | None, tuple[int, ...]]:
    """Return the name, the batch size (None if it is free) and the shape of one image of the only
    input of an ONNX model."""
    try:
        weights = {tensor.name for tensor in graph.initializer}  # old models list them as inputs
        inputs = [entry for entry in graph.input if entry.name not in weights]
    except UnicodeDecodeError as error:
        raise corrupt(path, first_line(error)) from error
    if len(inputs) != 1:
        raise RunError(f"cannot time {path}: it has {len(inputs)} inputs, and must have one")
    name, tensor = inputs[0].name, inputs[0].type.tensor_type
    if not isinstance(name, str):  # bytes that are not UTF-8, with some versions of protobuf
        raise corrupt(path, "the name of its input is not text")
    batch, *shape = [size.dim_value for size in tensor.shape.dim] or [0]  # 0 means any size
    if tensor.elem_type != 1:  # onnx.TensorProto.FLOAT
        raise RunError(f"cannot time {path}: its input must be float32 images")
    if not shape or min(shape) < 1 or batch < 0:
        sizes = ", ".join(str(size) if size > 0 else "any" for size in (batch, *shape[:8]))
        needed = "all sizes but the first must be fixed"
        raise RunError(f"cannot time {path}: its input has the shape ({sizes}), and {needed}")
    if math.prod(shape) > MAX_PIXELS:
        raise RunError(f"cannot time {path}: its images have more than {MAX_PIXELS:,} values")
    return name, batch or None, tuple(shape)


def build_network(exported: Exported) -> nn.Module:
    """Return the network of a file's recipe, with random weights. The data set is not needed."""
    facts = exported.facts
    recipe = parse_recipe(facts.recipe, source=str(exported.path), of_run=True)
    recipe = with_model_options(without_others(recipe, facts.network))
    try:
        networks = build_networks(recipe.networks, frozenset(), len(facts.classes), facts.channels)
    except ValueError as error:  # an unknown model or option
        raise RunError(f"cannot build the network of {exported.path}: {error}") from error
    [network] = networks.members.values()
    return network.eval()


def load_weights(content: bytes, plugins: list[str]) -> nn.Module:
    """Return the network of a safetensors file that :func:`read_runnable` has checked. The process
    that calls this function has not loaded the plugins."""
    load_plugins(plugins)
    exported = decode(Path("model.safetensors"), "safetensors", content)
    return open_network(exported, build_network(exported), CPU)
