"""Run an ONNX model with onnxruntime, with limits, because the file may be untrusted."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bdkd.errors import RunError, first_line, shown
from bdkd.export.facts import memory_limit
from bdkd.export.inference_process import limited_session

CPU = torch.device("cpu")


def require(package: str) -> Any:
    """Return a package that ONNX files need. Raise ``RunError`` if it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise RunError(f"ONNX files need {package}: pip install 'bdkd[export]'") from error


@contextlib.contextmanager
def without_log() -> Iterator[None]:
    """Silence two log messages: torch's that torchvision is not installed, and onnxruntime's advice
    to preprocess a model before it is quantised. Models of ``torch.onnx.export`` need no
    preprocessing, because their shapes are known and batch norm is folded."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def explain_failure(path: Path) -> Iterator[None]:
    """Turn the exceptions of onnxruntime into a ``RunError`` about a file."""
    try:
        yield
    except Exception as error:  # onnxruntime has one exception type for each error code
        raise RunError(f"onnxruntime cannot run {path}: {first_line(error)}") from error


def create_session(
    model: bytes, path: Path, threads: int, device: torch.device = CPU, profile: Path | None = None
) -> Any:
    """Return an ``onnxruntime.InferenceSession``.

    Args:
        model: an ONNX model that :func:`bdkd.export.onnx_format.checked_model` returned.
        path: the file of the model, for messages.
        threads: number of threads of one operator.
        device: if this is a GPU, use CUDA if onnxruntime supports it.
        profile: prefix of the file of ``end_profiling()``. Default: no profile.

    Raises:
        RunError: onnxruntime is not installed, or cannot load the model.
    """
    runtime = require("onnxruntime")
    available = runtime.get_available_providers()
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [p for p in (*wanted, "CPUExecutionProvider") if p in available]
    with explain_failure(path):
        return limited_session(model, threads, memory_limit(), providers, profile)


class Interface(NamedTuple):
    """The input and output of a network in an ONNX model."""

    images: str  # name of the input, (N, C, H, W) float32
    logits: str  # name of the output, (N, classes)
    single: bool  # the model takes one image at a time
    classes: int


def interface_of(session: Any, path: Path, input_shape: tuple[int, ...], classes: int) -> Interface:
    """Return the names of the input and output of a classifier. :func:`run` checks the sizes that
    the model does not fix.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        input_shape: (C, H, W) of the images.
        classes: number of classes of the data set.

    Raises:
        RunError: the model is not a function from such images to such logits.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise RunError(
            f"{path} must have one input (images) and one output (logits), and has {len(inputs)} "
            f"and {len(outputs)}"
        )
    [images], [logits] = inputs, outputs
    if images.type != "tensor(float)" or len(images.shape) != 4:
        raise RunError(
            f"the input of {path} must be float32 images of the shape (N, C, H, W), and is "
            f"{_described(images)}"
        )
    if not _fits(images.shape[1:], input_shape):
        raise RunError(
            f"{path} takes images of the shape {_sizes(images.shape[1:])} (channels, height, "
            f"width), and those of the data set have {input_shape}"
        )
    batch = images.shape[0]
    if isinstance(batch, int) and batch != 1:
        raise RunError(
            f"{path} takes batches of {batch} images only: export it with a batch dimension that "
            "is dynamic, or 1"
        )
    if logits.type not in ("tensor(float)", "tensor(float16)", "tensor(double)"):
        raise RunError(f"the output of {path} must be logits (N, C), and is {_described(logits)}")
    if logits.shape and (len(logits.shape) != 2 or not _fits(logits.shape[1:], (classes,))):
        raise _other_logits(path, logits.shape, classes)
    return Interface(images.name, logits.name, batch == 1, classes)


def run(session: Any, interface: Interface, path: Path, images: np.ndarray) -> np.ndarray:
    """Return the logits (N, classes) float32 of images (N, C, H, W) float32. Raise ``RunError`` if
    onnxruntime cannot run the model, or its output has another shape."""
    parts = np.split(images, len(images)) if interface.single and len(images) else [images]
    results = []
    for part in parts:
        with explain_failure(path):
            [result] = session.run([interface.logits], {interface.images: part})
        if result.shape != (len(part), interface.classes):
            raise _other_logits(path, result.shape, interface.classes)
        results.append(result.astype(np.float32))
    return np.concatenate(results)


def _other_logits(path: Path, shape: Sequence[Any], classes: int) -> RunError:
    if len(shape) == 2 and isinstance(shape[1], int) and shape[1] != classes:
        return RunError(f"{path} has {shape[1]} classes, and the data set has {classes}")
    needed = f"(N, {classes})"
    return RunError(f"the output of {path} must be logits {needed}, and has {_sizes(shape)}")


def _fits(shape: Sequence[Any], needed: Sequence[int]) -> bool:
    """Return whether the fixed sizes of a shape equal the needed sizes."""
    return all(not isinstance(n, int) or n == m for n, m in zip(shape, needed, strict=True))


def _described(tensor: Any) -> str:
    return f"{tensor.type} of the shape {_sizes(tensor.shape)}"


def _sizes(shape: Sequence[Any]) -> str:
    """Return a shape as text of limited length, because names of dimensions come from an untrusted
    file."""
    return shown(tuple(n if isinstance(n, int) else "any" for n in shape)).replace("'", "")
