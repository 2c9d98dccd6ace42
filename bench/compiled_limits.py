"""Record the registers, spills and issue slots of the compiled kernels, for each triton version.

    python bench/compiled_limits.py  # compile with the installed triton, record its limits
    python bench/compiled_limits.py "--targets sm_90 --dtypes fp32 --classes 1000"  # some kernels

The records are in ``compiled_limits.json``. ``tests/kernels/test_triton_aot.py`` compiles the
kernels of ``ALWAYS`` and fails if a kernel exceeds its record. ``make soak`` adds ``MORE``.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from progress import Progress

_FILE = Path(__file__).with_name("compiled_limits.json")
_SCRIPT = Path(__file__).with_name("compiled.py")

# Arguments of compiled.py. ALWAYS has every shape of the launch table, MORE has the variants of the
# loss. 21841 is odd, so rows are unaligned. 262144 is a power of two, so nothing is padded.
ALWAYS = (
    "--targets sm_90 --dtypes bf16 --classes 11 100 500",
    "--targets sm_90 --dtypes bf16 --classes 1000 4096 8192 21841 262144",
    "--targets sm_90 --dtypes fp32 --classes 1000 21841 262144 --backward",
    "--targets sm_90 --dtypes fp16 fp64 --classes 1000",
    "--targets sm_80 sm_100 --dtypes bf16 --classes 1000 262144",
    "--targets sm_80 sm_100 --dtypes fp16 --classes 66",
    "--targets gfx942 --dtypes bf16 --classes 1000",
)
MORE = (
    "--targets sm_90 --dtypes bf16 --classes 10 33 101 32000",
    "--targets sm_90 --dtypes fp16 fp64 --classes 10 128256",
    "--targets sm_80 sm_100 --dtypes fp16 fp32 --classes 3 17 40 4096",
    "--targets sm_80 sm_100 --dtypes fp32 --classes 1000 262144",
    "--targets sm_90 --dtypes fp32 --classes 1000 32000 --variants",
    "--targets sm_80 --dtypes bf16 --classes 32000 --variants",
)
FIELDS = ("registers", "stack", "slots")


def compile_ahead(runs: tuple[str, ...], cache: Path | None = None) -> list[dict]:
    """Run compiled.py with each of the arguments, two runs at a time. Return the kernels."""
    # The interpreter compiles nothing.
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)

    def run(arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(_SCRIPT), "--json", *arguments.split()]
        progress.start(arguments)
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    found = []
    progress = Progress("compiled_limits: run of compiled.py", len(runs))
    with progress, ThreadPoolExecutor(2) as pool:
        for done in progress.results([pool.submit(run, arguments) for arguments in runs]):
            if done.returncode:
                raise RuntimeError(f"compiled.py failed:\n{done.stderr[-3000:]}")
            found += [json.loads(line) for line in done.stdout.splitlines()]
    return found


def minor_version() -> str:
    return ".".join(version("triton").split(".")[:2])


def key(kernel: dict) -> str:
    parts = (kernel["target"], kernel["dtype"], str(kernel["classes"]), kernel["kernel"])
    return " ".join(parts) + (f", {kernel['variant']}" if kernel["variant"] else "")


def exceeded(kernels: list[dict]) -> list[str]:
    """Return a line for each kernel that exceeds its record or has no record."""
    records = json.loads(_FILE.read_text()).get(minor_version(), {})
    lines = []
    for kernel in kernels:
        name, record = key(kernel), records.get(key(kernel))
        if record is None:
            lines.append(f"{name}: no record for triton {minor_version()}: run {Path(__file__)}")
            continue
        for field, limit in zip(FIELDS, record, strict=True):
            if limit is not None and kernel[field] > limit:
                lines.append(f"{name}: {field} {kernel[field]}, recorded {limit}")
    return lines


def main() -> None:
    records = json.loads(_FILE.read_text()) if _FILE.exists() else {}
    kernels = compile_ahead(tuple(sys.argv[1:]) or ALWAYS + MORE)
    kept = records.get(minor_version(), {}) if sys.argv[1:] else {}
    records[minor_version()] = kept | {
        key(x): [x[field] if field != "slots" or x[field] is None else round(x[field] + 0.05, 1)
                 for field in FIELDS]
        for x in kernels
    }  # fmt: skip
    lines = []
    for number, limits in sorted(records.items(), key=lambda x: [int(n) for n in x[0].split(".")]):
        rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(limits.items()))
        lines.append(f" {json.dumps(number)}: {{\n{rows}\n }}")
    _FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(kernels)} kernels recorded for triton {minor_version()} in {_FILE}")


if __name__ == "__main__":
    main()
