"""Describe a measurement: the machine, the versions, the commit and the load by other processes."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "orda-kernel", "quack-kernels", "apex",
            "torchmetrics", "netcal", "nvidia-dali-cuda130", "pillow", "timm")  # fmt: skip
_NO_SYSFS = 32 * 2**20  # assumed size of the last-level cache if the system does not report it


def describe(threads: int, device: str) -> dict[str, Any]:
    """Return a description of this machine, for the JSON file and the header of the table."""
    from bdkd_kernels import available_backends

    backends = {
        name: f"{'yes' if available else 'no'}: {available}"
        for name, available in available_backends().items()
    }
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "last_level_cache": last_level_cache(device),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "backends": backends,
        "gpu": None,
    }  # fmt: skip
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": card.name,
            "memory": card.total_memory,
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return found


def cpu_name() -> str:
    """Return the model of the CPU and its widest vector instructions."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    lines = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if value
    }
    name = lines.get("model name", platform.machine())
    flags = lines.get("flags", "").split()
    widest = next((x for x in ("avx512_bf16", "avx512f", "avx2") if x in flags), "")
    virtual = ", virtual" if "hypervisor" in flags else ""
    return f"{name}{', ' + widest if widest else ''}{virtual}"


def last_level_cache(device: str) -> int:
    """Return the size of the last-level cache, in bytes."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [_NO_SYSFS] if platform.system() != "Linux" else []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=_NO_SYSFS)


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    for package in PACKAGES[1:]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> dict[str, Any]:
    """Return the checked-out commit, its date, and whether files differ from it. Outside a git
    repository they are unknown."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        code = ("bdkd", "kernels", "bench")
        return {
            "id": git("rev-parse", "--short=10", "HEAD"),
            "date": git("show", "-s", "--format=%cI", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", *code)),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"id": "unknown", "date": None, "dirty": True}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Neighbours:
    """Measure the share of the processor time that other processes used since construction.

    Reads /proc/stat. Time that the hypervisor stole from a virtual machine counts as used by
    others. The share is None on systems without /proc/stat.
    """

    def __init__(self) -> None:
        self.before = self._read()

    def share(self) -> float | None:
        after = self._read()
        if self.before is None or after is None:
            return None
        total, busy, own = (b - a for a, b in zip(self.before, after, strict=True))
        return max(0.0, busy - own) / total if total > 0 else None

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return None
        ticks = [float(x) / os.sysconf("SC_CLK_TCK") for x in fields]
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], own + _living_descendants()


def _living_descendants() -> float:
    """Return the processor seconds of all living descendants of this process, such as the workers
    of a loader. ``os.times`` counts a child only after it has ended."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # a name may contain spaces
        except OSError:  # the process has just ended
            continue
        pid = int(stat.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    total = 0
    for pid in ticks:
        above = parents.get(pid)
        while above is not None and above != os.getpid():
            above = parents.get(above)
        total += ticks[pid] if above is not None else 0
    return total / os.sysconf("SC_CLK_TCK")
