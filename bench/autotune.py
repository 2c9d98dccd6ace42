"""Time candidate launches on a GPU, and print the launch table with its measurements.

    python bench/autotune.py [--classes 1000 32000] [--dtypes bf16 fp32] [--seconds 60]
                             [--json FILE] [--out FOLDER]

Copy the fastest launches into ``launch_table.py`` by hand, each with its printed line, because no
call tunes at run time. Times are GPU times of CUDA graph replays. Other processes compile the
candidates beforehand, into Triton's cache. ``--out`` also writes each measurement to
``FOLDER/measurements.jsonl``.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import machine
import torch
from bdkd_kernels import available_backends, bdkd_loss_and_grad
from bdkd_kernels.triton import backend as triton_backend
from bdkd_kernels.triton import launch_table
from bdkd_kernels.triton.launch_table import Loop, Tile
from harness import Contender, DeviceClock, WallClock, _rounds
from losses import DTYPES, Race, Size
from progress import Progress
from triton.runtime.errors import OutOfResources

sys.path.append(str(Path(__file__).parent / "gpu"))
from measurements import Log
from prepare import compile_only

CLASSES = (10, 100, 256, 500, 1000, 2048, 4096, 8192, 16384, 21841, 32000, 65536, 128256)
MOST = 40  # candidates per number of classes
COPY = "copy of both logits"
Launch = Tile | Loop


def candidates(classes: int, itemsize: int, vector: int) -> list[Launch]:
    """Return at most MOST launches."""
    aligned = vector * itemsize == 16
    found: list[Launch] = []
    block = max(16, launch_table.block_of(classes))
    if classes <= 16384:
        for warps in (1, 2, 4, 8, 16):
            for pairs in (4, 8, 16, 32):  # class pairs per thread
                rows, rest = divmod(32 * warps * pairs, block)
                if rest == 0 and rows >= 1 and (rows == 1 or block <= 512) and rows <= 32:
                    inner = min(block, block // pairs * vector) if rows > 1 else block
                    found += [
                        Tile(rows=rows, block=block, inner=max(1, inner), warps=warps,
                             registers=registers)
                        for registers in ((255,) if pairs == 32 or rows > 1 else (255, 128, 80))
                    ]  # fmt: skip
    if classes > 512:
        inner = 16 // itemsize if aligned or classes > 4096 else vector
        for warps in (1, 2, 4) if classes <= 4096 else (4, 8, 16):
            for prefetch, registers in ((0, 64), (1, 0), (1, 64), (1, 80), (2, 64), (2, 80)):
                found.append(
                    Loop(
                        warps=warps,
                        inner=inner,
                        prefetch=prefetch,
                        shifted=not aligned and inner > 1,
                        registers=registers,
                    )
                )
    return found[:MOST]


def size_of(classes: int, dtype: str) -> Size:
    """Return the size at which launches for a number of classes are timed."""
    return Size(max(1024, min(8192, 2**28 // classes)), classes, dtype)


def launches(size: Size) -> list[Launch]:
    """Return the launch of the table, and the candidates."""
    itemsize = DTYPES[size.dtype].itemsize
    vector = math.gcd(16 // itemsize, size.classes)
    shipped = launch_table.choose(size.classes, itemsize, vector, vector * itemsize < 16)
    return list(dict.fromkeys([shipped, *candidates(size.classes, itemsize, vector)]))


def short(launch: Launch) -> str:
    bounded = launch.registers not in (0, 255)
    end = f", {launch.registers} registers" if bounded else ""
    if isinstance(launch, Tile):
        return f"launch tile {launch.rows} x {launch.block}, {launch.warps} warps{end}"
    shifted = ", shifted" if launch.shifted else ""
    return f"launch loop {launch.warps} warps, {launch.prefetch} ahead{shifted}{end}"


def chosen(launch: Launch) -> Any:
    """Make every call use one launch."""
    triton_backend._plans.clear()
    return mock.patch.object(launch_table, "choose", mock.Mock(return_value=launch))


def compile_launch(size: Size, launch: Launch) -> None:
    """Compile one candidate into Triton's cache. Runs in a separate process."""
    dtype = DTYPES[size.dtype]
    s, t, ds, dt = (torch.empty((size.rows, size.classes), dtype=dtype) for _ in range(4))
    y = torch.zeros(size.rows, dtype=torch.int64)
    with compile_only(), chosen(launch):
        bdkd_loss_and_grad(s, t, y, temperature=size.temperature, gamma=2.0, grads=(ds, dt))


class Search:
    """The candidates of some sizes. Other processes compile them in the order of their timing."""

    def __init__(self, sizes: list[Size], device: str, backend: str, processes: int) -> None:
        self.device, self.backend = device, backend
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(processes, mp_context=context)
        self.compiled: dict[Size, dict[Launch, Future]] = {}
        for size in sizes:
            self.compiled[size] = {
                launch: self.pool.submit(compile_launch, size, launch)
                for launch in launches(size)[: 2 if device == "cpu" else None]
            }
        self.progress = Progress("autotune: launch", sum(map(len, self.compiled.values())))

    def end(self) -> None:
        self.progress.clear()
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()

    def time(self, size: Size, until: float) -> list[tuple[float, float, Launch]]:
        """Return each launch with its seconds and its share of the copy's bandwidth."""
        race = Race(size, "both", self.device, machine.last_level_cache(self.device))
        clock: Any = DeviceClock() if self.device == "cuda" else WallClock(shortest=1e-4)
        copied = clock.sampler(Contender(COPY, race.copy), len(race.inputs))

        def at_once(i: int) -> None:
            s, t, y, into = race.inputs[i]
            bdkd_loss_and_grad(s, t, y, temperature=size.temperature, grads=into,
                               backend=self.backend)  # fmt: skip

        found = []
        for launch, compiled in self.compiled[size].items():
            left = until - time.monotonic()
            if left < 1:
                break
            self.progress.start(f"{size.rows} x {size.classes} {size.dtype}, {short(launch)}")
            try:
                compiled.result(left)
            except TimeoutError:
                break
            except Exception as error:
                self.progress.print(f"{size}: {launch} does not compile: {error}")
                continue
            try:
                with chosen(launch):
                    ours = clock.sampler(Contender("ours", at_once, "ours"), len(race.inputs))
            except OutOfResources:
                continue  # more shared memory or threads than this GPU has
            finally:
                triton_backend._plans.clear()
            times = _rounds({"ours": ours, COPY: copied}, 7, 0.5, lambda: None)
            share = statistics.median(
                c / x for c, x in zip(times[COPY], times["ours"], strict=True)
            )
            found.append((statistics.median(times["ours"]), share, launch))
        return found


def main(options: argparse.Namespace) -> int:
    log = Log(options.out, "3 autotune" + ", dry run" * options.dry_run) if options.out else None
    until = time.monotonic() + options.seconds
    device, backend = ("cpu", "reference") if options.dry_run else ("cuda", "triton")
    if not options.dry_run and not available_backends()["triton"]:
        print(
            f"no Triton kernel on this machine: {available_backends()['triton']}", file=sys.stderr
        )
        return 1
    sizes = [size_of(classes, dtype) for dtype in options.dtypes for classes in options.classes]
    if options.dry_run:
        sizes = [Size(32, 1000, "bf16")]
    processes = max(1, min(15, (os.cpu_count() or 2) - 1))
    search, measured, failed = Search(sizes, device, backend, processes), [], 0
    print("CPU, dry run" if options.dry_run else torch.cuda.get_device_name(), flush=True)
    try:
        for size in sizes:
            shown = f"{size.rows} x {size.classes} {size.dtype}"
            shipped, number = next(iter(search.compiled[size])), len(search.compiled[size])
            try:
                found = search.time(size, until)
            except Exception as error:
                failed += 1
                search.progress.print(f"{shown}: {type(error).__name__}: {error}")
                if log:
                    log.add("failed", "search for launch parameters", str(error)[:200], size=shown)
                continue
            if log and len(found) < number:
                log.add("skipped", "search for launch parameters",
                        f"{len(found)} of {number} launches timed", size=shown)  # fmt: skip
            for seconds, share, launch in found:
                name = short(launch) + ", as shipped" * (launch == shipped)
                measured.append((1e6 * seconds, size.dtype, size.rows, size.classes, repr(launch),
                                 launch == shipped))  # fmt: skip
                if log:
                    log.add("time", name, 1e6 * seconds, "us", size=shown, l2="flushed",
                            of_copy=share, launch=repr(launch))  # fmt: skip
            best = sorted(found, key=lambda x: x[0])
            for seconds, share, launch in best[:3] + [x for x in best[3:] if x[2] == shipped]:
                search.progress.print(
                    f"{size.dtype} {size.rows:>5} x {size.classes:<7}{1e6 * seconds:10.1f} us "
                    f"{share:5.0%} of copy  {launch!r}"
                    f"{'  (shipped)' if launch == shipped else ''}"
                )
            if device == "cuda":
                torch.cuda.empty_cache()
    finally:
        search.end()
    if options.json:
        options.json.write_text(json.dumps(measured))
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", nargs="+", type=int, default=CLASSES)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    parser.add_argument("--out", type=Path, help="folder for measurements.jsonl")
    parser.add_argument("--dry-run", action="store_true", help="time one tiny size on the CPU")
    sys.exit(main(parser.parse_args()))
