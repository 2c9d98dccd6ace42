"""Run the two commands of the README with each installed Python: ``make pythons``.

Each Python gets a fresh clone of this checkout in a temporary folder, with a new environment (5 GB
with a CUDA build of torch), and runs ``make demo`` and ``make test`` there. It prints one line per
Python with the results. Requires only the standard library.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
SYSTEM = Path("/usr/bin/python3")
TARGETS = ("demo", "test")


class Python(NamedTuple):
    version: tuple[int, int, int]
    path: Path

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


def installed(environment: dict[str, str], system: Path = SYSTEM) -> list[Python]:
    """Return the newest Python of each minor version, and the Python of the system, sorted by
    version.

    Searches the folder of the system, the folders on ``PATH`` and the versions of pyenv.
    """
    folders = [system.parent, *map(Path, environment.get("PATH", "").split(os.pathsep))]
    home = environment.get("HOME", "/")
    pyenv = Path(environment.get("PYENV_ROOT", f"{home}/.pyenv"))
    folders += pyenv.glob("versions/*/bin")
    found: dict[Path, Python] = {}
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.glob("python3*")) if folder.is_dir() else ():
            if re.fullmatch(r"python3(\.\d+)?", path.name) and path.resolve() not in found:
                python = examine(path)
                if python is not None:
                    found[path.resolve()] = python
    newest = {python.version[:2]: python for python in sorted(found.values())}
    chosen = {python.version: python for python in newest.values()}
    its_own = found.get(system.resolve())
    if its_own is not None:
        chosen[its_own.version] = its_own
    return sorted(chosen.values())


def examine(path: str | Path) -> Python | None:
    """Return a Python if it runs, is new enough and can make virtual environments, else None."""
    code = "import sys, venv, ensurepip; print(*sys.version_info[:3], sys.executable)"
    try:
        done = subprocess.run([path, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    if done.returncode:
        return None
    major, minor, micro, executable = done.stdout.split(maxsplit=3)
    version = (int(major), int(minor), int(micro))
    return Python(version, Path(executable.strip())) if version >= OLDEST else None


def named(names: Iterable[str]) -> list[Python]:
    """Return the Pythons with these names or paths.

    Raises:
        SystemExit: a Python does not run, is too old, or cannot make virtual environments.
    """
    pythons = []
    for name in names:
        path = shutil.which(name)
        python = examine(path) if path is not None else None
        if python is None:
            raise SystemExit(
                f"pythons: {name} is not a Python {OLDEST[0]}.{OLDEST[1]} or newer with venv: name "
                "another in PYTHONS"
            )
        pythons.append(python)
    return pythons


def try_one(python: Python, root: Path, targets: Iterable[str], folder: Path) -> bool:
    """Run the targets in a clone of ``root``, print one line, and return whether all passed.

    The clone is removed. The output stays in ``folder`` if a target failed.
    """
    clone, log = folder / f"python-{python}", folder / f"{python}.log"
    # The environment and the make that run this script must not affect the make that is tested.
    private = ("MAKE", "MFLAGS", "VIRTUAL_ENV", "PYTHON", "PYENV_VERSION")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(private)}
    began = time.monotonic()
    results = {}
    with open(log, "w") as output:

        def run(*command: object) -> bool:
            return not subprocess.run(
                [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, env=environment,
            ).returncode  # fmt: skip

        cloned = run("git", "clone", "--quiet", root, clone)
        for target in targets:
            passed = cloned and run("make", "-C", clone, target, f"PYTHON={python.path}")
            results[target] = "ok" if passed else "FAILED"
    shutil.rmtree(clone, ignore_errors=True)
    cells = "  ".join(f"{target} {result:6}" for target, result in results.items())
    line = f"{python!s:8}  {cells}  {time.monotonic() - began:6.0f} s  {python.path}"
    passed = set(results.values()) == {"ok"}
    print(line if passed else f"{line}  log: {log}", flush=True)
    if passed:
        log.unlink()
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("python", nargs="*", help="names or paths (default: all that are found)")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to clone")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="targets of make")
    options = parser.parse_args(arguments)
    pythons = named(options.python) if options.python else installed(dict(os.environ))
    if not pythons:
        raise SystemExit(f"pythons: no Python {OLDEST[0]}.{OLDEST[1]} or newer with venv was found")
    changed = subprocess.run(
        ["git", "-C", options.root, "status", "--porcelain"], capture_output=True, text=True
    ).stdout
    if changed:
        print("pythons: changes that are not committed are not tested", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="bdkd-pythons-"))
    passed = [try_one(python, options.root, options.targets, folder) for python in pythons]
    if all(passed):
        folder.rmdir()
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
