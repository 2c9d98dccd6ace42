"""A run small enough to be trained dozens of times."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from bdkd.config import NetworkConfig, load_recipe
from bdkd.training.distributed import ALONE
from bdkd.training.networks import Networks
from bdkd.training.state import TrainingState

# Two small networks, two epochs of 19 steps, a checkpoint every 5, everything switched on that a
# checkpoint has to carry.
SMALL = [
    "digits", "--networks.teacher.model", "resnet8", "--train.epochs", "2",
    "--train.ema-decay", "0.9", "--train.clip-norm", "5", "--checkpoint.every-steps", "5",
    "--log-every", "1", "--log",
]  # fmt: skip


# A run of a second, for what does not depend on what is learned.
TINY_RUN = [str(Path(__file__).with_name("tiny.toml"))]


def bdkd(
    *arguments: str, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess:
    """The command line as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "bdkd", *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=timeout,
    )  # fmt: skip


def interrupt_at(step: int, signal_number: int, *arguments: str) -> tuple[int, str]:
    """Start ``bdkd train`` and send a signal once it has said that it did a step.

    Returns:
        The exit code (negative: killed by that signal) and what it printed to stderr.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "bdkd", "train", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            os.kill(process.pid, signal_number)
            break
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock put there."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocked = {"images_per_second", "data_wait", "memory_mib", "mfu"}
    return [{k: v for k, v in line.items() if k not in clocked} for line in lines]


def same(a, b) -> bool:
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class Tiny(nn.Sequential):
    """A network with a batch norm, for 1x8x8 images, small enough for any number of steps."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
            nn.Linear(width * 9, 10),
        )  # fmt: skip


def tiny_state(
    make=Tiny,
    *,
    optimizer=None,
    dtype=torch.float32,
    frozen=frozenset(),
    distributed=None,
    ranks=ALONE,
    sharded=(),
    controls=False,
    **train,
) -> TrainingState:
    """A training state of two tiny networks, teacher and student."""
    recipe = load_recipe("digits")
    names = {name: NetworkConfig("tiny", name) for name in ("teacher", "student")}
    recipe = dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, **{"batch_size": 16, **train}),
        networks=names,
        optimizer=optimizer or recipe.optimizer,
        distributed=distributed or recipe.distributed,
    )
    torch.manual_seed(0)
    networks = Networks({name: make() for name in names}, frozen).to(dtype)
    if sharded:
        from bdkd.training.sharding import shard

        for name in sharded:
            shard(networks.members[name], ranks, torch.device("cpu"))
    return TrainingState(
        recipe, networks, 1000, torch.device("cpu"),
        ranks=ranks, sharded=sharded, controls=controls,
    )  # fmt: skip
