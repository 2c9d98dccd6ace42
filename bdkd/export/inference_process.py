"""Run one network in a separate process, to measure its latency and memory.

:class:`bdkd.export.latency.Inference` runs this file as a script. For an ONNX file the script
imports onnxruntime and NumPy, and neither torch nor bdkd, so that its memory is that of a small
application. For this reason the options of onnxruntime sessions are here, and this file imports
nothing of bdkd at its top.
"""

import gc
import io
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Inferences at the start of a turn are not measured: at least this number, for at least this time.
# Other processes ran before the turn and replaced the data in the processor's caches. The first
# inference of a turn takes 1.5 to 3 times as long as the fifth (networks of 0.02 to 0.3 ms, on a
# virtual AMD EPYC).
UNTIMED, UNTIMED_SECONDS = 2, 0.001
# After an inference, OpenMP's threads wait actively for about 3 ms and occupy the cores that other
# processes need.
OPENMP_SECONDS = 0.005


def limited_session(
    model: bytes, threads: int, memory: int, providers: Sequence[str] = ("CPUExecutionProvider",),
    profile: Path | None = None,
) -> Any:  # fmt: skip
    """Return an ``onnxruntime.InferenceSession``, with limits, because the model may be untrusted.

    Args:
        model: an ONNX model that :func:`bdkd.export.onnx_format.checked_model` returned.
        threads: number of threads of one operator.
        memory: limit of the tensors, in bytes.
        profile: prefix of the file of ``end_profiling()``. Default: no profile.
    """
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as exceptions
    # Do not let onnxruntime guess the format: some valid ONNX files are also valid files in
    # onnxruntime's format, which is not checked here.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # Threads that wait actively for the next inference would occupy cores that others need.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # A small file can create huge tensors, for example with ConstantOfShape. Exceeding this limit
    # raises an error; exceeding the machine's memory would kill the process.
    allocator = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    info = runtime.OrtMemoryInfo("Cpu", allocator, 0, runtime.OrtMemType.DEFAULT)
    arena = runtime.OrtArenaCfg(memory, -1, -1, -1)
    runtime.create_and_register_allocator(info, arena)
    options.add_session_config_entry("session.use_env_allocators", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return runtime.InferenceSession(
        model, options, providers=list(providers),
        disabled_optimizers=["ConstantFolding"],  # allocates outside of the arena
    )  # fmt: skip


def peak_memory() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        # Not on Linux, where this also counts the process that started this one.
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(connection: Connection, kind: str) -> None:
    """Load the network that a process sends, and time an inference for each of its messages.

    Messages are JSON, except the content of the file. The first answer is the peak memory before
    the network is loaded.
    """
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    preload(kind)
    answer(connection, peak=peak_memory())
    request = json.loads(connection.recv_bytes())
    try:
        infer = load(kind, connection.recv_bytes(), request)
        pause = OPENMP_SECONDS if kind != "onnx" and request["threads"] > 1 else 0.0
        gc.collect()
        gc.disable()  # as timeit does
        while True:
            answer(connection, seconds=timed(infer), peak=peak_memory())
            time.sleep(pause)
            connection.recv_bytes()
    except (EOFError, ConnectionError):  # the parent process closed the connection, or ended
        return
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        answer(connection, error=text.splitlines()[0][:200])


def end_with_parent(parent: int) -> None:
    """End this process within a second after its parent, also during a long inference."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def answer(connection: Connection, **values: Any) -> None:
    connection.send_bytes(json.dumps(values).encode())


def timed(infer: Callable[[], object]) -> float:
    """Return the seconds of one inference, after warm-up inferences that are not measured."""
    began, count = time.perf_counter(), 0
    while count < UNTIMED or time.perf_counter() - began < UNTIMED_SECONDS:
        infer()
        count += 1
    start = time.perf_counter()
    infer()
    return time.perf_counter() - start


def preload(kind: str) -> None:
    """Import the packages that a file needs, so that they count as memory of the runtime."""
    import_module("numpy.random")  # "import numpy" does not import it
    import_module("onnxruntime" if kind == "onnx" else "torch")
    if kind == "safetensors":
        import_module("bdkd.export.runnable")


def load(kind: str, content: bytes, request: dict[str, Any]) -> Callable[[], object]:
    """Return a function that runs the network on random images.

    Args:
        content: of a :class:`bdkd.export.runnable.Runnable`.
        request: threads, memory (the limit in bytes), shape (N, C, H, W), name (of an ONNX model's
            input) and plugins.
    """
    import numpy as np

    images = np.random.default_rng(0).standard_normal(request["shape"], dtype=np.float32)
    if kind == "onnx":
        session = limited_session(content, request["threads"], request["memory"])
        return lambda: session.run(None, {request["name"]: images})

    import torch

    torch.set_num_threads(request["threads"])
    if kind == "export":
        network: Any = torch.export.load(io.BytesIO(content)).module()
    else:
        from bdkd.export.runnable import load_weights

        network = load_weights(content, request["plugins"])
    tensor = torch.from_numpy(images)

    def infer() -> object:
        with torch.inference_mode():
            return network(tensor)

    return infer


if __name__ == "__main__":
    serve(Connection(sys.stdin.fileno()), sys.argv[1])
