"""Virtual environments for the tests of packaging. They are fast to make: packages are links."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def run(*command: object, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          timeout=550, **options)  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def site_packages(environment: Path) -> Path:
    [folder] = environment.glob("lib/python3*/site-packages")
    return folder


def link(environment: Path, packages: set[str]) -> None:
    """Link packages of this environment into another one, so that its Python and pip see them."""
    site = site_packages(environment)
    for package in map(distribution, packages):
        files = [path for path in package.files or [] if ".." not in path.parts]
        for name in {path.parts[0] for path in files} - {"__pycache__"}:
            if not (site / name).exists():  # several packages share a namespace such as nvidia
                (site / name).symlink_to(package.locate_file(name))


def requirement_closure(package: str) -> set[str]:
    """Return a package and all its direct and indirect requirements on this machine."""
    found, open_ = set(), [Requirement(package)]
    while open_:
        needed = open_.pop()
        name, extras = canonicalize_name(needed.name), frozenset(needed.extras)
        if (name, extras) not in found:
            found.add((name, extras))
            lines = map(Requirement, distribution(name).requires or [])
            open_ += [one for one in lines if applies(one, {"", *extras})]
    return {name for name, _ in found}


def applies(requirement: Requirement, extras: Iterable[str] = ("",)) -> bool:
    """Return whether a requirement applies on this machine with any of these extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def torch_environment(folder: Path, wheel: Path) -> Path:
    """Make an environment with only torch and its requirements, install the wheel in it, and return
    its Python.

    pip gets no package index, so it fails if the wheel requires more than torch.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    packages = requirement_closure("torch")
    link(folder, packages)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    outside = ("PIP_", "PYTHON")  # pip would find this source tree through PYTHONPATH
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outside)}
    environment["PIP_CONFIG_FILE"] = os.devnull
    run(*pip, "install", "--no-index", wheel, env=environment)
    installed = {canonicalize_name(d.name) for d in distributions(path=[site_packages(folder)])}
    assert installed == packages | {"bdkd"}
    return python


def add_the_other_packages(environment: Path) -> None:
    """Make an environment import all packages of this environment, except this source tree.

    Python searches a folder that a .pth file names, but does not read the .pth files in it. So the
    editable install of this source tree has no effect.
    """
    (site_packages(environment) / "others.pth").write_text(sysconfig.get_path("purelib"))


def requirements(wheel: Path) -> set[str]:
    """Return the names of the packages that a wheel requires without extras."""
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    return {one.name for one in map(Requirement, lines) if applies(one)}
