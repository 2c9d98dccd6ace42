"""How far every implementation of the loss is from float64, over all kinds of logits.

    python bench/accuracy.py [--out FOLDER] [--interpret] [--quick]

Logits from flat to extremely peaked, of networks from nearly equal to disjoint, in every storage
type; both losses of every sample and both gradients. An error is given in units of what SPEC
section 1 allows there (1 is the limit), by the judge of the kernels' tests. Exits with 1 unless
ours is inside that, or at most twice as far off as the best of the others, everywhere.

gamma is 1: where two entropies differ by less than rounding, implementations may rightly weigh a
sample differently, and that is no error. ``--interpret`` takes the Triton kernel through its
interpreter (slow, so on few classes) where there is no GPU.
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


def draw(cell: Cell, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher, rounded to the storage type, and labels."""
    rows = max(4, min(32, 2**15 // cell.classes))
    rng = torch.Generator().manual_seed(hash(cell[2:]) % 2**31)
    a, b = torch.randn(2, rows, cell.classes, generator=rng, dtype=torch.float64)
    if cell.relation.startswith("equal"):
        t = a + float(cell.relation.split()[-1]) * b / cell.spread
    elif cell.relation == "related":
        t = 0.5 * a + b
    elif cell.relation == "independent":
        t = b
    else:  # each has its mass where the other has none
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
    """Those that run on this device; ours first."""
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
        return False  # they work in float32
    if cell.dtype == "fp64" and name == "eager, our reference":
        return False  # it is the truth
    if name == "torch.compile":  # seconds for every new size and type
        return cell.classes == 1000 and cell.temperature == 4.0
    if name == "bdkd, triton" and interpreted:
        return cell.classes == 10
    return True


class Errors(NamedTuple):
    """The worst of a cell, in units of what is allowed there."""

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
    """The largest error over what is allowed; NaN, and infinities where there are none, are inf."""
    ratio = (got.detach().double() - right).abs() / allowed
    return ratio.nan_to_num(torch.inf, torch.inf).max().item()


def sweep(cells: list[Cell], device: str, interpreted: bool) -> list[dict[str, Any]]:
    found = implementations(device)
    measured = []
    for number, cell in enumerate(cells):
        if sys.stderr.isatty():
            print(f"\r{number} of {len(cells)}", end="", file=sys.stderr)
        s, t, y = draw(cell, device)
        for name, rows in found.items():
            if runs(name, cell, interpreted):
                errors = measure(rows, cell, s, t, y)
                measured.append({**cell._asdict(), "name": name, **errors._asdict()})
    return measured


def failures(measured: list[dict[str, Any]]) -> list[str]:
    """Where ours is outside the tolerance and more than twice as far off as the best other."""
    found = []
    key = Cell._fields
    for _, group in itertools.groupby(measured, key=lambda row: [row[k] for k in key]):
        rows = list(group)
        for kind in Errors._fields:
            others = [row[kind] for row in rows if not row["name"].startswith("bdkd")] or [0.0]
            for row in rows:
                mine = row[kind]
                if row["name"].startswith("bdkd") and mine > 1.0 and mine > 2 * min(others):
                    found.append(
                        f"{row['name']}: {kind} {mine:.2g} times what is allowed, the best other "
                        f"{min(others):.2g}: {', '.join(f'{k} {row[k]}' for k in key)}"
                    )
    return found


def worst(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over classes and temperatures."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in measured:
        key = {k: row[k] for k in ("name", "dtype", "relation", "spread")}
        kept = found.setdefault(tuple(key.values()), key)
        for kind in Errors._fields:
            kept[kind] = max(row[kind], kept.get(kind, 0.0))
    return list(found.values())


def table(measured: list[dict[str, Any]]) -> str:
    """The worst over spreads, classes and temperatures, in units of what is allowed."""
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
    """Worst error over the spread of the logits: a column a storage type, losses above, gradients
    below; the dashed line is what SPEC allows."""
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
        axes.axhline(1.0, label="what SPEC allows", **figures.COPY)
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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for accuracy.json and accuracy.png")
    parser.add_argument("--interpret", action="store_true", help="Triton through its interpreter")
    parser.add_argument("--quick", action="store_true", help="a few cells of every kind")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = [Cell(*x) for x in itertools.product(DTYPES, RELATIONS, SPREADS, CLASSES, TEMPERATURES)]
    if options.quick:
        grid = [
            c for c in grid if c.spread in (0.1, 10.0) and c.classes == 10 and c.temperature > 1
        ]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    measured = sweep(grid, device, interpreted)
    where = machine.describe(torch.get_num_threads(), device)
    gpu = where["gpu"]["name"] if where["gpu"] else where["cpu"]
    commit = machine.commit()
    caption = f"{gpu}; torch {torch.__version__}; commit {commit['id']}, {machine.now()[:10]}"
    print(caption)
    print("Errors in units of what SPEC section 1 allows (loss, gradient), worst over spreads "
          f"{SPREADS[0]:g} to {SPREADS[-1]:g},\nclasses and temperatures")  # fmt: skip
    print(table(measured))
    if options.out:
        results.write(options.out / "accuracy.json",
                      {"schema": "accuracy-1", "date": machine.now(), "commit": commit,
                       "machine": where, "worst": worst(measured)})  # fmt: skip
        if find_spec("matplotlib"):
            draw_figure(measured, options.out / "accuracy.png", caption)
        else:
            print("no picture: matplotlib is not installed")
    failed = failures(measured)
    for line in failed[:20]:
        print(line)
    print(f"{len(failed)} of {len(measured)} measurements are outside" if failed else
          "everywhere inside the tolerances, or within twice the best of the others")  # fmt: skip
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
