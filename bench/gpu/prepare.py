"""Compile kernels and download packages for a GPU machine without network. Needs no GPU.

    python bench/gpu/prepare.py

Fills ``.gpu/``, which git ignores. ``cache`` contains the compiled Triton kernels for sm_90,
``wheels`` the packages that the GPU machine lacks, and ``commit`` the commit. Use the GPU machine's
versions of Python, torch and triton. Run this script again after every change of the kernels,
because Triton's cache keys contain their line numbers.

The kernels are compiled by the same calls that bench/gpu makes, on tensors of the same shapes whose
memory is never touched. Only the compiler's driver is replaced, so the cache keys are the same.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT / folder) for folder in ("kernels", ".", "bench", "bench/gpu")]
FOLDER = ROOT / ".gpu"
LIMIT = 60 * 2**20  # bytes of .gpu; at most 64 MiB are copied, with the repository
WHEELS = ("msgspec", "tomli_w", "tyro", "docstring-parser", "typeguard", "liger-kernel",
          "orda-kernel", "cut-cross-entropy")  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

# Shape and dtype of every call, the most important first.
SIZES = [(rows, classes, dtype) for dtype in ("bf16", "fp32") for rows, classes in (
    (4096, 1000), (8192, 32000), (1024, 1000), (8192, 128256), (4096, 21841))]  # fmt: skip
HOST_SIZES = [(128, 100, "bf16")]  # for the host time of a call
REDUCTION_SIZES = [(rows, 1000, "bf16") for rows in (1024, 4096)]
# The tile kernel with few and with many classes; the loop kernel with unaligned and aligned rows.
SANITIZER_CLASSES = (7, 1000, 4099, 4104)
# The search for launch parameters. Compiling its candidates on the device takes too long.
SEARCHED_CLASSES = (10, 100, 500)
Call = tuple[int, int, str, str]  # rows, classes, dtype, kind of call


def calls() -> list[Call]:
    """Return every call that the scripts make: its rows, its classes, its dtype, and its kind."""
    found = [(*size, "both") for size in SIZES + HOST_SIZES]
    found += [(9, classes, "bf16", "both") for classes in SANITIZER_CLASSES]
    found += [(*size, "kd") for size in SIZES]
    found += [(*size, "reductions") for size in REDUCTION_SIZES]
    return found + [(0, classes, dtype, "search") for classes in SEARCHED_CLASSES
                    for dtype in ("bf16", "fp32")]  # fmt: skip


@contextmanager
def compile_only() -> Iterator[None]:
    """Make calls of the loss on CPU tensors compile the Triton kernels for sm_90. No kernel is
    launched."""
    from bdkd_kernels import autograd, backends
    from bdkd_kernels.triton import backend as triton_backend
    from compiled import TARGETS, _Absent
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        run(self, *args, grid=grid, warmup=True, **kwargs)  # None is returned: nothing is launched

    driver.set_active(_Absent(TARGETS["sm_90"]))
    with (
        mock.patch.object(JITFunction, "run", warm_up),
        mock.patch.object(backends, "choose", mock.Mock(return_value=triton_backend)),
        # On a GPU, the host does not know the value of the upstream gradient.
        mock.patch.object(
            autograd.GradScale, "is_like", lambda self, upstream: upstream is self.value
        ),
        mock.patch.dict(triton_backend._plans, clear=True),
        mock.patch.dict(triton_backend._backward_plans, clear=True),
    ):
        yield


def make(call: Call) -> None:
    """Make one call inside ``compile_only``."""
    import torch
    from bdkd_kernels import bdkd_loss, bdkd_loss_and_grad
    from losses import _NO_CE, DTYPES

    rows, classes, dtype, kind = call
    if kind == "search":
        from autotune import compile_launch, launches, size_of

        for launch in launches(size_of(classes, dtype)):
            compile_launch(size_of(classes, dtype), launch)
        return
    s, t, ds, dt = (torch.empty((rows, classes), dtype=DTYPES[dtype]) for _ in range(4))
    y = torch.zeros(rows, dtype=torch.int64)
    options: dict[str, Any] = {"temperature": 4.0, "gamma": 2.0}
    if kind == "reductions":
        for reduction in ("sum", "none"):
            bdkd_loss_and_grad(s, t, y, **options, reduction=reduction, grads=(ds, dt))
        return
    if kind == "both":
        bdkd_loss_and_grad(s, t, y, **options, grads=(ds, dt))
    else:
        options |= _NO_CE
    s.requires_grad_()
    t.requires_grad_(kind == "both")
    out = bdkd_loss(s, t, y, **options)
    (out.student + out.teacher).backward()


def compile_calls(chosen: list[Call]) -> dict[str, Any]:
    """Compile the kernels of some calls into the cache.

    Returns the numbers of kernels that were found in the cache and that were compiled, the number
    of failed calls, and the folders of the kernels.
    """
    import triton

    counts: dict[str, Any] = {"found": 0, "compiled": 0, "failed": 0, "folders": []}

    def count(*, metadata_group: dict[str, str], cache_hit: bool, **_: Any) -> None:
        counts["found" if cache_hit else "compiled"] += 1
        counts["folders"].append(Path(next(iter(metadata_group.values()))).parent.name)

    triton.knobs.compilation.listener = count
    with compile_only():
        for call in chosen:
            try:
                make(call)
            except Exception as error:  # continue with the other calls
                print(f"{call}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                counts["failed"] += 1
    return counts


def in_parallel(cache: Path, processes: int, cwd: Path = ROOT) -> dict[str, Any]:
    """Compile the kernels of all calls into ``cache`` in new processes. Return the sums of the
    results."""
    from progress import Progress

    environment = os.environ | {
        "TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(PATHS), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    # Calls with the same number of classes and dtype share kernels. On few cores, they also share a
    # process.
    groups: dict[tuple, list[Call]] = {}
    for call in calls():
        groups.setdefault(call[1:3] if processes <= 4 else call, []).append(call)
    dealt = list(groups.values())
    if processes <= 4:
        dealt.sort(key=len, reverse=True)

    progress = Progress("prepare: groups of calls compiled:", len(dealt))

    def run(group: list[Call]) -> dict[str, Any]:
        command = [sys.executable, __file__, "--compile", json.dumps(group)]
        done = subprocess.run(command, env=environment, cwd=cwd, stdout=subprocess.PIPE, text=True)
        progress.start(f"{len(group)} calls of {group[0][1]} classes, {group[0][2]}")
        if done.returncode:
            return {"found": 0, "compiled": 0, "failed": len(group), "folders": []}
        return json.loads(done.stdout.splitlines()[-1])

    with progress, ThreadPoolExecutor(processes) as pool:
        results = progress.results([pool.submit(run, group) for group in dealt])
    sums: dict[str, Any] = {key: sum(x[key] for x in results)
                            for key in ("found", "compiled", "failed")}  # fmt: skip
    return sums | {"folders": {folder for x in results for folder in x["folders"]}}


def keep_binaries(made: Path, folders: set[str], into: Path) -> int:
    """Copy the files that Triton reads for a cache hit of some kernels, with relative paths. Return
    the number of kernels."""
    kernels = 0
    for group in sorted(made.glob("*/__grp__*.json")):
        if group.parent.name not in folders:
            continue
        names = [n for n in json.loads(group.read_text())["child_paths"]
                 if n.endswith((".cubin", ".json"))]  # fmt: skip
        folder = into / group.parent.name
        folder.mkdir(parents=True)
        for name in names:
            shutil.copy(group.parent / name, folder / name)
        (folder / group.name).write_text(json.dumps({"child_paths": {n: n for n in names}}))
        kernels += 1
    return kernels


def install(into: Path, source: Path = FOLDER / "cache") -> None:
    """Copy the prepared cache. Triton reads absolute paths, so relative paths are replaced."""
    if not source.exists():
        into.mkdir(parents=True, exist_ok=True)
        return
    shutil.copytree(source, into, dirs_exist_ok=True)
    for group in into.glob("*/__grp__*.json"):
        group.chmod(0o644)
        names = json.loads(group.read_text())["child_paths"]
        paths = {name: str(group.parent.resolve() / name) for name in names}
        group.write_text(json.dumps({"child_paths": paths}))
    for folder in (into, *(path for path in into.iterdir() if path.is_dir())):
        folder.chmod(0o755)


def key() -> str:
    """Return a digest of the compiler: of Triton's sources, its library and ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    return hashlib.sha256((triton_key() + get_ptxas_version(90)).encode()).hexdigest()[:16]


def install_or_compile(into: Path, processes: int) -> None:
    """Install the cache. If another build of Triton made it, compile all kernels again."""
    install(into)
    prepared = FOLDER / "triton_key"
    if not prepared.exists():
        print("triton cache: no prepared kernels")
        return
    same = prepared.read_text().strip() == key()
    print(f"triton_key: {key()}, {'same as' if same else 'differs from'} the prepared", flush=True)
    if not same:
        begin = time.monotonic()
        counts = in_parallel(into, processes)
        print(f"{counts['compiled']} kernels compiled in {time.monotonic() - begin:.0f} s",
              flush=True)  # fmt: skip


def download_wheels(into: Path) -> None:
    into.mkdir(exist_ok=True)
    for name in WHEELS:
        if any(into.glob(f"{name.replace('-', '_')}-*.whl")):
            continue
        platforms = [x for platform in PLATFORMS for x in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps",
                   "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp",
                   *platforms, "--disable-pip-version-check", "-d", str(into), name]  # fmt: skip
        if subprocess.run(command).returncode:
            print(f"{name}: no wheel was downloaded", file=sys.stderr)


def commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "kernels", "bdkd", "bench")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


def main(options: argparse.Namespace) -> int:
    begin = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "commit").write_text(commit() + "\n")
    (FOLDER / "triton_key").write_text(key() + "\n")
    download_wheels(FOLDER / "wheels")
    with tempfile.TemporaryDirectory() as scratch:
        made, elsewhere = Path(scratch) / "made", Path(scratch) / "elsewhere" / "cache"
        install(made)  # kernels that have not changed are not compiled again
        counts = in_parallel(made, options.processes)
        print(f"{counts['compiled']} kernels compiled, {counts['found']} found, {counts['failed']} "
              f"calls failed, in {time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
        shutil.rmtree(FOLDER / "cache", ignore_errors=True)
        kernels = keep_binaries(made, counts["folders"], FOLDER / "cache")
        install(elsewhere)
        hits = in_parallel(elsewhere, options.processes, Path(scratch))
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{kernels} kernels; new processes found {hits['found']} of them and compiled "
          f"{hits['compiled']}; .gpu: {size / 2**20:.1f} MiB; "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    wrong = counts["failed"] or hits["failed"] or hits["compiled"] or size > LIMIT
    if wrong:
        print("not ready: a call failed, a kernel was not found in the cache, or .gpu is too large")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="number of compiling processes")
    parser.add_argument("--install", type=Path, help="copy .gpu/cache to this folder, or compile "
                        "the kernels again if another build of Triton made it")  # fmt: skip
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path[:0] = PATHS
    if given.compile:
        print(json.dumps(compile_calls([tuple(call) for call in json.loads(given.compile)])))
    elif given.install:
        install_or_compile(given.install, given.processes)
    else:
        sys.exit(main(given))
