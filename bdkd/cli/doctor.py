"""``bdkd doctor``: show what is installed on this machine, for example in an issue report."""

import contextlib
import importlib.util
import io
import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from bdkd.cli.flags import parse
from bdkd.errors import RunError
from bdkd.extras import TRAINER_PACKAGES, bdkd_version

# Extras of bdkd, and the distributions and modules that they install
OPTIONAL = {
    "train": {"scikit-learn": "sklearn", "matplotlib": "matplotlib", "tensorboard": "tensorboard"},
    "imagenet": {"pillow": "PIL", "timm": "timm"},
    "hf": {"datasets": "datasets"},
    "export": {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
    "profile": {"torch-tb-profiler": "torch_tb_profiler"},
}

# Features of a CPU that decide which code the kernels run
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd",
                "bf16", "sve")  # fmt: skip

# Prefixes of the variables that change the results or the speed of a run
VARIABLES = ("BDKD_", "OMP_", "MKL_NUM", "TRITON_", "CUDA_VISIBLE", "HIP_VISIBLE", "TORCH_",
             "TORCHINDUCTOR_", "PYTORCH_", "NCCL_", "WORLD_SIZE", "CXX")  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Show what is installed on this machine, and the command that installs what is missing."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON array instead of lines."""


class Finding(NamedTuple):
    """One package or device that this command looks for."""

    name: str
    found: bool
    what: str  # version and properties, or the reason why it is missing
    remedy: str = ""  # the command that installs it


def run(given: list[str]) -> None:
    """Examine the machine, and print the findings."""
    arguments = parse(Arguments, "bdkd doctor", given)
    findings = examine()
    if arguments.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
        return
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok     " if finding.found else "missing"
        print(f"{mark}  {finding.name:{width}}  {finding.what}")
        if finding.remedy and not finding.found:
            print(f"{'':9}{'':{width}}  -> {finding.remedy}")


def examine() -> list[Finding]:
    """Return everything that affects a run, with its version or the reason why it is missing."""
    requirements = ", ".join(f"{name} {_version(name)}" for name in TRAINER_PACKAGES)
    variables = sorted(key for key in os.environ if key.startswith(VARIABLES))
    environment = " ".join(f"{key}={os.environ[key]}" for key in variables)
    return [
        Finding("bdkd", True, f"{bdkd_version()}, Python {platform.python_version()}"),
        Finding("system", True, platform.platform()),
        Finding("CPU", True, _processor()),
        Finding("environment", True, environment or "no variable that affects a run"),
        Finding("torch", True, _torch()),
        Finding("requirements", True, requirements),
        _gpu(),
        *_backends(),
        _optional("DALI", "nvidia.dali", "dali", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        _apex(),
        *(_optional(name, module, extra, name)
          for extra, modules in OPTIONAL.items() for name, module in modules.items()),
        *_torchvision(),
        *_plugins(),
    ]  # fmt: skip


def _plugins() -> list[Finding]:
    """Return the plugins that are installed with an entry point."""
    from bdkd.plugins import GROUP, load_installed

    found = [
        f"{entry.value} ({entry.dist.name} {entry.dist.version})"
        for entry in entry_points(group=GROUP)
        if entry.dist is not None
    ]
    try:
        load_installed()
    except RunError as error:
        return [Finding("plugins", False, str(error))]
    return [Finding("plugins", True, ", ".join(found))] if found else []


def _processor() -> str:
    """Return the CPU's model, the number of usable cores, and the features in CPU_FEATURES."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, features = platform.machine(), ""
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(errors="replace").splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        model = f"{fields.get('model name', 'unnamed')} ({model})"
        has = set(fields.get("flags", fields.get("Features", "")).split())
        features = "; " + (" ".join(x for x in CPU_FEATURES if x in has) or "no vector feature")
    return f"{model}, {usable} of {os.cpu_count()} cores{features}"


def _torch() -> str:
    import torch

    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    build = " ".join(f"{name} {number}" for name, number in builds.items() if number)
    return (
        f"{torch.__version__}, {build or 'CPU only'}, {torch.get_num_threads()} intra-op and "
        f"{torch.get_num_interop_threads()} inter-op threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        sizes = [f"{d.major}.{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices]
        names = [f"{d.name} ({size})" for d, size in zip(devices, sizes, strict=True)]
        return Finding("GPU", True, ", ".join(names))
    build = torch.version.cuda or torch.version.hip
    if build is None:
        remedy = "with a GPU: install a GPU build of torch, https://pytorch.org/get-started/locally"
        return Finding("GPU", False, "this torch is built for the CPU alone", remedy)
    what = f"torch is built for {build} but finds no device or driver"
    return Finding("GPU", False, what, "check the driver: nvidia-smi or rocm-smi")


def _backends() -> list[Finding]:
    from bdkd import available_backends

    triton = _can_find("triton")
    remedies = {
        "triton": "with a GPU: see the line GPU" if triton else "pip install 'bdkd[triton]'",
        "native": "install a C++ compiler (Debian: apt install g++), then reinstall bdkd: "
        "pip install --force-reinstall --no-deps . (in its source folder)",
    }
    findings = []
    for name, availability in available_backends().items():
        title = "reference loss" if name == "reference" else f"{name} kernel"
        what = availability.reason
        if name == "triton" and triton:
            what += f" (triton {_version('triton', 'pytorch-triton-rocm', 'pytorch-triton')})"
        findings.append(Finding(title, bool(availability), what, remedies.get(name, "")))
    return findings


def _apex() -> Finding:
    """Look for NVIDIA's apex, which is built from source. PyPI's apex is an unrelated package."""
    remedy = "build it from NVIDIA's repository, see https://github.com/NVIDIA/apex"
    if not _can_find("apex"):
        return Finding(
            "apex", False, "not installed (optional, for the optimizers LAMB and NovoGrad)", remedy
        )
    if not _can_find("apex.optimizers"):
        what = "the installed apex is not NVIDIA's but PyPI's unrelated package of that name"
        return Finding("apex", False, what, f"{sys.executable} -m pip uninstall apex; {remedy}")
    return Finding("apex", True, "NVIDIA's, with fused optimizers")


def _optional(name: str, module: str, extra: str, *distributions: str) -> Finding:
    if not _can_find(module):
        return Finding(name, False, "not installed", f"pip install 'bdkd[{extra}]'")
    return Finding(name, True, _version(*distributions))


def _torchvision() -> list[Finding]:
    """Import torchvision, because timm does. timm fails if torchvision does not match torch."""
    from bdkd.models.libraries import import_library, lacks_operators

    if not _can_find("torchvision"):
        return []
    found, what = _version("torchvision"), ""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the finding replaces the warning
            import_library("torchvision")
    except RunError as error:
        what = f"cannot be imported with this torch, so timm cannot be imported either: {error}"
    if lacks_operators():
        what = (
            "does not match this torch: bdkd can use its networks and those of timm, but other "
            "programs cannot import it"
        )
    remedy = "install the torchvision built for this torch, from the same index"
    return [Finding("torchvision", not what, f"{found} {what}".strip(), remedy)]


def _version(*distributions: str) -> str:
    for distribution in distributions:
        with contextlib.suppress(PackageNotFoundError):
            return version(distribution)
    return "version unknown"


def _can_find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing or broken
        return False
