"""Measure the error of every implementation of the loss against float64, over all kinds of logits.

    python bench/accuracy.py [--out FOLDER] [--verbose] [--interpret] [--quick]

The logits range from flat to extremely peaked, and the two networks from nearly equal to disjoint,
in every storage type. Both losses of every sample and both gradients are compared. An error is
divided by the error that the kernels' tests allow for the same inputs, so the limit is 1. The exit
code is 0 if every error of our implementations is at most 1, or at most twice the error of the best
other implementation, and 1 if not.

gamma is 1, because implementations may weight a sample differently if its two entropies differ by
less than rounding, which is not an error. If there is no GPU, ``--interpret`` runs the Triton
kernel in Triton's interpreter. The interpreter is slow, so it runs on few classes.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

import torch  # noqa: E402
from bdkd_kernels import available_backends, bdkd_loss  # noqa: E402
from torch import Tensor  # noqa: E402

sys.path.insert(0, str(ROOT / "tests" / "kernels"))
import cases as judge  # noqa: E402
import machine  # noqa: E402
import results  # noqa: E402
from losses import plain_rows  # noqa: E402
from progress import Progress  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "fp64": torch.float64}  # fmt: skip
SPREADS = (0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0, 10_000.0)  # of the logits
RELATIONS = ("equal to 1e-6", "equal to 1e-3", "equal to 0.1", "related", "independent", "disjoint")
CLASSES = (10, 1000, 32_768)
TEMPERATURES = (1.0, 4.0)

Rows = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class Cell(NamedTuple):
    dtype: str
    relation: str
    spread: float
    classes: int
    temperature: float

    def __str__(self) -> str:
        return (
            f"{self.dtype}, {self.relation}, spread {self.spread:g}, {self.classes} classes, "
            f"temperature {self.temperature:g}"
        )


def draw(cell: Cell, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of student and teacher, rounded to the storage type, and labels."""
    rows = max(4, min(32, 2**15 // cell.classes))
    rng = torch.Generator().manual_seed(hash(cell[2:]) % 2**31)
    a, b = torch.randn(2, rows, cell.classes, generator=rng, dtype=torch.float64)
    if cell.relation.startswith("equal"):
        t = a + float(cell.relation.split()[-1]) * b / cell.spread
    elif cell.relation == "related":
        t = 0.5 * a + b
    elif cell.relation == "independent":
        t = b
    else:  # the two networks give probability to different classes
        half = torch.arange(cell.classes) < cell.classes // 2
        a, t = a + 3.0 * half, b + 3.0 * ~half
    dtype = DTYPES[cell.dtype]
    s, t = ((cell.spread * x).clamp(-1e4, 1e4) for x in (a, t))
    y = torch.randint(cell.classes, (rows,), generator=rng)
    return s.to(dtype).to(device), t.to(dtype).to(device), y.to(device)


def ours(backend: str) -> Rows:
    def rows(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        out = bdkd_loss(s, t, y, temperature=temperature, gamma=1.0, reduction="none",
                        backend=backend)  # fmt: skip
        return out.student, out.teacher

    return rows


def plain(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return plain_rows(s, t, y, temperature, gamma=1.0)


def implementations(device: str) -> dict[str, Rows]:
    """Return the implementations that run on this device, ours first."""
    found = {
        f"bdkd, {name}": ours(name)
        for name in ("triton", "native")
        if available_backends()[name] and (name == "triton" or device == "cpu")
    }
    found["eager, our reference"] = ours("reference")
    found["eager PyTorch"] = plain
    found["torch.compile"] = torch.compile(plain, dynamic=False)
    return found


def runs(name: str, cell: Cell, interpreted: bool) -> bool:
    if cell.dtype == "fp64" and name in ("eager PyTorch", "torch.compile"):
        return False  # these two compute in float32
    if cell.dtype == "fp64" and name == "eager, our reference":
        return False  # the errors are relative to this implementation
    if name == "torch.compile":  # compiling takes seconds for every new size and type
        return cell.classes == 1000 and cell.temperature == 4.0
    if name == "bdkd, triton" and interpreted:
        return cell.classes == 10
    return True


class Errors(NamedTuple):
    """The largest errors of a cell, divided by the allowed errors."""

    loss: float
    gradient: float


def measure(rows: Rows, cell: Cell, s: Tensor, t: Tensor, y: Tensor) -> Errors:
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    student, teacher = rows(s, t, y, cell.temperature)
    torch.autograd.backward((student.sum(), teacher.sum()))
    wide = cell.dtype == "fp64"
    relative, absolute = (1e-12, 1e-12) if wide else (2e-6, 1e-6)
    one = torch.ones_like(y, dtype=torch.float64)
    options = {"temperature": cell.temperature, "gamma": 1.0, "reduction": "none"}
    x = judge.Inputs(s, t, y, None, options, (one, one))
    truth = judge.truth(x)
    loss = gradient = 0.0
    for got, right in ((student, truth.student), (teacher, truth.teacher)):
        allowed = relative * right.abs() + absolute * max(1.0, cell.temperature**2)
        loss = max(loss, _worst(got, right, allowed))
    terms = judge.gradient_terms(x, truth)
    for got, right, largest in zip((s.grad, t.grad), (truth.ds, truth.dt), terms, strict=True):
        assert got is not None
        assert right is not None
        error = (1e-11 if wide else 5e-6) * largest[..., None]
        unit, smallest = judge.ROUNDING[got.dtype]
        allowed = error + (unit * (right.abs() + error)).clamp(min=smallest) + 1e-45
        gradient = max(gradient, _worst(got, right, allowed))
    return Errors(loss, gradient)


def _worst(got: Tensor, right: Tensor, allowed: Tensor) -> float:
    """Return the largest ratio of an error to the allowed error. A NaN, or an infinity where the
    right value is finite, gives inf."""
    ratio = (got.detach().double() - right).abs() / allowed
    return ratio.nan_to_num(torch.inf, torch.inf).max().item()


def sweep(cells: list[Cell], device: str, interpreted: bool) -> list[dict[str, Any]]:
    found = implementations(device)
    measured = []
    with Progress("accuracy: cell", len(cells)) as progress:
        for cell in cells:
            progress.start(str(cell))
            s, t, y = draw(cell, device)
            for name, rows in found.items():
                if runs(name, cell, interpreted):
                    progress.update(name)
                    errors = measure(rows, cell, s, t, y)
                    measured.append({**cell._asdict(), "name": name, **errors._asdict()})
    return measured


class Judged(NamedTuple):
    """One error of one implementation in one cell, with its bound."""

    name: str
    kind: str  # "loss" or "gradient"
    error: float
    bound: float
    cell: Cell
    ours: bool
    best_other: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.kind} error {self.error:.2g} times the allowed error (best other: "
            f"{self.best_other:.2g}): {self.cell}"
        )


def judge_all(measured: list[dict[str, Any]]) -> list[Judged]:
    """Return every error with its bound. The bound is 1. For our implementations it is twice the
    error of the best other implementation, if that is larger."""
    found = []
    key = Cell._fields
    for values, group in itertools.groupby(measured, key=lambda row: [row[k] for k in key]):
        rows = list(group)
        for kind in Errors._fields:
            others = [row[kind] for row in rows if not row["name"].startswith("bdkd")] or [0.0]
            for row in rows:
                is_ours = row["name"].startswith("bdkd")
                bound = max(1.0, 2 * min(others)) if is_ours else 1.0
                found.append(Judged(row["name"], kind, row[kind], bound, Cell(*values), is_ours,
                                    min(others)))  # fmt: skip
    return found


def failures(judged: list[Judged]) -> list[Judged]:
    """Return the errors of our implementations that exceed their bounds."""
    return [each for each in judged if each.ours and not each.passed]


def verdict(judged: list[Judged]) -> str:
    """Return the worst error of every implementation, in at most 24 lines of 80 columns."""
    row = "{:20} {:4} {:>7} {:>5} {:4} {:4} {:13} {:>6} {:>5} {:>3}"
    lines = [
        "Worst errors and where they occur. The bound is 1. For ours it is twice the",
        "error of the best other implementation, if that is larger.",
        row.format("", "", "error", "bound", "", "type", "networks", "spread", "C", "tau"),
    ]
    for name, kind in itertools.product(
        dict.fromkeys(each.name for each in judged), Errors._fields
    ):
        mine = [each for each in judged if (each.name, each.kind) == (name, kind)]
        worst = max(mine, key=lambda each: (not each.passed, each.error))
        # A foreign implementation that exceeds its bound is marked. Only ours set the exit code.
        word = "pass" if worst.passed else "FAIL" if worst.ours else "over"
        numbers = (f"{worst.error:.2g}", f"{worst.bound:.2g}")
        dtype, relation, spread, classes, tau = worst.cell
        lines.append(row.format(name[:20], kind[:4], *numbers, word, dtype, relation,
                                f"{spread:g}", classes, f"{tau:g}"))  # fmt: skip
    failed = len(failures(judged))
    lines.append(
        f"FAIL: errors of ours that exceed their bounds: {failed}; --verbose lists them"
        if failed
        else "pass: every error of ours is within its bound"
    )
    return "\n".join(lines)


def worst(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the worst errors over classes and temperatures."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in measured:
        key = {k: row[k] for k in ("name", "dtype", "relation", "spread")}
        kept = found.setdefault(tuple(key.values()), key)
        for kind in Errors._fields:
            kept[kind] = max(row[kind], kept.get(kind, 0.0))
    return list(found.values())


def table(measured: list[dict[str, Any]]) -> str:
    """Return the worst errors over spreads, classes and temperatures as a table."""
    names = list(dict.fromkeys(row["name"] for row in measured))
    lines = []
    for dtype, relation in itertools.product(DTYPES, RELATIONS):
        line = [f"{dtype} {relation}"]
        for name in names:
            key = (dtype, relation, name)
            mine = [x for x in measured if (x["dtype"], x["relation"], x["name"]) == key]
            both = [max((row[kind] for row in mine), default=None) for kind in Errors._fields]
            line.append(" ".join("-" if x is None else f"{x:8.2g}" for x in both))
        lines.append(line)
    return results.aligned(["loss, gradient", *names], lines)


def draw_figure(measured: list[dict[str, Any]], path: Path, caption: str) -> None:
    """Draw the worst error over the spread of the logits. Each storage type has a column, with
    losses above and gradients below. The dashed line is the allowed error."""
    import figures
    from matplotlib.figure import Figure

    dtypes = [d for d in DTYPES if any(row["dtype"] == d for row in measured)]
    names = list(dict.fromkeys(row["name"] for row in measured))
    figure = Figure(figsize=(3.1 * len(dtypes) + 0.6, 6.4), facecolor="white")
    grid = figure.subplots(2, len(dtypes), squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(0.075, 0.15, 0.985, 0.83, wspace=0.08, hspace=0.1)
    for (row, kind), (column, dtype) in itertools.product(
        enumerate(Errors._fields), enumerate(dtypes)
    ):
        axes = grid[row][column]
        for i, name in enumerate(names):
            highest = {
                spread: max((x[kind] for x in measured if (x["name"], x["dtype"], x["spread"])
                             == (name, dtype, spread)), default=None)
                for spread in SPREADS
            }  # fmt: skip
            points = [(x, min(max(y, 1e-3), 1e6)) for x, y in highest.items() if y is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=figures.PALETTE[i], marker="os^Dv"[i],
                          markersize=4, linewidth=1.5, label=name)  # fmt: skip
        axes.axhline(1.0, label="allowed", **figures.COPY)
        axes.set(xscale="log", yscale="log")
        figures.quiet(axes)
        axes.set_xticks([0.01, 1, 100, 10_000])
        if row == 0:
            axes.set_title(dtype, fontsize=11, loc="left", color=figures.INK)
        else:
            axes.set_xlabel("spread of the logits", fontsize=9.5)
        if column == 0:
            axes.set_ylabel(f"{kind}: error / allowed", fontsize=9.5)
    handles = {}
    for axes in grid.flatten():
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="upper left", ncols=6, fontsize=9,
                  bbox_to_anchor=(0.065, 0.945), frameon=False)  # fmt: skip
    figure.text(0.075, 0.955, "Worst error against float64, nearly equal to disjoint networks",
                fontsize=12, fontweight="bold", color=figures.INK)  # fmt: skip
    figure.text(0.075, 0.02, caption, fontsize=8, color=figures.MUTED)
    figures.save(figure, path)


def report(measured: list[dict[str, Any]], judged: list[Judged], caption: str) -> str:
    """Return the long tables, for ``--verbose`` and for the file."""
    failed = failures(judged)
    lines = [
        caption,
        "Errors divided by the allowed error (loss, gradient), worst over spreads "
        f"{SPREADS[0]:g} to {SPREADS[-1]:g},\nclasses and temperatures",
        table(measured),
        *map(str, failed[:100]),
    ]
    if len(failed) > 100:
        lines.append(f"and {len(failed) - 100} more")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path,
                        help="folder for accuracy.json, accuracy.txt and accuracy.png")  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="also print the long tables")
    parser.add_argument(
        "--interpret", action="store_true", help="run the Triton kernel in its interpreter"
    )
    parser.add_argument("--quick", action="store_true", help="measure a few cells of every kind")
    options = parser.parse_args(arguments)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)  # an error here is reported at once
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = [Cell(*x) for x in itertools.product(DTYPES, RELATIONS, SPREADS, CLASSES, TEMPERATURES)]
    if not options.quick:
        print(
            f"{len(grid):,} cells; --quick measures a few in seconds", file=sys.stderr, flush=True
        )
    else:
        grid = [
            c for c in grid if c.spread in (0.1, 10.0) and c.classes == 10 and c.temperature > 1
        ]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    measured = sweep(grid, device, interpreted)
    judged = judge_all(measured)
    described = machine.describe(torch.get_num_threads(), device)
    processor = described["gpu"]["name"] if described["gpu"] else described["cpu"]
    commit = machine.commit()
    caption = f"{processor}; torch {torch.__version__}; commit {commit['id']}, {machine.now()[:10]}"
    if options.verbose:
        print(report(measured, judged, caption) + "\n")
    files = ""
    if options.out:
        results.write(options.out / "accuracy.json",
                      {"schema": "accuracy-1", "date": machine.now(), "commit": commit,
                       "machine": described, "worst": worst(measured)})  # fmt: skip
        text = f"{report(measured, judged, caption)}\n\n{verdict(judged)}\n"
        results.write_text(options.out / "accuracy.txt", text)
        files = "accuracy.json, accuracy.txt"
        if find_spec("matplotlib"):
            draw_figure(measured, options.out / "accuracy.png", caption)
            files += ", accuracy.png"
        else:
            files += " (no picture: matplotlib is not installed)"
    print(caption[:80])
    print(verdict(judged))
    if files:
        print(f"{files} in {options.out}"[:80])
    return int(bool(failures(judged)))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:
        sys.exit(f"accuracy.py: {error}")
