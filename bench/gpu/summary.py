"""Summarise the measurements of a GPU session.

    python bench/gpu/summary.py OUT

Reads OUT/measurements.jsonl. Writes summary.txt, measurements.csv and results.json to OUT.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

from measurements import read

Record = dict[str, Any]
ROW = "{:42.42} {:>11} {:>8} {:>8} {:>9} {:8} {}"
TARGETS = """Targets: bdkd_loss_and_grad at 90% of the copy in fp32 and 80% in bf16 at 4096 x 1000
and 8192 x 32000, 60% at 8192 x 128256; 7 us at 1024 x 1000; 2x as fast as the best torch.compile
mode; 3x as fast as each other package; trainer: 1.3x the images/s of a plain loop of the same two
networks, 0.97 of the time of both networks alone."""
EXPLANATION = """of copy: time of a copy of both logits into both gradients (the fewest bytes that
the loss can move), divided by the time, in the same rounds. x ours: time divided by the time of
bdkd_loss with backward. error: largest error of a gradient against float64, divided by its largest
entry. flushed: the data of each call was not in L2. hot: it was in L2. Times are GPU times of CUDA
graph replays, unless a row says host (host time) or events (calls between two events, which take
the host's time if it is longer)."""
WANTED = ("4096 x 1000 bf16", "8192 x 32000 bf16", "1024 x 1000 bf16", "8192 x 128256 bf16",
          "4096 x 21841 bf16", "4096 x 1000 fp32", "8192 x 32000 fp32", "1024 x 1000 fp32",
          "8192 x 128256 fp32", "4096 x 21841 fp32")  # fmt: skip


def short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return str(value)


def percent(value: Any) -> str:
    return f"{100 * value:.0f}%" if isinstance(value, int | float) else "-"


def number(value: Any, pattern: str) -> str:
    return pattern.format(value) if isinstance(value, int | float) else "-"


def machine_lines(records: list[Record]) -> list[str]:
    """Return the lines about the machine, its clocks and the checks."""
    facts: dict[str, str] = {}
    for r in records:
        if r["what"] == "machine":
            facts[r["name"]] = f"{short(r['value'])} {r['unit']}".strip()
    lines = ["; ".join(f"{name} {value}" for name, value in facts.items())]
    lines += [f"clock ({r['name']}): {r['value']}" for r in records if r["what"] == "clock"]
    checks = [r for r in records if r["what"] == "check"]
    cache = [r["value"] for r in checks if r["name"] == "triton cache"]
    lines += [f"triton cache: {value}" for value in cache[-1:]]
    checks = [r for r in checks if r["name"] != "triton cache"]
    wrong = [r for r in checks if r["value"] != "ok"]
    lines.append(f"checks: {len(checks) - len(wrong)} of {len(checks)} are ok")
    lines += [f"  {r['stage']}, {r['name']} {r.get('size', '')}: {r['value']}" for r in wrong]
    return lines


def size_order(size: str) -> tuple[int, str]:
    return (WANTED.index(size) if size in WANTED else len(WANTED), size)


def times_of(size: str, records: list[Record]) -> list[str]:
    """Return the table of GPU times of one size. Of the launch variants, it shows the fastest."""
    mine = [r for r in records if r.get("size") == size]
    errors = {r["name"]: r["value"] for r in mine if r["what"] == "error"}
    times = [r for r in mine if r["what"] == "time" and r["unit"] == "us"]
    if not times:
        return []
    variants = [r for r in times if r["name"].startswith("variant ")]
    tuned = [r for r in times if r["name"].startswith("launch ")]
    lines = ["", size, ROW.format("", "time", "of copy", "x ours", "error", "L2", "")]
    for r in times:
        if r in variants or r in tuned:
            continue
        notes = [str(r["note"])] if r.get("note") else []
        notes += [r["by"]] if r.get("by") not in (None, "graph", "wall") else []
        lines.append(row(r, errors.get(r["name"]), "; ".join(notes)))
    for found, title in ((variants, "launch variants"), (tuned, "search for launch parameters")):
        if found:
            found.sort(key=lambda r: r["value"])
            lines.append(f"  {title}, the fastest of {len(found)}:")
            best = found[:4] + [r for r in found[4:] if "as shipped" in r["name"]]
            lines += [row(r, None, "WRONG" if r.get("wrong") else "") for r in best]
    return lines


def row(r: Record, error: float | None, note: str) -> str:
    return ROW.format(
        r["name"], f"{r['value']:,.1f} us", percent(r.get("of_copy")),
        number(r.get("ratio"), "{:.2f}"), number(r.get("error", error), "{:.1e}"),
        r.get("l2", "-"), note,
    ).rstrip()  # fmt: skip


COUNTERS = {
    "dram__bytes_read.sum, units": "units read",
    "dram__bytes_write.sum, units": "units written",
    "DRAM throughput": "DRAM throughput",
    "gpu__time_duration.sum": "time",
    "lts__t_sector_hit_rate.pct": "L2 hits",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots used",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "warps at barriers",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "warps at loads",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active",
    "launch__registers_per_thread": "registers",
    "launch": "launch",
}


def counter_lines(records: list[Record]) -> list[str]:
    """Return the counters of the row kernel at each size, with predicted bytes."""
    lines: list[str] = []
    counters = [r for r in records if r["what"] == "counter"]
    for size in dict.fromkeys(r.get("size", "") for r in counters):
        found = {r["name"]: r for r in counters if r.get("size", "") == size}
        parts = []
        for name, title in COUNTERS.items():
            if name in found:
                r = found[name]
                unit = "" if r["unit"] == "N x C" else r["unit"]
                predicted = f" (predicted {r['predicted']:.2f})" if "predicted" in r else ""
                parts.append(f"{title} {short(r['value'])} {unit}".strip() + predicted)
        lines.append(f"  {size}: " + "; ".join(parts))
    if lines:
        title = "Hardware counters (a unit is N x C logits; at least 2 are read and 2 written)"
        lines.insert(0, f"\n{title}")
    return lines


def other_lines(records: list[Record]) -> list[str]:
    """Return the measurements in other units (the trainer), and the ratios."""
    lines = []
    for r in records:
        if (r["what"] == "time" and r["unit"] != "us") or r["what"] == "ratio":
            skipped = ("stage", "second", "what", "name", "value", "unit", "size")
            details = {k: v for k, v in r.items() if k not in skipped and v != ""}
            more = ", ".join(f"{k} {short(v)}" for k, v in details.items())
            lines.append(f"  {r['name']} {r.get('size', '')}: {short(r['value'])} {r['unit']} "
                         f"{f'({more})' if more else ''}"[:220].rstrip())  # fmt: skip
    return ["\nTraining step", *lines] if lines else []


def missing_lines(records: list[Record]) -> list[str]:
    """Return the measurements that were skipped or failed."""
    lines = []
    for what in ("failed", "skipped"):
        found = [r for r in records if r["what"] == what]
        if found:
            lines.append(f"\n{what.capitalize()} ({len(found)})")
            lines += [f"  {r['stage']}, {r['name']} {r.get('size', '')}: {r['value']}"[:170]
                      for r in found[:25]]  # fmt: skip
    return lines


def verdicts(records: list[Record]) -> list[str]:
    """Return the targets that were measured, and whether each is met."""
    lines = []

    def ours(size: str, l2: str = "flushed") -> Record | None:
        found = [r for r in records if r["what"] == "time" and r.get("size") == size
                 and r["name"] == "bdkd_loss_and_grad" and r.get("l2") == l2]  # fmt: skip
        return found[0] if found else None

    def verdict(met: bool, text: str) -> None:
        lines.append(f"  {'met   ' if met else 'MISSED'} {text}")

    for dtype in ("bf16", "fp32"):
        for size, share in ((f"4096 x 1000 {dtype}", 0.9 if dtype == "fp32" else 0.8),
                            (f"8192 x 32000 {dtype}", 0.9 if dtype == "fp32" else 0.8),
                            (f"8192 x 128256 {dtype}", 0.6)):  # fmt: skip
            r = ours(size)
            if r is not None:
                text = f"{percent(r['of_copy'])} of copy, target {percent(share)}"
                verdict(r["of_copy"] >= share, f"{size}: {text}")
        for l2 in ("hot", "flushed"):
            r = ours(f"1024 x 1000 {dtype}", l2)
            if r is not None:
                text = f"{r['value']:.1f} us with L2 {l2}, target 7 us"
                verdict(r["value"] <= 7, f"1024 x 1000 {dtype}: {text}")
    for size in WANTED:
        compiled = [r["ratio"] for r in records if r.get("size") == size and "ratio" in r
                    and r["what"] == "time" and r["name"].startswith("torch.compile")]  # fmt: skip
        if compiled:
            verdict(min(compiled) >= 2, f"{size}: {min(compiled):.2f}x torch.compile, target 2x")
        for r in records:
            if r.get("size") == size and r["what"] == "time" and r["name"].startswith("Liger"):
                verdict(r["ratio"] >= 3, f"{size}: {r['ratio']:.2f}x {r['name']}, target 3x")
    return ["\nTargets", *lines] if lines else []


def summary(records: list[Record]) -> str:
    lines = ["Fused Triton loss of online knowledge distillation (BD-KD): student's and teacher's "
             "losses and both gradients, on one GPU.", "", *machine_lines(records)]  # fmt: skip
    lines += ["", EXPLANATION]
    sizes = {r["size"] for r in records if r["what"] == "time" and r.get("size")}
    for size in sorted(sizes, key=size_order):
        lines += times_of(size, records)
    lines += counter_lines(records) + other_lines(records)
    lines += missing_lines(records)
    lines += ["", TARGETS, *verdicts(records)]
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    records = read(folder)
    text = summary(records)
    (folder / "summary.txt").write_text(text, "utf-8")
    columns = list(dict.fromkeys(key for r in records for key in r))
    with (folder / "measurements.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)
    machine = {r["name"]: r["value"] for r in records if r["what"] == "machine"}
    (folder / "results.json").write_text(
        json.dumps({"machine": machine, "records": records}, indent=1), "utf-8"
    )
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
