"""The device of a process: selection, precision, cuDNN and cuBLAS flags, memory, and published peak
performance."""

import contextlib
import os
import platform
import re
import resource
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from bdkd.config import TrainConfig
from bdkd.errors import RunError, UsageError

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense peak performance in 10^12 operations per second: half precision (bf16 and fp16) on tensor
# cores, TF32 on tensor cores (None: not supported), and float32 without tensor cores. The numbers
# are from the vendors' data sheets. Data sheet numbers "with sparsity" are divided by 2.
#   B200    NVIDIA HGX B200 data sheet, a GPU           H100, H200, GH200  data sheets of each
#   A100    NVIDIA A100 data sheet (all form factors)   L40S, L40, L4, A10 data sheets of each
#   V100    NVIDIA V100 data sheet                      T4                 NVIDIA T4 data sheet
#   MI300X  AMD Instinct MI300X data sheet
# A MIG instance (a part of a GPU) has another name, so its peak is unknown.
PEAKS: tuple[tuple[str, float, float | None, float], ...] = (
    (r"NVIDIA B200", 2250, 1100, 75),
    (r"NVIDIA (H200|GH200 \w+|H100 80GB HBM3|H100 SXM5.*)", 989.5, 494.7, 67),
    (r"NVIDIA H200 NVL", 835.5, 417.5, 60),
    (r"NVIDIA H100 NVL", 835.5, 417.5, 60),
    (r"NVIDIA H100 PCIe", 756, 378, 51),
    (r"(NVIDIA )?A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe", 312, 156, 19.5),
    (r"NVIDIA L40S", 362, 183, 91.6),
    (r"NVIDIA L40", 181, 90.5, 90.5),
    (r"NVIDIA L4", 121, 60, 30.3),
    (r"NVIDIA A10", 125, 62.5, 31.2),
    (r"Tesla V100-SXM[23]-(16|32)GB.*", 125, None, 15.7),
    (r"Tesla V100-PCIE-(16|32)GB", 112, None, 14),
    (r"(Tesla|NVIDIA) T4", 65, None, 8.1),
    (r"AMD Instinct MI300X.*", 1307, 653.7, 163.4),
)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that a recipe names, and make a GPU the current device.

    Args:
        name: ``auto`` (a GPU if available), ``cpu``, ``cuda`` or ``cuda:N``.
        local_rank: number of this process on its machine. ``auto`` and ``cuda`` select the GPU with
            this number.

    Raises:
        UsageError: ``name`` is none of these.
        RunError: this machine has no such GPU.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RunError(
                f"no GPU for local rank {local_rank}: there are {torch.cuda.device_count()}, so "
                "lower torchrun's --nproc-per-node to this number"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", name):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device("cpu" if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(
            f"no device {name} here ({torch.cuda.device_count()} GPUs): use --device cpu"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and kernels use the current device
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context for ``train.precision``. It does nothing for ``fp32``."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def set_flags(device: torch.device, train: TrainConfig) -> None:
    """Set the flags of cuDNN, cuBLAS and torch for this process.

    ``train.tf32`` and the benchmark mode of cuDNN affect only GPUs. With ``train.deterministic``,
    torch raises an error for operators whose results are not reproducible bit for bit.
    """
    torch.use_deterministic_algorithms(train.deterministic)
    torch.backends.cuda.matmul.allow_tf32 = train.tf32
    torch.backends.cudnn.allow_tf32 = train.tf32
    # cuDNN times its algorithms once for each shape, and training has few shapes. Two runs may
    # select different algorithms, so their results may differ in the last bit.
    torch.backends.cudnn.benchmark = device.type == "cuda" and not train.deterministic
    torch.backends.cudnn.deterministic = train.deterministic
    # The loss computes the gradients of the logits, so the first operator of autograd's backward
    # thread may be a matrix product. The thread has no CUDA context yet. cuBLAS creates one, which
    # is correct, but prints a warning.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA")
    if train.deterministic:  # cuBLAS reads this variable later, when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def peak_flops(device: torch.device, train: TrainConfig) -> float | None:
    """Return the published dense peak of a GPU for a run's precision, in operations per second.
    Return None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), train)


def peak_of(name: str, train: TrainConfig) -> float | None:
    """Return :func:`peak_flops` of the GPU with the driver's device name ``name``."""
    for pattern, half, tf32, single in PEAKS:
        if re.fullmatch(pattern, name):
            if train.precision != "fp32":
                return half * 1e12
            return (tf32 if train.tf32 and tf32 is not None else single) * 1e12
    return None


class Processor(NamedTuple):
    """The CPU of this machine."""

    name: str
    vnni: bool | None
    """Whether the CPU multiplies 8-bit integers without saturation. None: not x86, or unknown.

    Without VNNI, onnxruntime multiplies uint8 activations and int8 weights with VPMADDUBSW. This
    instruction adds two products in 16 bits, so sums above 32,767 saturate."""


def processor(information: Path = Path("/proc/cpuinfo")) -> Processor:
    """Return the CPU of this machine. Tests pass another file as ``information``."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):  # not Linux
        for line in information.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine() or "unknown CPU"
    # x86 has "flags", ARM has "Features".
    flags = fields["flags"].split() if "flags" in fields else None
    return Processor(name, None if flags is None else bool({"avx512_vnni", "avx_vnni"} & {*flags}))


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory so far in MiB. It counts tensors on a GPU, and the whole process on a
    CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # getrusage() includes the process that started this one, because Linux keeps the peak on exec.
    if (peak := _process_status("VmHWM")) is not None:
        return peak / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def process_memory() -> int:
    """Return the bytes of memory that this process uses now, or 0 on systems other than Linux."""
    return _process_status("VmRSS") or 0


def _process_status(key: str) -> int | None:
    with contextlib.suppress(OSError):
        return _values(Path("/proc/self/status")).get(f"{key}:")
    return None


def available_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Return the bytes that this process can still allocate on a device, or None if it is unknown.

    On a GPU, this is the free memory plus the unused memory that torch has reserved. On a CPU, it
    is the available memory of the machine or the remaining part of the cgroup's limit, whichever is
    smaller. A container or a batch system sets such a limit.

    Args:
        root: root of the file system with ``/proc`` and ``/sys``. Tests pass another folder.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        available = _values(root / "proc" / "meminfo")["MemAvailable:"]
    except (OSError, KeyError):  # not Linux
        return None
    return max(0, min([available, *_cgroup_rooms(root)]))


def _cgroup_rooms(root: Path) -> list[int]:
    """Return the remaining bytes of each memory limit of this process's cgroups (versions 1 and
    2)."""
    rooms: list[int] = []
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return rooms
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit, usage, cache = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        mount = root / "sys" / "fs" / "cgroup" / base
        # A container may see the path of the host although it mounts its own cgroup.
        for folder in (mount / path.strip("/"), *(mount / path.strip("/")).parents):
            with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max"
                most = int((folder / limit).read_text())
                used = int((folder / usage).read_text())
                # The kernel drops cached files before it kills a process.
                rooms.append(most - used + _values(folder / "memory.stat").get(cache, 0))
            if folder == mount:
                break
    return rooms


def _values(path: Path) -> dict[str, int]:
    """Return the numbers in a file of /proc or /sys by name. Numbers in kB become bytes."""
    found = {}
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be allocated."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    text = re.search(r"can't allocate memory|not enough memory|out of memory", str(error))
    return known or (isinstance(error, RuntimeError) and text is not None)
