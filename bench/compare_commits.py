"""Train every shipped recipe at two commits on this machine and compare every step.

    git worktree add /tmp/0b69d99 0b69d99
    python bench/compare_commits.py /tmp/0b69d99

Each worktree's native kernel is built if it is missing. A case trains some steps in each worktree,
in a process that has the worktree first in PYTHONPATH, and writes a checkpoint and a line of
metrics after every step. Weights, buffers, moments, averages, the loss scale, random states,
learning rates and metrics are compared bit for bit. The exit code is 1 if there is a difference
that ``DELIBERATE`` does not list.

Cases use the networks of the recipes. Batches have 8 images, and the data sets are small generated
ones, because a step of the real size takes minutes on a CPU.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(HERE / folder) for folder in ("", "kernels", "bench", "tests/data", "tests/data/imagenet")
]
from fake_sets import cifar_files, tiny_imagenet_files, write_files  # noqa: E402
from imagenet_trees import make_tree  # noqa: E402
from progress import Progress  # noqa: E402

from bdkd.evaluation.metric_lines import LineReader  # noqa: E402
from bdkd.models import create_model  # noqa: E402

BOUNDARY = 4  # warm-up steps of the case in which the warm-up ends

# The parts of a checkpoint's state that are compared. The other parts describe the format.
WHOLE_PARTS = ("networks", "ema", "scaler", "skipped")
POSITION = ("step", "epoch")
BEST = ("step", "top1")
GROUP = (
    "network", "params", "lr", "peak_rate", "weight_decay", "momentum", "nesterov", "betas", "eps",
)  # fmt: skip
CLOCKED = {"images_per_second", "data_wait", "memory_mib", "mfu", "seconds"}


class Case(NamedTuple):
    """A training run that is compared."""

    arguments: tuple[str, ...]
    steps: int | None = None  # fewer than --steps if a checkpoint is large
    ranks: int = 1
    note: str = ""


class Deliberate(NamedTuple):
    """An intended change: the values that it affects, and its reason."""

    name: str
    covers: Callable[[str, int, str], bool]  # case, step, key
    reason: str


DELIBERATE = (
    Deliberate(
        "EMA of the buffers, warm-up of the decay",
        lambda case, step, key: (
            case == "ema"
            and (
                key.startswith(("ema.", "best.")) or (key.startswith("metrics.") and "_ema" in key)
            )
        ),
        "batch norm's statistics are averaged as the weights are, and the decay warms up as in "
        "timm's ModelEmaV3 (gamma 1, power 2/3); the students themselves do not change",
    ),
    Deliberate(
        "the last warm-up step has the peak rate",
        # The rate differs only in the last warm-up step. The weights differ from there on.
        lambda case, step, key: (
            case == "warm-up ends"
            and step >= BOUNDARY
            and not key.startswith(("rng.", "position.", "scaler.", "skipped"))
            and (step == BOUNDARY or not key.endswith((".lr", ".learning_rate")))
        ),
        "step + 1 == warmup used the decay at a negative progress; it now ends the linear ramp",
    ),
    Deliberate(
        "the evaluation crop of ImageNet is torchvision's",
        lambda case, step, key: (
            case.startswith(("imagenet", "mixup", "randaugment"))  # cases with ImageNet images
            and key.startswith(("metrics.val.", "best."))
        ),
        "half pixels are rounded to even numbers, as in torchvision: the crop moves by one pixel "
        "at some sizes; training does not change",
    ),
    Deliberate(
        "the test images are watched",
        lambda case, step, key: case.startswith("imagenet") and key.startswith("metrics.test."),
        "watch_test writes lines of metrics that older commits did not write; nothing else changes",
    ),
    Deliberate(
        "the best step is kept only if the recipe selects it",
        lambda case, step, key: (
            case.startswith(("digits-hard", "imagenet-smoke", "mixup", "randaugment"))
            and key.split(".")[0] == "best"
        ),
        "these recipes have train.select = last; training does not change",
    ),
)

# --- the cases ------------------------------------------------------------------------------------

DIGITS = (
    "digits", "--networks.teacher.model", "resnet8", "--schedule.warmup", "0",
    "--train.batch-size", "32",
)  # fmt: skip
IMAGENET = ("--data.loader", "pillow", "--data.workers", "0", "--data.image-size", "64")
SMOKE = ("imagenet-smoke", "--networks.student.options", "width", "0.25", *IMAGENET)


def recipe_cases(tree: Path, steps: int) -> dict[str, Case]:
    """Return a case for every recipe that a worktree ships."""
    cases = {}
    for path in sorted((tree / "bdkd" / "recipes").glob("*.toml")):
        recipe = tomllib.loads(path.read_text())
        source, changes, few = recipe["data"]["source"], [], None
        if source != "digits":
            changes += ["--train.batch-size", "8"]
        if source == "imagenet":
            changes += IMAGENET
            few = 2  # a checkpoint has 270 MB
        elif "wrn_16_8" in path.name.replace("wrn16-8", "wrn_16_8"):
            few = 2  # a checkpoint has 90 MB
        if recipe.get("schedule", {}).get("warmup"):
            changes += ["--schedule.warmup", str(steps + 1)]  # another case tests its end
        note = "batch 8" * ("--train.batch-size" in changes)
        note += ", 64x64 pixels" * (source == "imagenet")
        cases[path.stem] = Case((path.stem, *changes), few, note=note)
    return cases


def _digits(*changes: str, ranks: int = 1) -> Case:
    return Case((*DIGITS, *changes), ranks=ranks)


VARIANTS = {
    **{
        f"objective {name}": _digits("--objective.name", name)
        for name in ("dml", "independent", "kdcl", "switokd")
    },
    "objective kd": _digits(
        "--objective.name", "kd", "--networks.teacher.frozen", "--networks.teacher.weights",
        "data/teacher.pt",
    ),
    "bdkd, forward, smoothed": _digits(
        "--objective.teacher-divergence", "forward", "--objective.label-smoothing", "0.1",
        "--objective.temperature", "2",
    ),
    "reference loss": _digits("--objective.backend", "reference"),
    "native loss": _digits("--objective.backend", "native"),
    "warm-up ends": _digits("--schedule.warmup", str(BOUNDARY), "--schedule.unit", "steps"),
    "steps of the rate": _digits(
        "--schedule.name", "step", "--schedule.unit", "steps", "--schedule.milestones", "2", "4"
    ),
    "adamw": _digits("--optimizer.name", "adamw", "--optimizer.learning-rate", "1e-3"),
    "adamw, norms decay": _digits(
        "--optimizer.name", "adamw", "--optimizer.learning-rate", "1e-3",
        "--optimizer.decay-norms",
    ),
    "ema": _digits("--train.ema-decay", "0.9"),
    "bf16": _digits("--train.precision", "bf16"),
    "fp16": _digits("--train.precision", "fp16", "--objective.student-ce", "8"),
    "accumulate 2": _digits("--train.accumulate", "2"),
    "clip": _digits("--train.clip-norm", "0.5"),
    "augmented": _digits(
        "--data.crop", "2", "--data.crop-padding", "reflect", "--data.flip",
        "--data.cutout", "3", "--data.label-noise", "0.2", "--data.pixel-noise", "0.1",
    ),
    "dropout": _digits(
        "--networks.teacher.model", "wrn_16_1", "--networks.teacher.options", "dropout", "0.3"
    ),
    "an epoch ends": _digits("--data.train-images", "100"),
    "two ranks": _digits(ranks=2),
    "two ranks, accumulate 2": _digits("--train.accumulate", "2", ranks=2),
    "two ranks, bf16 exchange": _digits("--distributed.compress", "bf16", ranks=2),
    "two ranks, sharded teacher": _digits(
        "--networks.teacher.shard", "--train.no-channels-last", "--train.clip-norm", "0.5",
        ranks=2,
    ),
    "mixup, cutmix": Case(
        (*SMOKE, "--data.mixup", "0.2", "--data.cutmix", "1", "--train.batch-size", "8"), 2
    ),
    "randaugment, erasing, progressive": Case(
        (*SMOKE, "--data.rand-augment", "2", "5", "--data.erasing", "0.5", "--train.batch-size",
         "8", "--data.progressive", "0", "48"), 2,
    ),
}  # fmt: skip

# --- training -------------------------------------------------------------------------------------


def make_data(root: Path) -> None:
    """Write the data sets to the folders in which the recipes look for them."""
    for name, files in (
        ("cifar10", cifar_files("cifar10", 20)),
        ("cifar100", cifar_files("cifar100", 1)),
        ("tiny-imagenet", tiny_imagenet_files(train=20)),
    ):
        write_files(root / "data" / name, files)
    make_tree(root / "data" / "imagenet", 5, 12, 2)
    torch.manual_seed(0)
    torch.save(create_model("resnet8", 10, 1).state_dict(), root / "data" / "teacher.pt")


def build_kernel(tree: Path) -> None:
    """Build a worktree's native kernel if it is missing. Importing it rebuilds an outdated one."""
    library, build = "libbdkd_native.so", tree / "build" / "native"
    if (tree / "kernels" / "bdkd_kernels" / library).exists():
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    configure = ["-S", str(tree), "-B", str(build), f"-DPython3_EXECUTABLE={sys.executable}"]
    for step in (configure, ["--build", str(build)]):
        subprocess.run(["cmake", *step], check=True, env={**os.environ, "PATH": path})
    shutil.copy(build / library, tree / "kernels" / "bdkd_kernels")


# Each worktree has one process for all cases, because importing torch takes longer than a small
# case.
WORKER = """
import contextlib, io, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import bdkd, bdkd_kernels
from bdkd.cli import main
print(json.dumps([bdkd.__file__, bdkd_kernels.__file__]), file=answers, flush=True)
for line in sys.stdin:
    arguments, work = json.loads(line)
    os.chdir(work)
    os.environ["XDG_CACHE_HOME"] = os.path.join(work, "cache")
    said, failed = io.StringIO(), False
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main(arguments)
        except SystemExit:
            failed = True
    print(json.dumps(said.getvalue().strip() or "exit" if failed else ""), file=answers, flush=True)
"""


class Tree:
    """A worktree whose code trains cases, each case in a separate folder."""

    def __init__(self, path: Path) -> None:
        build_kernel(path)
        self.environment = {
            **os.environ, "PYTHONPATH": f"{path}:{path / 'kernels'}", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.worker = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=self.environment, cwd="/",
        )  # fmt: skip
        assert self.worker.stdout is not None
        imported = json.loads(self.worker.stdout.readline())
        if not all(Path(file).is_relative_to(path) for file in imported):
            raise SystemExit(f"Python does not import bdkd from {path}, but {', '.join(imported)}")

    def train(self, work: Path, case: Case, steps: int) -> str:
        """Train a case in ``work/run``. Return the error, or an empty string."""
        arguments = [
            "train", *case.arguments, "--run-dir", "run", "--max-steps", str(steps),
            "--checkpoint.every-steps", "1", "--checkpoint.keep", "999", "--log-every", "1",
            "--log", "--device", "cpu", "--threads", "1",
        ]  # fmt: skip
        if case.ranks > 1:
            done = subprocess.run(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", str(case.ranks), "-m", "--", "bdkd", *arguments,
                ],
                cwd=work, capture_output=True, text=True, env=self.environment,
            )  # fmt: skip
            said = [line for line in done.stderr.splitlines() if line.startswith("bdkd: ")]
            return (said or ["exit"])[0] if done.returncode else ""
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        print(json.dumps([arguments, str(work)]), file=self.worker.stdin, flush=True)
        answer = self.worker.stdout.readline()
        return json.loads(answer) if answer else "its process ended unexpectedly"

    def close(self) -> None:
        assert self.worker.stdin is not None
        self.worker.stdin.close()
        self.worker.wait()


# --- comparing ------------------------------------------------------------------------------------


def values(run: Path, step: int) -> dict[str, Any]:
    """Return all values that are compared after a step. The keys are dotted names."""
    found: dict[str, Any] = {}
    path = run / "checkpoints" / f"step-{step:08d}.pt"
    if path.exists():  # no checkpoint is written after a skipped step
        state = torch.load(path, map_location="cpu", weights_only=True)["state"]
        groups = state["optimizer"]["param_groups"]
        compared = {
            **{part: state[part] for part in WHOLE_PARTS},
            "moments": state["optimizer"]["state"],
            "groups": [{key: group[key] for key in GROUP if key in group} for group in groups],
            "position": {key: state["position"][key] for key in POSITION},
            "best": {key: state["best"][key] for key in BEST} if state["best"] else None,
            "rng": [rank["rng"] for rank in state["ranks"]],
        }
        for part, content in compared.items():
            found |= _flat(part, content)
    reader = LineReader()  # converts the epochs of an older commit
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = reader.parse(line)
        if metrics is not None and metrics["step"] == step:
            kept = {key: value for key, value in metrics.items() if key not in CLOCKED}
            found |= _flat(f"metrics.{metrics['split']}", kept)
    return found


def _flat(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        items: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, list | tuple):
        items = iter(enumerate(value))
    else:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, item in items:
        flat |= _flat(f"{key}.{name}", item)
    return flat


def difference(old: Any, new: Any) -> float:
    """Return the largest difference divided by the largest magnitude. Return infinity for values
    that cannot be subtracted."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if old.dtype != new.dtype or old.shape != new.shape:
            return math.inf
        if torch.equal(old, new):
            return 0.0
        old, new = old.double(), new.double()
        off = ((old - new).abs().max() / old.abs().max().clamp_min(1e-300)).item()
        return off if math.isfinite(off) else math.inf
    if type(old) is type(new) and old == new:
        return 0.0
    if isinstance(old, float) and isinstance(new, float):
        return abs(old - new) / max(abs(old), 1e-300)
    return math.inf


class Found(NamedTuple):
    """A value that differs."""

    step: int
    key: str
    size: float


def compare(name: str, old: Path, new: Path, steps: int) -> tuple[list[Found], dict[str, Found]]:
    """Return the unexpected differences, and for each deliberate change the first value that it
    changes, with the size of its largest difference."""
    unexpected: list[Found] = []
    meant: dict[str, Found] = {}
    for step in range(1, steps + 1):
        a, b = values(old, step), values(new, step)
        for key in [*a, *(key for key in b if key not in a)]:
            both = key in a and key in b
            found = Found(step, key, difference(a[key], b[key]) if both else math.inf)
            if not found.size:
                continue
            change = next((c for c in DELIBERATE if c.covers(name, step, key)), None)
            if change is None:
                unexpected.append(found)
            else:
                first = meant.get(change.name, found)
                meant[change.name] = first._replace(size=max(first.size, found.size))
    return unexpected, meant


# --- the table ------------------------------------------------------------------------------------


def run_case(
    name: str, case: Case, trees: tuple[Tree, Tree], data: Path, steps: int, pool: Executor,
    progress: Progress,
) -> bool:  # fmt: skip
    """Train a case in both trees, compare the values and print a row. Return True if there is no
    unexpected difference."""
    done = min(steps, case.steps or steps)
    progress.start(name)
    with tempfile.TemporaryDirectory() as scratch:
        works = [Path(scratch) / side for side in ("old", "new")]
        for work in works:
            # Each case gets a copy of the data, because a source may write an index next to its
            # files.
            shutil.copytree(data / "data", work / "data")
        failures = progress.results(
            [
                pool.submit(tree.train, work, case, done)
                for tree, work in zip(trees, works, strict=True)
            ],
            f"{done} steps in both trees",
        )
        if any(failures):
            failed = f"FAILED  old: {failures[0] or 'ok'}; new: {failures[1] or 'ok'}"
            progress.print(row(name, done, failed))
            return False
        progress.update("comparing")
        unexpected, meant = compare(name, *(work / "run" for work in works), done)
    result = "equal"
    if meant:
        result = "; ".join(
            f"as listed: {change} (from step {found.step}, {found.key}; at most {found.size:.1e})"
            for change, found in meant.items()
        )
    if unexpected:
        first, largest = unexpected[0], max(unexpected, key=lambda found: found.size)
        result = (
            f"DIFFERENT from step {first.step}, {first.key} ({first.size:.1e}); "
            f"{len(unexpected)} values differ, most in step {largest.step}, {largest.key} "
            f"({largest.size:.1e})"
        )
    progress.print(row(name, done, result + f"  [{case.note}]" * bool(case.note)))
    return not unexpected


def row(name: str, steps: int, result: str) -> str:
    return f"{name:36} {steps:>5}  {result}"


def commit_of(tree: Path) -> str:
    described = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(described, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="worktree of the older commit")
    parser.add_argument(
        "--new", type=Path, default=HERE, help="worktree of the newer commit (default: this one)"
    )
    parser.add_argument(
        "--cases", "--recipes", nargs="+", metavar="NAME", help="run only these cases"
    )
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps per case")
    parser.add_argument("--at-once", action="store_true", help="train in both trees in parallel")
    given = parser.parse_args()
    paths = (given.old.resolve(), given.new.resolve())
    cases = {**recipe_cases(paths[1], given.steps), **VARIANTS}
    for name in given.cases or ():
        if name not in cases:
            parser.error(f"no case is named {name!r}: use {', '.join(cases)}")
    trees = (Tree(paths[0]), Tree(paths[1]))
    print(f"old {commit_of(paths[0])}, new {commit_of(paths[1])}, torch {torch.__version__}, CPU")
    print(f"\n{'case':36} {'steps':>5}  result", flush=True)
    chosen = given.cases or list(cases)
    with (
        tempfile.TemporaryDirectory() as data,
        ThreadPoolExecutor(1 + given.at_once) as pool,
        Progress("compare_commits: case", len(chosen)) as progress,
    ):
        make_data(Path(data))
        equal = [
            run_case(name, cases[name], trees, Path(data), given.steps, pool, progress)
            for name in chosen
        ]
    for tree in trees:
        tree.close()
    print("\nListed as deliberate:")
    for change in DELIBERATE:
        print(f"- {change.name}: {change.reason}")
    different = equal.count(False)
    print(f"\n{len(equal) - different} of {len(equal)} cases are equal or differ as listed")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
