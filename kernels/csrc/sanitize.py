"""Run the native kernel's test grid under AddressSanitizer, UBSan and valgrind.

    python kernels/csrc/sanitize.py            all instruction sets of this machine, and valgrind
    python kernels/csrc/sanitize.py --short    only portable code, unoptimised, without valgrind

Exits with the status of the first program that fails. If valgrind is not installed, a message says
so. valgrind does not support AVX-512.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def build(folder: Path, *options: str) -> Path:
    """Build the program with these CMake options and return its path."""
    scripts = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=f"{scripts}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        sys.exit("sanitize.py needs cmake: pip install cmake")
    options = (f"-DPython3_EXECUTABLE={sys.executable}", *options)
    run([cmake, "-S", str(CHECKOUT), "-B", str(folder), *options], stdout=subprocess.DEVNULL)
    target = ["--build", str(folder), "--target", "bdkd_sanitize", "--parallel", "2"]
    run([cmake, *target], stdout=subprocess.DEVNULL)
    return folder / "bdkd_sanitize"


def run(command: list[str], **options) -> None:
    done = subprocess.run(command, **options)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="the portable instruction set only")
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "build" / "sanitize")
    arguments = parser.parse_args()
    sanitizers = "-DBDKD_SANITIZE=address,undefined"
    # Invalid bools and enums, wrong alignment and overflows stop the program.
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}

    if arguments.short:
        # Compiling takes most of the time, and it is much faster without optimisation.
        program = build(
            arguments.folder / "short", sanitizers, "-DBDKD_PORTABLE=ON", "-DBDKD_OPTIMIZE=0"
        )
        return run([str(program)], env=environment)
    program = build(arguments.folder / "all", sanitizers)
    run([str(program), "portable", "avx2", "avx512", "avx512bf16"], env=environment)
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        return print("valgrind is not installed: its run is skipped")
    program = build(arguments.folder / "plain")
    run([valgrind, "--quiet", "--error-exitcode=1", str(program), "portable", "avx2"])


if __name__ == "__main__":
    main()
