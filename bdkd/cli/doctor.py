"""``bdkd doctor``: what this machine can do; its output fits an issue report."""

import importlib.util
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import tyro

from bdkd.extras import TRAINER_PACKAGES

# Package, the module that tells whether it is there, and the extra of bdkd that brings it.
OPTIONAL = (
    ("scikit-learn", "sklearn", "train"),
    ("matplotlib", "matplotlib", "train"),
    ("tensorboard", "tensorboard", "train"),
    ("pillow", "PIL", "imagenet"),
    ("timm", "timm", "imagenet"),
    ("onnx", "onnx", "export"),
    ("onnxscript", "onnxscript", "export"),
    ("onnxruntime", "onnxruntime", "export"),
    ("torch-tb-profiler", "torch_tb_profiler", "profile"),
)

# What the kernels are chosen by, of all that a processor can.
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd",
                "bf16", "sve")  # fmt: skip

# Variables that change what a run does or how fast it is.
VARIABLES = ("BDKD_", "OMP_", "MKL_NUM", "TRITON_", "CUDA_VISIBLE", "HIP_VISIBLE", "TORCH_",
             "TORCHINDUCTOR_", "PYTORCH_", "NCCL_", "WORLD_SIZE", "CXX")  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """What this machine can do, and the command that brings what is missing."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON array instead of lines."""


@dataclass(frozen=True)
class Finding:
    """One thing looked for."""

    name: str
    found: bool
    what: str  # version and facts, or the reason it is missing
    remedy: str = ""  # the command that brings it


def run(given: list[str]) -> None:
    """Look, then print."""
    arguments = tyro.cli(Arguments, prog="bdkd doctor", args=given)
    findings = examine()
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok     " if finding.found else "missing"
        print(f"{mark}  {finding.name:{width}}  {finding.what}")
        if finding.remedy and not finding.found:
            print(f"{'':9}{'':{width}}  -> {finding.remedy}")


def examine() -> list[Finding]:
    """Everything that makes a difference to a run, each with its version or the reason it lacks."""
    return [
        Finding("bdkd", True, f"{version('bdkd')}, Python {platform.python_version()}"),
        Finding("system", True, platform.platform()),
        Finding("CPU", True, _processor()),
        Finding("environment", True, _environment()),
        _torch(),
        Finding("requirements", True, _requirements()),
        _gpu(),
        *_backends(),
        _dali(),
        _apex(),
        *(_optional(*package) for package in OPTIONAL),
        *_torchvision(),
    ]


def _processor() -> str:
    """Model, cores this process may use, and those of its features that the kernels look at."""
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


def _environment() -> str:
    """The variables that a run depends on, and nothing else of what is private there."""
    given = sorted(key for key in os.environ if key.startswith(VARIABLES))
    return " ".join(f"{key}={os.environ[key]}" for key in given) or "no variable that matters here"


def _torch() -> Finding:
    import torch

    threads = f"{torch.get_num_threads()} threads an operator, {torch.get_num_interop_threads()} "
    builds = [f"{name} {build}" for name, build in (
        ("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)) if build]  # fmt: skip
    return Finding(
        "torch",
        True,
        f"{torch.__version__}, {' '.join(builds) or 'CPU only'}, {threads}between operators, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    )


def _requirements() -> str:
    """Return the versions of the packages that the trainer always needs."""
    return ", ".join(f"{name} {_version(name)}" for name in TRAINER_PACKAGES)


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [
            f"{d.name} ({d.major}.{d.minor}, {d.total_memory / 2**30:.0f} GiB)" for d in devices
        ]
        return Finding("GPU", True, ", ".join(names))
    build = torch.version.cuda or torch.version.hip
    if build is None:
        return Finding(
            "GPU", False, "this torch is built for the CPU alone",
            "with a GPU: install the torch built for it, https://pytorch.org/get-started/locally",
        )  # fmt: skip
    return Finding("GPU", False, f"torch is built for {build} but finds no device or driver",
                   "check the driver: nvidia-smi or rocm-smi")  # fmt: skip


def _backends() -> list[Finding]:
    from bdkd import available_backends

    remedies = {
        "triton": "with a GPU: see the line above"
        if _can_find("triton")
        else "pip install 'bdkd[triton]'",
        "native": "install a C++ compiler (Debian: apt install g++), then reinstall bdkd: "
        "pip install --force-reinstall --no-deps . (in its source folder)",
    }
    findings = []
    for name, availability in available_backends().items():
        title = "reference loss" if name == "reference" else f"{name} kernel"
        what = availability.reason
        if name == "triton" and _can_find("triton"):
            what += f" (triton {_version('triton', 'pytorch-triton-rocm', 'pytorch-triton')})"
        findings.append(Finding(title, bool(availability), what, remedies.get(name, "")))
    return findings


def _dali() -> Finding:
    if not _can_find("nvidia.dali"):
        return Finding("DALI", False, "not installed", "pip install 'bdkd[dali]'")
    return Finding("DALI", True, _version("nvidia-dali-cuda130", "nvidia-dali-cuda120"))


def _apex() -> Finding:
    """NVIDIA's apex is a source build; PyPI's package of that name is something else."""
    remedy = "build it from NVIDIA's repository, see https://github.com/NVIDIA/apex"
    if not _can_find("apex"):
        return Finding("apex", False, "not installed (optional: LAMB, NovoGrad)", remedy)
    if not _can_find("apex.optimizers"):
        what = "the installed apex is not NVIDIA's but PyPI's unrelated package of that name"
        return Finding("apex", False, what, f"{sys.executable} -m pip uninstall apex; {remedy}")
    return Finding("apex", True, "NVIDIA's, with fused optimizers")


def _optional(distribution: str, module: str, extra: str) -> Finding:
    if not _can_find(module):
        return Finding(distribution, False, "not installed", f"pip install 'bdkd[{extra}]'")
    return Finding(distribution, True, _version(distribution))


def _torchvision() -> list[Finding]:
    """Nothing of ours imports it, but timm does: one that does not fit torch takes timm along."""
    if not _can_find("torchvision"):
        return []
    try:
        import_module("torchvision")
    except Exception as error:  # RuntimeError, ImportError or OSError, by what does not fit
        what = f"{_version('torchvision')} does not import beside this torch, so timm does not: "
        remedy = "install the torchvision built for this torch, from the same index"
        return [Finding("torchvision", False, what + str(error).splitlines()[0], remedy)]
    return [Finding("torchvision", True, _version("torchvision"))]


def _version(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "version unknown"


def _can_find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent package is missing or broken
        return False
