"""Tables of what the networks of a comparison do while they train, for the evidence page.

    python docs/evidence_statistics.py FOLDER_OF_A_COMPARISON --epochs 1 2 4 8 16 20 --groups 4

Writes ``statistics.md`` into the folder and prints it:

- for each method and network, top-1 and entropy on the training batches of some epochs, as means
  over the seeds, with label smoothing, mixup and augmentation as the recipe has them;
- for ``bdkd``, the weights and the values of both divergences in these epochs;
- with ``--groups N``, the top-1 of the student on each N-th part of the test images, for each seed.
  The test images of ``glyphs`` are in the order of the faces. Then also the correlation over the
  seeds between the test accuracy of each method and that of ``independent``.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from bdkd.evaluation.predictions import read_predictions

BALANCE = ("forward_weight", "reverse_weight", "forward_kl", "reverse_kl")


def runs_of(folder: Path) -> dict[str, dict[int, Path]]:
    """Return the folders of the finished runs by method and seed."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*-seed*")):
        match = re.fullmatch(r"(.+)-seed(\d+)", path.name)
        if match and (path / "summary.json").exists():
            found.setdefault(match[1], {})[int(match[2])] = path
    return {method: dict(sorted(seeds.items())) for method, seeds in found.items()}


def training_lines(run: Path) -> list[dict]:
    lines = (json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == "train"]


def by_epoch(
    runs: Iterable[Path], epochs: list[int], value: Callable[[dict], float | None]
) -> list[float]:
    """Return the mean of a value over all training lines of each epoch, over all runs."""
    found: dict[int, list[float]] = {epoch: [] for epoch in epochs}
    for run in runs:
        for line in training_lines(run):
            if line["epoch"] in found and (number := value(line)) is not None:
                found[line["epoch"]].append(number)
    return [math.fsum(v) / len(v) if v else math.nan for v in found.values()]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def epochs_tables(runs: dict[str, dict[int, Path]], epochs: list[int]) -> list[str]:
    columns = [f"epoch {epoch}" for epoch in epochs]
    parts = []
    for network in ("student", "teacher"):
        rows = []
        for method, seeds in runs.items():
            top1, entropy = (
                by_epoch(seeds.values(), epochs, lambda line, n=network, k=key: line[n][k])
                for key in ("top1", "entropy")
            )
            cells = [f"{100 * a:.1f}% / {h:.2f}" for a, h in zip(top1, entropy, strict=True)]
            rows.append([method, *cells])
        parts.append(
            f"## Training top-1 / entropy in nats, {network}\n\n{table(['method', *columns], rows)}"
        )
    balanced = {m: s for m, s in runs.items() if BALANCE[0] in training_lines(s[min(s)])[0]}
    rows = [
        [f"{method}: {key}"]
        + [f"{v:.3f}" for v in by_epoch(seeds.values(), epochs, lambda line, k=key: line[k])]
        for method, seeds in balanced.items()
        for key in BALANCE
    ]
    if rows:
        parts.append(
            f"## Weights and divergences in training\n\n{table(['statistic', *columns], rows)}"
        )
    return parts


def groups_table(runs: dict[str, dict[int, Path]], groups: int) -> str:
    """Return the top-1 of the student in equal parts of the test images, seed by seed."""
    rows = []
    for method, seeds in runs.items():
        for seed, run in seeds.items():
            correct = read_predictions(run / "predictions.safetensors").correct("student")
            parts = correct.reshape(groups, -1).astype(float).mean(1)
            shares = [*parts, correct.astype(float).mean()]
            rows.append([method, str(seed), *(f"{100 * share:.2f}" for share in shares)])
    head = ["method", "seed", *(f"part {k + 1}" for k in range(groups)), "all"]
    return f"## Top-1 % of the student on parts of the test images\n\n{table(head, rows)}"


def correlations(runs: dict[str, dict[int, Path]], first: str) -> str:
    """Return the correlation over the seeds of the student's test accuracies with those of a
    method."""
    accuracy = {
        method: {s: read_accuracy(run) for s, run in seeds.items()}
        for method, seeds in runs.items()
    }
    rows = []
    for method, values in accuracy.items():
        shared = sorted(values.keys() & accuracy[first].keys())
        if method != first and len(shared) > 2:
            pair = [[accuracy[m][s] for s in shared] for m in (first, method)]
            rows.append([method, f"{statistics.correlation(*pair):+.2f}", str(len(shared))])
    head = ["method", f"correlation with {first}", "seeds"]
    return f"## Correlation of the student's test accuracy over the seeds\n\n{table(head, rows)}"


def read_accuracy(run: Path) -> float:
    return json.loads((run / "summary.json").read_text())["networks"]["student"]["top1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--groups", type=int, default=0)
    arguments = parser.parse_args()
    runs = runs_of(arguments.folder)
    if not runs:
        parser.error(f"{arguments.folder} contains no finished run; give a folder of bdkd compare")
    groups = f" --groups {arguments.groups}" if arguments.groups else ""
    epochs = " ".join(map(str, arguments.epochs))
    command = f"python docs/evidence_statistics.py {arguments.folder} --epochs {epochs}{groups}"
    seeds = {method: len(s) for method, s in runs.items()}
    parts = [f"# {arguments.folder.name}: statistics of the runs", f"`{command}`"]
    parts.append(
        "Seeds: " + ", ".join(f"{method} {count}" for method, count in seeds.items()) + "."
    )
    parts += epochs_tables(runs, arguments.epochs)
    if arguments.groups:
        parts.append(groups_table(runs, arguments.groups))
        if "independent" in runs:
            parts.append(correlations(runs, "independent"))
    text = "\n\n".join(parts) + "\n"
    (arguments.folder / "statistics.md").write_text(text, "utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
