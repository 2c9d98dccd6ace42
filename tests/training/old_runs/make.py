"""Write the runs of this folder with the code of commit 0b69d99, whose checkpoints have format 2.

    git worktree add /tmp/0b69d99 0b69d99
    python tests/training/old_runs/make.py /tmp/0b69d99

Each run trains to its last step and saves a checkpoint after every step. The folder keeps the files
of a process that is killed after the step ``saved``: ``config.toml``, ``metrics.jsonl`` and that
checkpoint. Then the old code resumes the folder. It must reach the state of the run that was never
killed, bit for bit. ``next.json`` and ``next.safetensors`` record this state.

The folders are committed. Run this script only to add a folder (``--only NAME``): files that HEAD
could write prove nothing about old runs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from saved_vectors import read_state, vectors  # noqa: E402

COMMIT = "0b69d99"
MORE = 4  # steps to train after the kept checkpoint

# 71 training images of 8x8 pixels in batches of 12 are 5 steps an epoch and 15 in all. The networks
# are two ResNet-8 of two channels. Most of the 75 KB of a checkpoint are torch.save's entries for
# 170 tensors.
RECIPE = """
name = "old-run"
threads = 1
log_every = 1
log = []
device = "cpu"

[data]
source = "synthetic"
image_size = 8
crop = 1
flip = true

[data.synthetic]
images = 80
classes = 3

[networks.teacher]
model = "resnet8"
role = "teacher"
options = { width = 0.13 }

[networks.student]
model = "resnet8"
role = "student"
options = { width = 0.1 }

[schedule]
warmup = 0.5

[train]
epochs = 3
batch_size = 12
select = "last"

[checkpoint]
every_steps = 1
keep = 99
"""

# A network with dropout; wrn_10_1 is the smallest that has the option (77,395 parameters), so it
# trains alone and without momentum.
ALONE = RECIPE.replace("teacher]", "student]").replace('"teacher"', '"student"')
DROPOUT = ALONE[: ALONE.rindex("[networks.student]")] + ALONE[ALONE.index("[schedule]") :]
DROPOUT = DROPOUT.replace('"resnet8"', '"wrn_10_1"').replace("width = 0.13", "dropout = 0.3")


TAUGHT = "taught"  # folder of the run that trains a teacher for offline distillation


class OldRun(NamedTuple):
    """How one fixture is trained, and the step after which it is killed."""

    arguments: tuple[str, ...]
    saved: int
    ranks: int = 1
    recipe: str = RECIPE


RUNS = {
    # Saved at the end of an epoch, after its evaluation and before any image of the next epoch.
    "sgd": OldRun(("--train.clip-norm", "1"), 5),
    "adamw": OldRun(
        ("--optimizer.name", "adamw", "--optimizer.learning-rate", "1e-2", "--objective.name",
         "dml"), 7,
    ),
    "ema": OldRun(("--train.ema-decay", "0.9"), 7),
    # The losses are so large that the first steps overflow and change the initial loss scale.
    "fp16": OldRun(
        ("--train.precision", "fp16", "--objective.student-ce", "8", "--objective.teacher-ce",
         "8", "--optimizer.learning-rate", "1e-2"), 7,
    ),
    # Offline: the teacher is frozen and has no moments. The run that trained it is removed.
    "accumulate": OldRun(
        ("--train.accumulate", "3", "--objective.name", "kd", "--networks.teacher.frozen",
         "--networks.teacher.weights", TAUGHT), 7,
    ),
    "two-ranks": OldRun(("--distributed.compress", "bf16"), 7, ranks=2),
    "fsdp": OldRun(("--networks.teacher.shard", "--train.no-channels-last"), 7, ranks=2),
    # Killed in the second epoch and between two lines of the log, with one view for each network
    # (kdcl) and every augmentation. The best student so far has its own checkpoint.
    "mid-epoch": OldRun(
        ("--objective.name", "kdcl", "--data.cutout", "3", "--train.select", "best",
         "--log-every", "2"), 9,
    ),
    # At this temperature the predictions are sharp and the teacher pauses in about half of the
    # steps: in step 8, after which this run is killed, but not in step 9.
    "switokd-paused": OldRun(
        ("--objective.name", "switokd", "--objective.temperature", "0.1",
         "--objective.student-kd", "0.1", "--objective.teacher-kd", "0.1",
         "--networks.student.learning-rate", "1e-3"), 8,
    ),
    "dropout": OldRun(
        ("--objective.name", "independent", "--optimizer.momentum", "0"), 7, recipe=DROPOUT
    ),
}  # fmt: skip


def make(name: str, run: OldRun, tree: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        work, last = Path(scratch), run.saved + MORE
        (work / "recipe.toml").write_text(run.recipe)
        if TAUGHT in run.arguments:
            train(tree, work, 1, "recipe.toml", "--max-steps", "5", "--run-dir", TAUGHT)
        train(tree, work, run.ranks, "recipe.toml", *run.arguments, "--max-steps", str(last),
              "--run-dir", "whole")  # fmt: skip
        killed = HERE / name
        shutil.rmtree(killed, ignore_errors=True)
        (killed / "checkpoints").mkdir(parents=True)
        shutil.copy(work / "whole" / "config.toml", killed)
        saved = work / "whole" / "checkpoints" / f"step-{run.saved:08d}.pt"
        shutil.copy(saved, killed / "checkpoints")
        best = read_state(saved)["best"]
        if best and "best" in run.arguments:
            best_name = f"best-{best['step']:08d}.pt"
            shutil.copy(saved.with_name(best_name), killed / "checkpoints")
        lines = (work / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= run.saved]
        (killed / "metrics.jsonl").write_text("".join(kept))

        shutil.copytree(killed, work / "resumed")
        train(tree, work, run.ranks, "--resume", "--run-dir", "resumed")
        whole, resumed = (
            read_state(work / folder / "checkpoints" / f"step-{last:08d}.pt")
            for folder in ("whole", "resumed")
        )
        for state in (whole, resumed):
            del state["position"]["seconds"]
        if digest(whole) != digest(resumed):
            raise SystemExit(f"{name}: commit {COMMIT} itself does not resume this run bit for bit")
        came = map(json.loads, (work / "resumed" / "metrics.jsonl").read_text().splitlines())
        expected = {
            "commit": COMMIT,
            "saved": run.saved,
            "last": last,
            "ranks": run.ranks,
            "metrics": [line for line in came if line["step"] > run.saved],
            "scaler": resumed["scaler"],
            "skipped": resumed["skipped"].tolist(),
            "rng": [digest(rank["rng"]["cpu"]) for rank in resumed["ranks"]],
        }
        (killed / "next.json").write_text(json.dumps(expected, indent=1) + "\n")
        save_file(vectors(resumed), killed / "next.safetensors")
    size = sum(path.stat().st_size for path in killed.rglob("*") if path.is_file())
    print(f"{name}: {size / 1e3:.0f} kB, killed after step {run.saved} of {last}")


def train(tree: Path, work: Path, ranks: int, *arguments: str) -> None:
    """Run ``bdkd train`` with the code of a worktree."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {
        **os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [*(launcher if ranks > 1 else []), "-m", *(["--"] if ranks > 1 else []), "bdkd"]
    done = subprocess.run(
        [sys.executable, *command, "train", *arguments],
        cwd=work, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def digest(value: Any) -> str:
    """Return a SHA-256 of nested tensors and plain values."""
    return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("worktree", type=Path, help=f"checkout of {COMMIT} with its kernel built")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    given = parser.parse_args()
    tree = given.worktree.resolve()
    head = subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    if not head.stdout.startswith(COMMIT):
        parser.error(f"{tree} is at {head.stdout[:7]}: check out {COMMIT} there")
    for name in given.only:
        make(name, RUNS[name], tree)


if __name__ == "__main__":
    main()
