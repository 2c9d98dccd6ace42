"""Times every sensible launch on a GPU, and prints the launch table with its measurements.

    python bench/autotune.py [--classes 1000 32000] [--dtypes bf16 fp32] [--json FILE]

What wins goes into ``triton_launch.py`` by hand, with the line that this printed: no call ever
tunes. A launch is named as ``triton_launch`` names it; times are GPU times by graph replay.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from unittest import mock

import machine
import torch
from bdkd_kernels import (
    available_backends,
    triton_backend,
    triton_launch,
)
from bdkd_kernels.triton_launch import Loop, Tile
from harness import Contender, DeviceClock
from losses import DTYPES, Race, Size
from triton.runtime.errors import OutOfResources

CLASSES = (10, 100, 256, 500, 1000, 2048, 4096, 8192, 16384, 21841, 32000, 65536, 128256)


def candidates(classes: int, itemsize: int, vector: int) -> list[Tile | Loop]:
    aligned = vector * itemsize == 16
    found: list[Tile | Loop] = []
    block = max(16, triton_launch.block_of(classes))
    if classes <= 16384:
        for warps in (1, 2, 4, 8, 16, 32):
            for pairs in (4, 8, 16, 32):  # a thread
                rows, rest = divmod(32 * warps * pairs, block)
                if rest == 0 and rows >= 1 and (rows == 1 or block <= 512):
                    beside = min(block, block // pairs * vector) if rows > 1 else block
                    found.append(Tile(rows, block, max(1, beside), warps))
    if classes > 1024:
        for warps in (4, 8, 16, 32):
            for stages in (1, 2, 3, 4) if aligned else (1,):
                each = 16 // itemsize if aligned else 8
                found.append(Loop(32 * warps, each, not aligned, stages, warps))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", nargs="+", type=int, default=CLASSES)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--json", type=Path, help="file for every measurement")
    options = parser.parse_args()
    if not available_backends()["triton"]:
        sys.exit(f"no Triton kernel here: {available_backends()['triton']}")
    cache = machine.last_level_cache("cuda")
    measured = []
    print(torch.cuda.get_device_name())
    for dtype_name in options.dtypes:
        for classes in options.classes:
            dtype = DTYPES[dtype_name]
            rows = max(1024, min(8192, 2**28 // classes))
            x = Race(Size(rows, classes, dtype_name), "both", "cuda", cache)
            vector = math.gcd(16 // dtype.itemsize, classes)
            shipped = triton_launch.choose(classes, dtype.itemsize, vector)
            for launch in dict.fromkeys([shipped, *candidates(classes, dtype.itemsize, vector)]):
                triton_backend._plans.clear()
                with mock.patch.object(triton_launch, "choose", return_value=launch):
                    try:
                        ours = Contender("ours", x.at_once, "ours")
                        sampler = DeviceClock().sampler(ours, len(x.inputs))
                    except OutOfResources:
                        continue  # more shared memory or threads than this GPU has
                microseconds = 1e6 * statistics.median(sampler.sample() for _ in range(20))
                measured.append((microseconds, dtype_name, rows, classes, repr(launch),
                                 launch == shipped))  # fmt: skip
            best = sorted(m for m in measured if m[1] == dtype_name and m[3] == classes)
            for microseconds, *_, name, is_shipped in best[:3] + [m for m in best[3:] if m[-1]]:
                print(f"{dtype_name} {rows:>5} x {classes:<7}{microseconds:10.1f} us  {name}"
                      f"{'  (shipped)' if is_shipped else ''}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
