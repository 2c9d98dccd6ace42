"""Time the import of the packages in a new interpreter."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

from harness import Case, Contender, MakeCase
from machine import ROOT

OURS = {
    "import bdkd": ["-c", "import bdkd"],
    "import bdkd_kernels": ["-c", "import bdkd_kernels"],
    "bdkd --help": ["-m", "bdkd", "--help"],
}
PEERS = ("liger_kernel.transformers",)


def cases(quick: bool) -> list[MakeCase]:
    return [functools.partial(_case, quick)]


def _case(quick: bool) -> Case:
    ours = dict(list(OURS.items())[:1]) if quick else OURS
    contenders = [Contender(name, _run(command), "ours") for name, command in ours.items()]
    contenders.append(Contender("import torch", _run(["-c", "import torch"]), "limit"))
    absent = {}
    for module in () if quick else PEERS:
        if find_spec(module.split(".")[0]):
            contenders.append(Contender(f"import {module}", _run(["-c", f"import {module}"])))
        else:
            absent[f"import {module}"] = "it is not installed"
    return Case("a fresh interpreter", {}, tuple(contenders), absent=absent, memory=False)


def _run(arguments: list[str]) -> Callable[[int], object]:
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}

    def call(i: int) -> None:
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True)
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{' '.join(arguments)}: {''.join(last)}")

    return call
