"""Small recipes, runs and training states that many tests use."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from bdkd.config import NetworkConfig, Recipe, load_recipe
from bdkd.data import DataInfo
from bdkd.distributed.context import SINGLE_PROCESS, DistributedContext
from bdkd.engine.components import Components, build_components
from bdkd.engine.networks import Networks
from bdkd.engine.requirements import check_requirements
from bdkd.engine.state import TrainingState
from bdkd.objectives import Objective, create_objective
from bdkd.registry import OBJECTIVES
from bdkd.runs.weights import load_initial_weights
from bdkd.trainer import Trainer

ROLES = ("teacher", "student")

# Two small networks, two epochs of 19 steps and a checkpoint every 5 steps, with every option that
# adds state to a checkpoint.
SMALL = [
    "digits", "--networks.teacher.model", "resnet8", "--train.epochs", "2",
    "--train.ema-decay", "0.9", "--train.clip-norm", "5", "--checkpoint.every-steps", "5",
    "--log-every", "1", "--log", "--train.deterministic",
]  # fmt: skip


# A run of about one second, for tests that do not depend on what the networks learn.
TINY_RUN = [str(Path(__file__).with_name("tiny.toml"))]


def bdkd(
    *arguments: str, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess:
    """Run the command line as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "bdkd", *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=timeout,
    )  # fmt: skip


def shown_step(line: str) -> int | None:
    """Return the step of a printed row of training metrics, or None for any other line."""
    found = re.match(r" *\d+/\d+ +(\d+)(/\d+)? ", line)
    return int(found[1]) if found else None


def torchrun(
    ranks: int, *arguments: str, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess:
    """Run the command line on several ranks of this machine."""
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
            "--standalone", "-m", "--", "bdkd", *arguments,
        ],
        capture_output=True, text=True, cwd=cwd, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def interrupt_at(step: int, signal_number: int, *arguments: str) -> tuple[int, str]:
    """Start ``bdkd train``, and send a signal when it prints the row of a step.

    Returns:
        The exit code (negative: killed by that signal) and what it printed to stderr.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "bdkd", "train", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if shown_step(line) == step:
            os.kill(process.pid, signal_number)
            break
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def metrics(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without times, rates and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocked = {"images_per_second", "data_wait", "memory_mib", "mfu", "seconds"}
    return [{k: v for k, v in line.items() if k not in clocked} for line in lines]


def same(a, b) -> bool:
    """Return whether two nested states are equal, with tensors compared bit for bit."""
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
    context=SINGLE_PROCESS,
    sharded=(),
    objective="bdkd",
    **train,
) -> TrainingState:
    """Return a training state of two tiny networks, a teacher and a student."""
    recipe = load_recipe("digits")
    names = {name: NetworkConfig("tiny", name, shard=name in sharded) for name in ROLES}
    recipe = dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, **{"batch_size": 16, **train}),
        networks=names,
        optimizer=optimizer or recipe.optimizer,
        distributed=distributed or recipe.distributed,
    )
    torch.manual_seed(0)
    networks = Networks({name: make() for name in names}, frozen).to(dtype)
    recipe = dataclasses.replace(recipe, objective=OBJECTIVES.configure(objective))
    return state_of(recipe, networks, 1000, context)


def state_of(
    recipe: Recipe, networks: Networks, train_images: int, context=SINGLE_PROCESS
) -> TrainingState:
    """Return the training state of some networks. Its data source has counts but no images."""
    counts = {"train": train_images, "val": 0, "test": 0}
    source = SimpleNamespace(info=DataInfo("tiny", tuple("0123456789"), 1, (8, 8), counts))
    objective = create_objective(recipe.objective, recipe.networks)
    return TrainingState(
        Components(recipe, context, torch.device("cpu"), objective, source, networks)
    )


def tiny_recipe(**changes) -> Recipe:
    """Return the tiny recipe with changes: ``section={option: value}`` or ``option=value``."""
    recipe = load_recipe(TINY_RUN[0])
    for key, value in changes.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(recipe, key), **value)
        recipe = dataclasses.replace(recipe, **{key: value})
    return recipe


def components_of(recipe, context=SINGLE_PROCESS, *, begins=True) -> Components:
    """Return the components of a run, with the initial weights loaded if ``begins`` is true."""
    components = build_components(recipe, context)
    if begins:
        load_initial_weights(components)
    return components


def check_step(recipe: Recipe, device: str = "cpu", world_size: int = 1) -> None:
    """Check that a training step of a recipe can run on a device and a number of ranks."""
    objective = create_objective(recipe.objective, recipe.networks)
    check_requirements(recipe, torch.device(device), DistributedContext(0, world_size), objective)


def objective_of(state: TrainingState, name: str = "bdkd", **options) -> Objective:
    return create_objective(OBJECTIVES.configure(name, **options), state.recipe.networks)


def initial(path: Path, **options) -> NetworkConfig:
    """Return the configuration of a network that starts from the weights in a file."""
    return NetworkConfig("tiny", "teacher", weights=str(path), **options)


def trainer_of(state: TrainingState, objective: Objective | None = None) -> Trainer:
    """Return a trainer that continues from a state."""
    components = Components(
        state.recipe, state.context, state.device, objective or objective_of(state),
        SimpleNamespace(info=state.info), state.networks,  # type: ignore[arg-type]
    )  # fmt: skip
    return Trainer(components, state)
