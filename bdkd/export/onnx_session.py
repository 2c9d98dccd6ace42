"""Run an ONNX model with onnxruntime, with limits, because the file may be untrusted."""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bdkd.errors import RunError, first_line
from bdkd.export.facts import memory_limit

CPU = torch.device("cpu")


def require(package: str) -> Any:
    """Return a package that ONNX files need. Raise ``RunError`` if it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise RunError(f"ONNX files need {package}: pip install 'bdkd[export]'") from error


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
        device: use CUDA if onnxruntime has it and this is a GPU.
        profile: prefix of the file of ``end_profiling()``. Default: no profile.

    Raises:
        RunError: onnxruntime is not installed, or cannot load the model.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as exceptions
    # Do not let onnxruntime guess the format: some valid ONNX files are also valid files in
    # onnxruntime's format, which is not checked here.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # A small file can create huge tensors, for example with ConstantOfShape. Exceeding this limit
    # raises an error; exceeding the machine's memory would kill the process.
    allocator = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = runtime.OrtMemoryInfo("Cpu", allocator, 0, runtime.OrtMemType.DEFAULT)
    arena = runtime.OrtArenaCfg(memory_limit(), -1, -1, -1)
    runtime.create_and_register_allocator(memory, arena)
    options.add_session_config_entry("session.use_env_allocators", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    available = runtime.get_available_providers()
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [p for p in (*wanted, "CPUExecutionProvider") if p in available]
    with explain_failure(path):
        return runtime.InferenceSession(
            model, options, providers=providers,
            disabled_optimizers=["ConstantFolding"],  # allocates outside of the arena
        )  # fmt: skip
