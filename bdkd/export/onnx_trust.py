"""Decide whether an ONNX model may be given to onnxruntime.

``bdkd export`` writes one graph of standard operators, with all weights inside the file. A model
that uses anything else of the format is refused, because the format can name files on this machine
and describe tensors that are far larger than the file.
"""

import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any

STANDARD_DOMAINS = ("", "ai.onnx")
_ENDLESS = ("Loop", "Scan")  # a run cannot be interrupted, and may take years
# Elements that one byte of a serialized tensor can hold: those of 2 bits are the smallest.
_ELEMENTS_PER_BYTE = 4


def refusal(model: Any) -> str | None:
    """Return why a model must not be run, or None if it may be.

    Every message in the model is checked, wherever it lies: initializers, attributes, subgraphs,
    functions, training information, and fields that a later version of ONNX may add.

    Args:
        model: an ``onnx.ModelProto``. It must have no unknown fields (``DiscardUnknownFields``),
            because onnxruntime may know them.
    """
    for message in _messages(model):
        check = _CHECKS.get(message.DESCRIPTOR.full_name)
        reason = check(message) if check is not None else None
        if reason is not None:
            return reason
    return None


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


def _check_tensor(tensor: Any) -> str | None:
    if tensor.data_location != tensor.DEFAULT or tensor.external_data:
        return (
            f"it keeps weights in other files ({tensor.name[:100]!r}), which bdkd export never does"
        )
    if any(size < 0 for size in tensor.dims):
        return f"the shape of {tensor.name[:100]!r} has a negative size"
    if math.prod(tensor.dims) > _ELEMENTS_PER_BYTE * tensor.ByteSize():
        return f"{tensor.name[:100]!r} is larger than the data in the file"
    return None


def _check_sparse_tensor(tensor: Any) -> str:
    return (
        f"it holds a sparse tensor ({tensor.values.name[:100]!r}), which bdkd export never writes "
        "and which may be far larger than the file"
    )


def _check_node(node: Any) -> str | None:
    if node.domain not in STANDARD_DOMAINS:
        return (
            f"it uses the operator {node.op_type[:100]!r} of the domain {node.domain[:100]!r}; "
            "bdkd export uses those of ai.onnx alone"
        )
    if node.op_type in _ENDLESS:
        return f"it uses the operator {node.op_type}, which may never end"
    return None


def _check_opset(opset: Any) -> str | None:
    if opset.domain not in STANDARD_DOMAINS:
        return (
            f"it imports operators of the domain {opset.domain[:100]!r}; bdkd export uses those of "
            "ai.onnx alone"
        )
    return None


def _check_function(function: Any) -> str:
    return f"it defines the function {function.name[:100]!r}; bdkd export defines none"


_CHECKS = {
    "onnx.TensorProto": _check_tensor,
    "onnx.SparseTensorProto": _check_sparse_tensor,
    "onnx.NodeProto": _check_node,
    "onnx.OperatorSetIdProto": _check_opset,
    "onnx.FunctionProto": _check_function,
}
