"""Draw the race of a GPU run, and print it as a Markdown table.

python bench/gpu/figure.py FOLDER     # reads FOLDER/measurements.jsonl, writes FOLDER/race.png
python bench/gpu/figure.py FOLDER --compare stage1.jsonl    # print ratios to another run's times
"""

import argparse
import json
from pathlib import Path
from typing import Any

from measurements import read

OURS = "bdkd_loss_and_grad"
SHORTEST_BY_EVENTS = 2000.0  # us
# Name in the records, in the legend, colour and marker.
SHOWN = (
    (OURS, "bdkd_loss_and_grad", "#0072B2", "o"),
    ("torch.compile", "torch.compile, its fastest mode", "#D55E00", "s"),
    ("Liger JSD", "Liger JSD (one divergence)", "#CC79A7", "^"),
    ("eager", "eager PyTorch", "#666666", "D"),
)


def table(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the records of the race by size, then by name."""
    sizes: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        if record["what"] != "time" or record.get("l2") != "flushed" or "of_copy" not in record:
            continue
        # No CUDA graph could capture these calls. For short calls, the time is that of the host.
        if record.get("by") == "graph" or record["value"] > SHORTEST_BY_EVENTS:
            sizes.setdefault(record["size"], {})[record["name"]] = record
    for rows in sizes.values():
        modes = [row for name, row in rows.items() if name.startswith("torch.compile ")]
        if modes:
            rows["torch.compile"] = min(modes, key=lambda row: row["value"])
    return {size: sizes[size] for size in sorted(sizes, key=order) if OURS in sizes[size]}


def order(size: str) -> tuple[str, int, int]:
    rows, _, classes, dtype = size.split()
    return dtype, int(classes), int(rows)


def markdown(sizes: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = ["| rows x classes | time | share of a copy | torch.compile | eager | Liger JSD |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for size, rows in sizes.items():
        ours = rows[OURS]
        times = [f"{rows[name]['value'] / ours['value']:.1f}x" if name in rows else "-"
                 for name, *_ in (SHOWN[1], SHOWN[3], SHOWN[2])]  # fmt: skip
        lines.append(f"| {size} | {ours['value']:,.1f} us | {ours['of_copy']:.0%} | "
                     f"{' | '.join(times)} |")  # fmt: skip
    return "\n".join(lines)


def compare(sizes: dict[str, dict[str, dict[str, Any]]], others: list[dict[str, Any]]) -> str:
    """Return the smallest and the largest ratio of our times in ``others`` to our times in
    ``sizes``."""
    times = {size: rows[OURS]["value"] for size, rows in table(others).items()}
    ratios = [time / sizes[size][OURS]["value"] for size, time in times.items()]
    return f"between {min(ratios):.2f} and {max(ratios):.2f} times"


def copy_time(ours: dict[str, Any]) -> float:
    return ours["value"] * ours["of_copy"]


def draw(sizes: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 3.6), sharey=True, layout="constrained")
    for axis, dtype in zip(axes, ("bf16", "fp32"), strict=True):
        its = [size for size in sizes if size.endswith(dtype)]
        axis.axhline(1.0, color="black", linewidth=1, label="copy of the same bytes")
        for name, label, colour, marker in SHOWN:
            points = [(i, sizes[size][name]["value"] / copy_time(sizes[size][OURS]))
                      for i, size in enumerate(its) if name in sizes[size]]  # fmt: skip
            if points:
                axis.plot(*zip(*points, strict=True), marker, color=colour, label=label)
        axis.set_xticks(range(len(its)), [size.rsplit(" ", 1)[0].replace(" x ", "\nx ")
                                          for size in its], fontsize=8)  # fmt: skip
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(dtype, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("time / time of the copy")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the results of a run")
    parser.add_argument("--compare", type=Path, help="records of another run to compare with")
    given = parser.parse_args()
    folder, sizes = given.folder, table(read(given.folder))
    if given.compare is not None:
        print(compare(sizes, [json.loads(line) for line in given.compare.open()]))
        return
    print(markdown(sizes))
    draw(sizes, folder / "race.png")


if __name__ == "__main__":
    main()
