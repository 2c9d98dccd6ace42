"""Exported networks as ONNX.

:mod:`bdkd.export.onnx_trust` checks the complete model before onnxruntime runs it.
"""

import contextlib
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from bdkd.errors import RunError, first_line
from bdkd.export import facts as shared
from bdkd.export.facts import DIGEST, FACTS, Digest, Exported, Facts, FileFormat, Function, corrupt
from bdkd.export.onnx_session import create_session, interface_of, require, run, without_log
from bdkd.export.onnx_trust import refusal


def _encode(network: nn.Module, facts: str, input_shape: tuple[int, ...]) -> bytes:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    with warnings.catch_warnings(), without_log():
        warnings.simplefilter("ignore")  # they are about internals of the exporter
        program = torch.onnx.export(
            network, (torch.zeros(2, *input_shape),), dynamo=True, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["images"], output_names=["logits"],
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces with paths of this machine
    if model.ByteSize() >= 2**31:
        raise RunError("ONNX files are limited to 2 GiB: use --to safetensors or export")
    return _with_metadata(model, facts)


def with_facts(model: Any, facts: Facts) -> bytes:
    """Return the file of an ``onnx.ModelProto`` with other facts."""
    return _with_metadata(model, msgspec.json.encode(facts).decode())


def replace_facts(exported: Exported, facts: Facts) -> bytes:
    """Return the content of an ONNX file with other facts."""
    return with_facts(_parse_onnx(exported.path, exported.content), facts)


def _with_metadata(model: Any, facts: str) -> bytes:
    digest = shared.digest_of_bytes(_without_metadata(model))(facts)
    for key, value in ((FACTS, facts), (DIGEST, digest)):
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString(deterministic=True)


def _decode(path: Path, content: bytes) -> tuple[dict[str, str], Digest]:
    model = _parse_onnx(path, content)
    # protobuf raises for text that is not UTF-8, or returns bytes, depending on its version.
    with contextlib.suppress(UnicodeDecodeError):
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        if all(isinstance(text, str) for entry in metadata.items() for text in entry):
            return metadata, shared.digest_of_bytes(_without_metadata(model))
    raise corrupt(path, "its metadata is not text")


def _parse_onnx(path: Path, content: bytes):
    """Return the ``onnx.ModelProto`` in a file. Raise ``RunError`` if it is corrupt, nested too
    deeply (protobuf's limit is 100 messages), or refused by :func:`refusal`."""
    onnx = require("onnx")
    decode_error = import_module("google.protobuf.message").DecodeError
    try:
        model = onnx.ModelProto.FromString(content)
    except (decode_error, RecursionError) as error:
        raise corrupt(path, first_line(error)) from error
    model.DiscardUnknownFields()
    try:
        reason = refusal(model)
    except UnicodeDecodeError as error:
        raise corrupt(path, first_line(error)) from error
    if reason is not None:
        raise RunError(f"{path} is refused: {reason}")
    return model


def _open(exported: Exported, network: nn.Module, device: torch.device) -> nn.Module:
    session = create_session(
        checked_model(exported), exported.path, torch.get_num_threads(), device
    )

    facts = exported.facts
    interface = interface_of(session, exported.path, facts.input_shape, len(facts.classes))

    def logits(images: Tensor) -> Tensor:
        pixels = images.float().contiguous().cpu().numpy()
        result = run(session, interface, exported.path, pixels)
        return torch.from_numpy(result).to(images.device)

    return Function(logits)


def checked_model(exported: Exported) -> bytes:
    """Check the model of a file, and return it for onnxruntime."""
    return check_model(exported.path, exported.content)


def check_model(path: Path, content: bytes) -> bytes:
    """Check the model in the content of a file, and return it for onnxruntime."""
    # Remove the metadata: with ORT_LOAD_CONFIG_FROM_MODEL=1, onnxruntime reads options from it.
    return _without_metadata(_parse_onnx(path, content))


def _without_metadata(model) -> bytes:
    """Remove ``metadata_props`` from a model, and return the rest as bytes."""
    del model.metadata_props[:]
    return model.SerializeToString(deterministic=True)


# The size limit is the limit of protobuf.
ONNX = FileFormat(".onnx", 2**31 - 1, _encode, lambda path, file: None, _decode, _open)
