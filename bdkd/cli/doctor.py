"""``bdkd doctor``: what this machine can do; its output fits an issue report."""

import importlib.util
import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Arguments:
    """What this machine can do, and the command that brings what is missing."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of lines."""


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
    import torch

    from bdkd import available_backends

    findings = [
        Finding("bdkd", True, f"{version('bdkd')}, Python {platform.python_version()}, "
                f"{platform.platform()}"),
        Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} CPU threads"),
        _gpu(),
    ]  # fmt: skip
    remedies = {
        "triton": "pip install 'bdkd[triton]'",
        "native": "install a C++ compiler (Debian: apt install g++), then reinstall bdkd: "
        "pip install --force-reinstall --no-deps . (in its source folder)",
    }
    for name, availability in available_backends().items():
        findings.append(
            Finding(
                f"{name} kernel" if name != "reference" else "reference loss",
                bool(availability),
                availability.reason,
                remedies.get(name, ""),
            )
        )
    findings += [
        _package("DALI", "nvidia-dali-cuda130", "nvidia.dali", "pip install 'bdkd[dali]'"),
        _apex(),
        _package("scikit-learn", "scikit-learn", "sklearn", "pip install 'bdkd[train]'"),
        _package("matplotlib", "matplotlib", "matplotlib", "pip install 'bdkd[train]'"),
        _package("TensorBoard", "tensorboard", "tensorboard", "pip install 'bdkd[train]'"),
    ]
    return findings


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPU", True, ", ".join(names))
    build = torch.version.cuda or torch.version.hip
    if build is None:
        return Finding(
            "GPU", False, "this torch is built for the CPU alone",
            "pip install torch for your GPU, see https://pytorch.org/get-started/locally",
        )  # fmt: skip
    return Finding("GPU", False, f"torch is built for {build} but finds no device or driver",
                   "check the driver: nvidia-smi or rocm-smi")  # fmt: skip


def _package(name: str, distribution: str, module: str, remedy: str) -> Finding:
    if not _can_find(module):
        return Finding(name, False, "not installed", remedy)
    try:
        return Finding(name, True, version(distribution))
    except PackageNotFoundError:
        return Finding(name, True, "version unknown")


def _apex() -> Finding:
    """NVIDIA's apex is a source build; PyPI's package of that name is something else."""
    remedy = "build it from NVIDIA's repository, see https://github.com/NVIDIA/apex"
    if not _can_find("apex"):
        return Finding("apex", False, "not installed (optional: LAMB, NovoGrad)", remedy)
    if not _can_find("apex.optimizers"):
        what = "the installed apex is not NVIDIA's but PyPI's unrelated package of that name"
        return Finding("apex", False, what, f"{sys.executable} -m pip uninstall apex; {remedy}")
    return Finding("apex", True, "NVIDIA's, with fused optimizers")


def _can_find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent package is missing or broken
        return False
