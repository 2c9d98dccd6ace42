"""``bdkd benchmark FILE...``: measure the latency, memory and size of exported files."""

import math
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from bdkd.cli.flags import parse
from bdkd.cli.help import asks_for_help
from bdkd.cli.table import printable, table
from bdkd.config import Bounds
from bdkd.errors import RunError, UsageError

if TYPE_CHECKING:
    from bdkd.export.latency import Measurement
    from bdkd.export.runnable import Runnable

WIDTH = 80
MIN_NAME = 12  # columns for the name of a file
Threads = Annotated[int, Bounds(ge=1, le=1024)]
Batch = Annotated[int, Bounds(ge=1, le=2**20)]


@dataclass(frozen=True)
class Arguments:
    """Measure the latency, peak memory and size of exported files on the CPU (GPUs are not
    supported): .onnx files of bdkd or of other programs with onnxruntime, .pt2 and .safetensors
    files of bdkd with torch.

    Each file runs in a separate process on random images. The files take turns: in every round,
    each file runs a few times, and its last inference is timed. All processes are started 5 times.
    The ratio of a file to the first file is computed for each start, as the median over rounds of
    the ratio of their times in the same round. The table shows the geometric mean over starts and
    Student's 95% interval. Peak memory is the resident memory of a process. For an ONNX file, the
    process imports only onnxruntime and NumPy."""

    files: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE [FILE ...]")
    ]
    """Exported files: .onnx, .pt2 or .safetensors. Ratios are relative to the first file."""
    threads: tuple[Threads, ...] = (1,)
    """Numbers of threads that one inference uses."""
    batch: tuple[Batch, ...] = (1,)
    """Numbers of images in one inference. Every number is measured with every number of threads."""
    rounds: Annotated[int, Bounds(ge=20, le=100_000)] = 200
    """Number of timed inferences of each file, over all starts. The median and the 95th percentile
    are computed from these times."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of tables."""


def run(given: list[str]) -> None:
    """Measure the files, and print the results."""
    # tyro's help leaves out arguments that were given.
    given = ["--help"] if asks_for_help(given) else given
    arguments = parse(Arguments, "bdkd benchmark", given)
    check_arguments(arguments)
    load = os.getloadavg()[0]  # before the files are checked, which takes seconds

    from bdkd.export.latency import STARTS, measure
    from bdkd.export.runnable import read_runnable
    from bdkd.runs.folder import to_json
    from bdkd.runs.plan import plural

    files = [read_runnable(path) for path in arguments.files]
    for file in files:
        for batch in arguments.batch:
            check_batch(file, batch)
    machine = describe_machine(files, load)
    warn_of_load(machine, arguments.threads)
    settings = [
        (threads, batch)
        for threads in dict.fromkeys(arguments.threads)
        for batch in dict.fromkeys(arguments.batch)
    ]
    rounds = math.ceil(arguments.rounds / STARTS)  # of each start
    results, failures = [], []
    for number, (threads, batch) in enumerate(settings, 1):
        what = f"{plural(len(files), 'file')}, {plural(threads, 'thread')}, batch {batch}"
        print(f"timing {what} ({number} of {len(settings)})", file=sys.stderr, flush=True)
        measured = measure(files, threads, batch, rounds)
        failures += [m.failure for m in measured if m.failure is not None]
        rows = describe_measurements(files, batch, measured)
        results.append({"threads": threads, "batch": batch, "files": rows})
    summary = {
        **machine, "starts": STARTS, "rounds": STARTS * rounds,
        "files": [describe_file(file) for file in files], "settings": results,
    }  # fmt: skip
    if len(failures) < len(files) * len(settings):
        print(to_json(summary, indent=2) if arguments.json else describe(summary))
    if failures:
        others = f" (and {plural(len(failures) - 1, 'other failure')})" if failures[1:] else ""
        raise RunError(f"{failures[0]}{others}")


def check_arguments(arguments: Arguments) -> None:
    """Check the arguments without reading the files. Raise ``UsageError`` if one is wrong."""
    from bdkd.export.formats import FORMATS, is_exported

    for path in arguments.files:
        if not is_exported(path):
            suffixes = ", ".join(known.suffix for known in FORMATS.values())
            raise UsageError(
                f"{path} is not an exported file ({suffixes}): benchmark takes exported files, or "
                "one recipe as its first argument"
            )
    for name in ("threads", "batch"):
        if not getattr(arguments, name):
            raise UsageError(f"--{name} needs a value: integers, at least 1")


def check_batch(file: "Runnable", batch: int) -> None:
    """Raise ``UsageError`` if a file does not support a batch size, or if a batch of its images
    needs too much memory."""
    from bdkd.export.facts import memory_limit

    if file.batch not in (None, batch):
        raise UsageError(
            f"--batch {batch}: {file.path} takes batches of {file.batch} only: pass --batch "
            f"{file.batch}, or export it with a dynamic batch size"
        )
    size = 4 * batch * math.prod(file.shape)
    if size > memory_limit():
        limit = f"the limit on this machine is {memory_limit():,}"
        raise UsageError(
            f"--batch {batch}: images for {file.path} need {size:,} bytes, and {limit}"
        )


def describe_machine(files: Sequence["Runnable"], load: float) -> dict[str, Any]:
    """Return the processor and the versions that the results depend on."""
    import torch

    from bdkd.device import processor
    from bdkd.export.onnx_session import require
    from bdkd.extras import bdkd_version

    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    onnx = any(file.format == "onnx" for file in files)
    return {
        "processor": {
            **processor()._asdict(),
            "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
            "load": load,
        },
        "versions": {
            "bdkd": bdkd_version(),
            "onnxruntime": require("onnxruntime").__version__ if onnx else None,
            "torch": str(torch.__version__),
        },
    }  # fmt: skip


def warn_of_load(machine: Mapping[str, Any], threads: Sequence[int]) -> None:
    """Print a warning if there are too few free cores."""
    cores, load = machine["processor"]["cores"], machine["processor"]["load"]
    most = max(threads)
    if most > cores:
        found = f"--threads {most} is more than the {cores} cores of this process"
        print(f"warning: {found}: threads wait for each other", file=sys.stderr)
    # The load average still includes a command that has just ended.
    elif load > max(cores - most, 0.5):
        found = f"the load average is {load:.1f}, and the files need {most} of {cores} cores"
        remedy = "other programs may slow them down; repeat this on an idle machine"
        print(f"warning: {found}: {remedy}", file=sys.stderr)


def describe_file(file: "Runnable") -> dict[str, Any]:
    return {
        "file": str(file.path), "format": file.format, "precision": file.precision,
        "bytes": file.size, "image_shape": list(file.shape),
        "model": file.facts.model if file.facts else None,
    }  # fmt: skip


def describe_measurements(
    files: Sequence["Runnable"], batch: int, measured: Sequence["Measurement"]
) -> list[dict[str, Any]]:
    """Return the results of one setting: quantiles, ratios to the first file, and memory."""
    import numpy as np

    from bdkd.export.latency import ratio_of

    quantiles = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
    rows = []
    for number, (file, one) in enumerate(zip(files, measured, strict=True)):
        row: dict[str, Any] = dict.fromkeys(("ms", "images_per_second", "ratio", "memory"))
        if one.times is not None:
            ms = np.quantile(1000 * one.times, list(quantiles.values())).tolist()
            row["ms"] = dict(zip(quantiles, ms, strict=True))
            row["images_per_second"] = 1000 * batch / row["ms"]["median"]
            first = measured[0].times
            if number > 0 and first is not None:
                row["ratio"] = ratio_of(one.times, first)._asdict()
            row["memory"] = {"peak_bytes": one.peak_bytes, "runtime_bytes": one.runtime_bytes}
        rows.append({"file": str(file.path), **row, "failure": one.failure})
    return rows


def describe(summary: Mapping[str, Any]) -> str:
    """Return the results as tables."""
    from bdkd.runs.plan import plural

    processor, versions = summary["processor"], summary["versions"]
    vnni = {True: ", VNNI", False: ", no VNNI (slow int8)", None: ""}[processor["vnni"]]
    machine = (
        f"{processor['name']}{vnni}, {plural(processor['cores'], 'core')}, load "
        f"{processor['load']:.1f} at the start; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    )
    paths = [file["file"] for file in summary["files"]]
    listed = [
        [file["precision"], _size(file["bytes"]), "x".join(map(str, file["image_shape"]))]
        for file in summary["files"]
    ]
    medians = [row["ms"]["median"] for s in summary["settings"] for row in s["files"] if row["ms"]]
    unit, scale = ("µs", 1000.0) if max(medians) < 1 else ("ms", 1.0)
    parts = [
        textwrap.fill(machine, WIDTH),
        _file_table(paths, ["precision", "size", "image"], listed),
    ]
    header = [f"median {unit}", "p95", "images/s", "ratio", "peak MiB"]
    for setting in summary["settings"]:
        cells = [_cells(row, scale, k == 0) for k, row in enumerate(setting["files"])]
        title = f"{plural(setting['threads'], 'thread')}, batch {setting['batch']:,}"
        parts.append(f"{title}\n{_file_table(paths, header, cells)}")
    caption = (
        f"{summary['rounds']} rounds in {summary['starts']} starts, files interleaved. ratio: time "
        "divided by the time of the first file in the same round [95% interval over starts]. peak "
        "MiB: peak memory of a process that runs only this file (+ the part that the runtime alone "
        "does not use)."
    )
    return "\n\n".join([*parts, textwrap.fill(caption, WIDTH)])


def _file_table(paths: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column has the names of files. It takes the width that is left."""
    without = table(["", *header], [["", *row] for row in rows])
    width = WIDTH - max(map(len, without.splitlines()))
    names = short_names(paths, max(MIN_NAME, width))
    lines = [[name, *row] for name, row in zip(names, rows, strict=True)]
    return table(["file", *header], lines)


def _cells(row: Mapping[str, Any], scale: float, is_first: bool) -> list[str]:
    from bdkd.runs.plan import rate

    if row["ms"] is None:
        return ["failed", *"----"]
    ratio, memory = row["ratio"], row["memory"]
    shown = "1" if is_first else "-"
    if ratio is not None:
        shown = f"{_ratio(ratio['value'])} [{_ratio(ratio['low'])}, {_ratio(ratio['high'])}]"
    peak, runtime = memory["peak_bytes"] / 2**20, memory["runtime_bytes"] / 2**20
    return [
        _time(scale * row["ms"]["median"]), _time(scale * row["ms"]["p95"]),
        rate(row["images_per_second"]), shown, f"{peak:,.0f} (+{peak - runtime:,.0f})",
    ]  # fmt: skip


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _time(value: float) -> str:
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def _size(count: int) -> str:
    from bdkd.runs.plan import binary_size

    if count >= 2**20:
        return binary_size(count)
    return f"{count / 1024:,.0f} KiB" if count >= 1024 else f"{count} B"


def short_names(paths: Sequence[str], width: int) -> list[str]:
    """Return a distinct name for each file, without the folders that all files have in common. If a
    name is longer than ``width``, dots replace characters in the middle, first those of folders."""
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names = [printable(os.path.relpath(path, common)) for path in absolute]
    short = [_shortened(name, width) for name in names]
    if len(set(short)) == len(short):
        return short
    return [_shortened(f"{number} {name}", width) for number, name in enumerate(names, 1)]


def _shortened(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    head = max(width // 4, width - 3 - len(os.path.basename(name)))
    return f"{name[:head]}...{name[head + 3 - width :]}"
