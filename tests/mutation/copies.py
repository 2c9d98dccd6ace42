"""Make copies of the working tree in which mutants run. The tree itself is never changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".mutate"  # ignored by git


def make_copy(name: str) -> Path:
    """Make a new copy of the files that git tracks or would add, with the native library of this
    checkout. Return its path."""
    copy = STATE / name
    shutil.rmtree(copy, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    libraries = [str(p.relative_to(ROOT)) for p in (ROOT / "kernels/bdkd_kernels").glob("*.so")]
    for file in filter(None, (*listed, *libraries)):
        if (ROOT / file).is_file():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, copy / file)
    return copy


def environment(copy: Path, interpreted: bool = False) -> dict[str, str]:
    """Return the environment of a test process. Imports come from the copy, and no ``.pyc`` file is
    used, because it could be that of another mutant."""
    paths = [str(copy), str(copy / "kernels"), str(copy / "tests" / "mutation")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": str(int(interpreted)),
        "PYTEST_CURRENT_TEST": "",  # coverage.ini reads it
    }


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
