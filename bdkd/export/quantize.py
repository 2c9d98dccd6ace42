"""Quantise an exported ONNX file to int8 with onnxruntime.

Static quantisation in the QDQ format: weights are int8 with a scale for each output channel, and
activations are uint8 with ranges from calibration images. One scale for all channels is not enough
for depthwise convolutions, whose channels have very different ranges.

The result has only operators of ``ai.onnx``. onnxruntime fuses them into integer operators when it
loads the file.
"""

import json
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bdkd.errors import RunError, first_line
from bdkd.export.facts import Exported, Facts
from bdkd.export.onnx_format import checked_model, with_facts
from bdkd.export.onnx_session import create_session, require, without_log

BATCH = 32  # calibration images at a time
PROFILED_RUNS = 20


def quantize(exported: Exported, images: np.ndarray, facts: Facts) -> bytes:
    """Return the int8 file of an fp32 ONNX file. The same arguments give the same bytes.

    Args:
        exported: the fp32 file.
        images: (N, C, H, W) float32 calibration images, normalised.
        facts: the facts of the int8 file.

    Raises:
        RunError: onnxruntime cannot quantise the network, or the network has no operator that can
            be quantised.
    """
    onnx = require("onnx")
    model = onnx.ModelProto.FromString(checked_model(exported))
    quantized = _quantize_static(model, images, f"{facts.network} ({facts.model})")
    integer = any(node.op_type == "QuantizeLinear" for node in quantized.graph.node)
    if not integer:
        operators = ", ".join(sorted({node.op_type for node in quantized.graph.node}))
        raise RunError(
            f"{facts.network} ({facts.model}) has no operator that onnxruntime can quantise "
            f"({operators}): export it without --quantize"
        )
    return with_facts(quantized, facts)


def _quantize_static(model: Any, images: np.ndarray, name: str) -> Any:
    require("onnxruntime")
    library = import_module("onnxruntime.quantization")

    class Reader(library.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.batches = iter(range(0, len(images), BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            start = next(self.batches, None)
            return None if start is None else {"images": images[start : start + BATCH]}

    try:
        with tempfile.TemporaryDirectory(prefix="bdkd-quantize-") as folder, without_log():
            target = Path(folder) / "model.onnx"
            library.quantize_static(
                model, target, Reader(), quant_format=library.QuantFormat.QDQ, per_channel=True,
                activation_type=library.QuantType.QUInt8, weight_type=library.QuantType.QInt8,
                calibrate_method=library.CalibrationMethod.MinMax,
            )  # fmt: skip
            quantized = require("onnx").load(target)
    except OSError as error:
        raise RunError(
            f"cannot write temporary files in {tempfile.gettempdir()}: {first_line(error)}; set "
            "TMPDIR to another folder"
        ) from error
    except Exception as error:  # onnxruntime and onnx raise many types
        reason = f"{first_line(error)} (--debug shows where)"
        raise RunError(f"onnxruntime cannot quantise {name}: {reason}") from error
    return quantized


def float_operators(exported: Exported, images: np.ndarray) -> dict[str, float]:
    """Return the operators of an int8 file that onnxruntime computes in floating point on this
    machine, each with its share of the time.

    Args:
        images: (N, C, H, W) float32, a batch to time.
    """
    with tempfile.TemporaryDirectory(prefix="bdkd-profile-") as folder:
        prefix = Path(folder) / "profile"
        session = create_session(checked_model(exported), exported.path, 1, profile=prefix)
        for _ in range(PROFILED_RUNS):
            session.run(None, {"images": images})
        events = json.loads(Path(session.end_profiling()).read_text())
    total, of_floats = 0, Counter[str]()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        arguments, microseconds = event["args"], event["dur"]
        total += microseconds
        if _computes_in_float(arguments):
            of_floats[arguments["op_name"]] += microseconds
    return {name: share / max(1, total) for name, share in of_floats.most_common()}


def _computes_in_float(arguments: dict[str, Any]) -> bool:
    """Return whether a profiled operator computes on floating-point numbers. The first input of
    some integer operators (``QLinearConcat``) is a scale."""
    name = arguments["op_name"]
    if name.startswith(("Q", "DequantizeLinear")) or name == "Shape":
        return False
    return any("float" in kinds for kinds in arguments["input_type_shape"][:1])
