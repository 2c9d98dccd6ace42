"""Read the hardware counters of the loss's kernels with Nsight Compute (part of stage 3).

    python bench/gpu/counters.py OUT [--seconds 60] [--dry-run] [--launch JSON]

Profiles one call of ``bdkd_loss_and_grad`` at each size. The counters of the row kernel and the
bytes that it moved, in units of N x C x itemsize, are written to OUT/measurements.jsonl. The output
of ncu is written to OUT/ncu-SIZE.csv. Requires kernels and bench/gpu on PYTHONPATH.

ncu empties the caches only before each pass, so the last writes of a kernel can stay in L2. At
small sizes, ncu therefore counts few written bytes.
"""

import argparse
import csv
import glob
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from measurements import Log

TIME = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
BASIC = (TIME, READ, WRITTEN)
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = (
    *BASIC,
    "lts__t_sector_hit_rate.pct",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    STALLED.format("barrier"),
    STALLED.format("long_scoreboard"),
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
RECORD = 96  # bytes per row: statistics and state
LONGEST = 22.0  # seconds for one size: import of torch, compilation (if not cached), replays
# ncu scales units unless --print-units is base. These are its prefixes and units of time.
SCALES = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SECONDS = {"nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3,
           "second": 1.0, "s": 1.0}  # fmt: skip


class Size(NamedTuple):
    rows: int
    classes: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.rows} x {self.classes} {self.dtype}"

    @property
    def unit(self) -> int:
        return self.rows * self.classes * ITEMSIZE[self.dtype]


SIZES = [Size(rows, classes, dtype) for dtype in ("bf16", "fp32")
         for rows, classes in ((4096, 1000), (8192, 32000), (8192, 128256))]  # fmt: skip


def base_value(text: str, unit: str) -> tuple[float, str]:
    """Return a value and its unit without prefixes: bytes, seconds, percent or plain numbers."""
    value = float(text.replace(",", ""))
    if unit in SECONDS:
        return value * SECONDS[unit], "s"
    if unit[1:] == "byte" and unit[0] in SCALES:
        return value * SCALES[unit[0]], "bytes"
    return value, {"byte": "bytes", "": ""}.get(unit, unit)


def parse(text: str) -> list[dict[str, Any]]:
    """Return the kernels in ncu's CSV: names, and metrics as (value, unit) in base units.

    Reads the raw page (a column per metric, units in the row below the header) and the details page
    (a row per metric). Lines before the header and ncu's own lines (``==PROF==``) are ignored.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    header, *rows = csv.reader(lines[begin:])
    kernels: dict[str, dict[str, Any]] = {}
    units = dict(zip(header, rows[0], strict=False)) if rows and not rows[0][0] else {}
    for row in rows:
        values = dict(zip(header, row, strict=False))
        if not values.get("ID"):
            continue
        kernel = kernels.setdefault(values["ID"], {"name": values["Kernel Name"], "metrics": {}})
        if "Metric Name" in values:
            found = [(values["Metric Name"], values["Metric Value"], values["Metric Unit"])]
        else:
            found = [(name, values.get(name, ""), units.get(name, "")) for name in METRICS]
        for name, value, unit in found:
            try:
                kernel["metrics"][name] = base_value(value, unit)
            except ValueError:  # empty, "n/a" or "nan (...)": the counter does not exist here
                continue
    return list(kernels.values())


def predicted_reads(size: Size, device: dict[str, Any]) -> int:
    """Return the predicted number of units that are read: 4 if the rows that are processed at the
    same time exceed L2. Each multiprocessor processes one row of both networks at a time. See
    docs/explanation/triton-kernel.md.
    """
    in_flight = device["multiprocessors"] * 2 * size.classes * ITEMSIZE[size.dtype]
    return 4 if device["launch"].startswith("Loop") and in_flight > device["l2"] else 2


def report(log: Log, size: Size, text: str) -> bool:
    """Log the counters in ncu's output for one size. Return whether it contains a kernel."""
    kernels = [kernel for kernel in parse(text) if kernel["metrics"]]
    if not kernels:
        return False
    device = {"multiprocessors": 132, "l2": 50 * 2**20, "launch": "unknown"}
    for line in text.splitlines():
        if line.startswith("device {"):
            device = json.loads(line.removeprefix("device "))

    def seconds(kernel: dict[str, Any]) -> float:
        return kernel["metrics"].get(TIME, (0.0, ""))[0]

    main = max(kernels, key=seconds)  # the row kernel, whatever its name is
    for kernel in kernels:
        if kernel is not main:
            log.add("counter", TIME, 1e6 * seconds(kernel), "us", size=str(size),
                    kernel=kernel["name"])  # fmt: skip
    metrics, details = main["metrics"], {"size": str(size), "kernel": main["name"]}
    log.add("counter", "launch", device["launch"], l2=device["l2"], **details)
    for name in METRICS:
        if name not in metrics:
            log.add("skipped", name, "not in ncu's output", **details)
            continue
        value, unit = (1e6 * metrics[name][0], "us") if name == TIME else metrics[name]
        log.add("counter", name, value, unit, **details)
    records = size.rows * RECORD / size.unit
    for name, units, more in ((READ, predicted_reads(size, device), 0.0), (WRITTEN, 2, records)):
        if name in metrics:
            log.add("counter", f"{name}, units", metrics[name][0] / size.unit, "N x C", **details,
                    predicted=units + more)  # fmt: skip
    if READ in metrics and WRITTEN in metrics and seconds(main):
        moved = metrics[READ][0] + metrics[WRITTEN][0]
        log.add("counter", "DRAM throughput", moved / seconds(main) / 1e9, "GB/s", **details)
    return True


def find_ncu() -> str | None:
    places = ("/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/bin/ncu")
    found = [path for place in places for path in sorted(glob.glob(place))]
    return shutil.which("ncu") or (found[-1] if found else None)


def profile(ncu: str, size: Size, out: Path, metrics: tuple[str, ...], limit: float, launch: str):
    """Run one size under ncu. Return its output and exit code (None if the time was over)."""
    path = out / f"ncu-{size.rows}x{size.classes}-{size.dtype}.csv"
    command = [
        ncu, "--clock-control", "none", "--target-processes", "all", "--profile-from-start", "off",
        "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(metrics),
        sys.executable, __file__, str(out), "--child", json.dumps(size), "--launch", launch,
    ]  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # ncu and the program that it runs
            process.wait()
            code = None
    return path.read_text("utf-8", errors="replace"), code


def main(options: argparse.Namespace) -> int:
    log = Log(options.out, "3 counters" + ", dry run" * options.dry_run)
    until = log.start + options.seconds
    if options.dry_run:
        return dry_run(log)
    ncu = find_ncu()
    if ncu is None:
        log.add("failed", "ncu", "not found")
        return 1
    failed = 0
    for size in SIZES:
        metrics, left = METRICS, until - time.monotonic()
        for _ in range(2):  # if it fails, try once more with only the basic metrics
            if left < 8:
                log.add("skipped", f"counters of {size}", f"{left:.0f} s left")
                break
            try:
                limit = min(LONGEST, left - 1)
                text, code = profile(ncu, size, options.out, metrics, limit, options.launch)
                if report(log, size, text):
                    break
            except Exception as error:
                traceback.print_exc()
                text, code = f"{type(error).__name__}: {error}", 1
            reason = [line for line in text.splitlines() if "ERROR" in line or "Error" in line]
            log.add("failed", f"counters of {size}", (reason or ["no kernel in ncu's output"])[0],
                    exit_code=code, metrics=len(metrics))  # fmt: skip
            print(text[-2000:], flush=True)
            failed += 1
            metrics, left = BASIC, until - time.monotonic()
            if code is None:  # it was too slow: continue with the next size
                break
    return 1 if failed else 0


def child(size: Size, launch: str) -> None:
    """Call the loss three times on one size; the third call is profiled."""
    import torch
    from bdkd_kernels import bdkd_loss_and_grad
    from bdkd_kernels.triton import launch_table

    choose, chosen = launch_table.choose, []
    fields = json.loads(launch) if launch else {}
    kind = launch_table.Tile if "rows" in fields else launch_table.Loop

    def choose_and_note(*arguments: Any, **options: Any) -> Any:
        chosen.append(kind(**fields) if fields else choose(*arguments, **options))
        return chosen[-1]

    launch_table.choose = choose_and_note
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[size.dtype]
    torch.manual_seed(0)
    s, t = (torch.empty(size.rows, size.classes, device="cuda", dtype=dtype).normal_(0.0, 2.0)
            for _ in range(2))  # fmt: skip
    y = torch.randint(size.classes, (size.rows,), device="cuda")
    grads = (torch.empty_like(s), torch.empty_like(t))

    def call() -> None:
        bdkd_loss_and_grad(s, t, y, temperature=4.0, grads=grads, backend="triton")
        torch.cuda.synchronize()

    call()
    call()
    device = torch.cuda.get_device_properties(0)
    values = {"multiprocessors": device.multi_processor_count, "l2": device.L2_cache_size,
              "launch": repr(chosen[-1]) if chosen else "unknown"}  # fmt: skip
    print("device", json.dumps(values), flush=True)
    torch.cuda.profiler.start()
    call()
    torch.cuda.profiler.stop()


SAMPLE = """==PROF== Connected to process 4321 (/usr/bin/python3.12)
device {"multiprocessors": 132, "l2": 52428800, "launch": "Loop(warps=16, inner=8)"}
==PROF== Profiling "totals_kernel" - 0: 0%....50%....100% - 3 passes
==PROF== Profiling "loop_kernel" - 1: 0%....50%....100% - 3 passes
==PROF== Disconnected from process 4321
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC",METRICS
"","","","","","","","","","","",UNITS
"0","4321","python3.12","127.0.0.1","totals_kernel","1","7","(128, 1, 1)","(2, 1, 1)","0","9.0",\
"4,512","65,536","0","12.5","0.4","0","31.2","6.2","32"
"1","4321","python3.12","127.0.0.1","loop_kernel","1","7","(512, 1, 1)","(8192, 1, 1)","0","9.0",\
"1,520,000","1,075,000,000","1,049,362,432","49.8","71.25","1.75","3.5","24.9","n/a"
"""


def dry_run(log: Log) -> int:
    """Parse samples of ncu's output with base units and with scaled units. Needs no GPU."""
    names = ",".join(f'"{name}"' for name in METRICS)
    size = Size(8192, 32000, "bf16")
    for scaled in (False, True):
        units = ["nsecond", "byte", "byte", "%", "%", "inst", "inst", "%", "register/thread"]
        text = SAMPLE.replace("METRICS", names)
        if scaled:
            units[:3] = ["us", "Gbyte", "Mbyte"]
            for old, new in (("1,520,000", "1,520.00"), ("1,075,000,000", "1.075"),
                             ("1,049,362,432", "1,049.362432"), ("4,512", "4.51"),
                             ("65,536", "0.000066")):  # fmt: skip
                text = text.replace(old, new)
        text = text.replace("UNITS", ",".join(f'"{unit}"' for unit in units))
        assert report(log, size, text)
        kernel = parse(text)[1]
        assert kernel["name"] == "loop_kernel"
        assert "launch__registers_per_thread" not in kernel["metrics"]  # "n/a"
        for name, right in zip(BASIC, (0.00152, 1075e6, 1049362432.0), strict=True):
            assert math.isclose(kernel["metrics"][name][0], right, rel_tol=1e-12), name
    details = (
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        f'"0","loop_kernel","{TIME}","usecond","1,520.00"\n'
        f'"0","loop_kernel","{READ}","Mbyte","1,075.00"\n'
    )
    metrics = parse(details)[0]["metrics"]
    assert math.isclose(metrics[TIME][0], 1520e-6)
    assert metrics[READ] == (1075e6, "bytes")
    assert parse("==ERROR== ERR_NVGPUCTRPERM") == []
    assert not report(log, size, "==ERROR== no kernels were profiled")
    device = {"multiprocessors": 132, "l2": 50 * 2**20, "launch": "Loop(...)"}
    assert [predicted_reads(x, device) for x in SIZES] == [2, 2, 4, 2, 2, 4]
    log.add("check", "counters, dry run", "ok")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit")
    parser.add_argument("--dry-run", action="store_true", help="parse a sample, without a GPU")
    parser.add_argument("--launch", default="", help="fields of a Loop or Tile to use, as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is None:
        sys.exit(main(given))
    child(Size(*json.loads(given.child)), given.launch)
