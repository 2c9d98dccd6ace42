"""Times every sensible launch on a GPU, and prints the launch table with its measurements.

    python bench/autotune.py [--classes 1000 32000] [--dtypes bf16 fp32] [--json FILE]

What wins goes into ``triton_launch.py`` by hand, with the line that this printed: no call ever
tunes. A launch is named as ``triton_launch`` names it; times are GPU times by graph replay.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from bdkd_kernels import (
    available_backends,
    bdkd_loss_and_grad,
    triton_backend,
    triton_launch,
)
from bdkd_kernels.triton_launch import Loop, Tile
from loss_gpu import DTYPES, Inputs, medians
from triton.runtime.errors import OutOfResources

CLASSES = (10, 100, 256, 500, 1000, 2048, 4096, 8192, 16384, 21841, 32000, 65536, 128256)


def candidates(classes: int, itemsize: int, aligned: bool) -> list[Tile | Loop]:
    found: list[Tile | Loop] = []
    block = max(16, triton_launch.block_of(classes))
    if classes <= 16384:
        for warps in (1, 2, 4, 8, 16, 32):
            for pairs in (4, 8, 16, 32):  # a thread
                rows, rest = divmod(32 * warps * pairs, block)
                if rest == 0 and rows >= 1 and (rows == 1 or block <= 512):
                    found.append(Tile(rows, block, warps))
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
    measured = []
    print(torch.cuda.get_device_name())
    for dtype_name in options.dtypes:
        for classes in options.classes:
            dtype = DTYPES[dtype_name]
            rows = max(1024, min(8192, 2**28 // classes))
            x = Inputs(rows, classes, dtype)
            aligned = classes * dtype.itemsize % 16 == 0
            shipped = triton_launch.choose(classes, dtype.itemsize, aligned)
            for launch in dict.fromkeys([shipped, *candidates(classes, dtype.itemsize, aligned)]):

                def step(i: int, x=x):
                    bdkd_loss_and_grad(*x.sets[i], temperature=4.0, backend="triton",
                                       grads=x.buffers[i])  # fmt: skip

                triton_backend._plans.clear()
                triton_backend._compiled.clear()
                with mock.patch.object(triton_launch, "choose", return_value=launch):
                    try:
                        microseconds, _ = medians(step, len(x.sets), 0.1)
                    except OutOfResources:
                        continue  # more shared memory or threads than this GPU has
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
