"""Decide whether an ONNX model may be given to onnxruntime.

``bdkd export`` writes one graph of standard operators, with all weights inside the file. Models
that use other features of the format are refused, because ONNX can refer to files on this machine
and describe tensors that are far larger than the file.
"""

import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any

STANDARD_DOMAINS = ("", "ai.onnx")
_ENDLESS = ("Loop", "Scan")  # may run for years, and cannot be interrupted
# Elements in one byte of a serialized tensor. The smallest type has 2 bits.
_ELEMENTS_PER_BYTE = 4


def refusal(model: Any) -> str | None:
    """Return why a model must not be run, or None if it may be run.

    All protobuf messages in the model are checked: initializers, attributes, subgraphs, functions,
    training information, and fields that a later version of ONNX may add.

    Args:
        model: an ``onnx.ModelProto`` without unknown fields (``DiscardUnknownFields``), because
            onnxruntime may know fields that this version of ONNX does not.
    """
    return next(filter(None, map(_reason, _messages(model))), None)


def _messages(model: Any) -> Iterator[Any]:
    """Yield a protobuf message and every message inside it, at any depth, without recursion."""
    message_type = import_module("google.protobuf.message").Message
    pending = [model]
    while pending:
        message = pending.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                pending.extend([value] if isinstance(value, message_type) else value)


def _reason(message: Any) -> str | None:
    """Return why a model with this message must not be run, or None if it may be run."""
    match message.DESCRIPTOR.full_name:
        case "onnx.TensorProto":
            return _tensor_reason(message)
        case "onnx.SparseTensorProto":
            name = message.values.name[:100]
            return f"it holds a sparse tensor ({name!r}), which may be far larger than the file"
        case "onnx.NodeProto" if message.domain not in STANDARD_DOMAINS:
            return (
                f"it uses the operator {message.op_type[:100]!r} of the domain "
                f"{message.domain[:100]!r}; bdkd export uses only those of ai.onnx"
            )
        case "onnx.NodeProto" if message.op_type in _ENDLESS:
            return f"it uses the operator {message.op_type}, which may never end"
        case "onnx.OperatorSetIdProto" if message.domain not in STANDARD_DOMAINS:
            domain = message.domain[:100]
            return f"it imports operators of the domain {domain!r}; bdkd export uses only ai.onnx"
        case "onnx.FunctionProto":
            return f"it defines the function {message.name[:100]!r}; bdkd export defines none"
    return None


def _tensor_reason(tensor: Any) -> str | None:
    name = tensor.name[:100]
    if tensor.data_location != tensor.DEFAULT or tensor.external_data:
        return f"it stores weights in other files ({name!r}), which bdkd export never does"
    if any(size < 0 for size in tensor.dims):
        return f"the shape of {name!r} has a negative size"
    if math.prod(tensor.dims) > _ELEMENTS_PER_BYTE * tensor.ByteSize():
        return f"{name!r} is larger than the data in the file"
    return None
