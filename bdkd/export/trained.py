"""Open one network of a run for ``bdkd export``."""

import dataclasses
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdkd.config import Recipe, nearest, parse_recipe, to_toml
from bdkd.data import Split
from bdkd.engine.components import Components, build_components
from bdkd.engine.state import EMA_SUFFIX
from bdkd.errors import RunError, UsageError
from bdkd.export.facts import VERSION, Facts
from bdkd.export.formats import without_others
from bdkd.extras import bdkd_version
from bdkd.runs.checkpoint import load_checkpoint
from bdkd.runs.folder import RunFolder
from bdkd.runs.resume import check_data, warn_of_copied_statistics
from bdkd.runs.weights import mismatched_keys, network_weights, relocate

CHECKED_IMAGES = 64


class Trained(NamedTuple):
    """A network with its selected weights, on the CPU in evaluation mode."""

    network: nn.Module
    facts: Facts
    images: Tensor  # (B, C, H, W) images that it was not trained on
    components: Components  # of a run with only this network, in float32 on the CPU


def open_trained(checkpoint: Path, asked: str | None, data_root: str | None) -> Trained:
    """Load one network of a checkpoint.

    Args:
        asked: name of the network. Default: the average of the only student, or the only student
            if it has no average.

    Raises:
        UsageError: there is no network of that name, or no name was given and there are several
            students.
        RunError: the checkpoint or the data set cannot be read.
    """
    text, saved = load_checkpoint(checkpoint)
    recipe = parse_recipe(text, source=str(checkpoint), of_run=True)
    name = choose_network(recipe, list(saved["ema"]), asked)
    alone = relocate(without_others(recipe, name), "cpu", data_root)
    train = dataclasses.replace(recipe.train, channels_last=False, precision="fp32")
    components = build_components(dataclasses.replace(alone, train=train), training=False)
    check_data(checkpoint, saved, components.source.info)
    if name in saved["ema"]:
        warn_of_copied_statistics(checkpoint, saved, recipe.train.ema_decay)
    member = name.removesuffix(EMA_SUFFIX)
    network = components.networks.members[member]
    weights = network_weights(saved, name, checkpoint)
    if mismatch := mismatched_keys(network, weights):
        raise RunError(f"{checkpoint} does not match its recipe: {name}: {mismatch}")
    network.load_state_dict(weights)
    info, config, step = components.source.info, recipe.networks[member], saved["position"]["step"]
    versions = {"bdkd": bdkd_version(), "torch": str(torch.__version__)}
    if commit := _commit(Path(__file__)):
        versions["commit"] = commit
    facts = Facts(
        version=VERSION, network=name, model=config.model, role=config.role,
        parameters=sum(p.numel() for p in network.parameters()),
        method=recipe.objective.name, seed=recipe.seed, step=step, recipe=_published(recipe),
        classes=tuple(info.classes), channels=info.channels, image_size=info.image_size,
        normalisation=info.normalisation, versions=versions,
        **_measured(checkpoint, name, step),
    )  # fmt: skip
    split: Split = "val" if info.counts["val"] else "test"
    batch = next(iter(components.source.eval_batches(split, CHECKED_IMAGES)))
    return Trained(network.eval(), facts, batch.views[0], components)


def choose_network(recipe: Recipe, averages: Sequence[str], asked: str | None) -> str:
    """Return the name of the network to export."""
    names = [*recipe.networks, *averages]
    if asked is not None:
        if asked not in names:
            raise UsageError(f"--network {asked!r} is not in the run: {nearest(asked, names)}")
        return asked
    students = [name for name, network in recipe.networks.items() if network.role == "student"]
    candidates = list(averages) or students or names
    if len(candidates) > 1:
        choice = f"{', '.join(candidates)} (the run has {', '.join(names)})"
        raise UsageError(f"--network must name the network to export: {choice}")
    return candidates[0]


def _published(recipe: Recipe) -> str:
    """Return the recipe as TOML, without the paths of the run and of initial weights."""
    initial = recipe.networks.items()
    networks = {name: dataclasses.replace(network, weights=None) for name, network in initial}
    return to_toml(dataclasses.replace(recipe, run_dir=None, networks=networks))


def _measured(checkpoint: Path, name: str, step: int) -> dict[str, Any]:
    """Return the metrics of a network at a step. They are measured on the test images if the run
    selected these weights, and on the validation images if not."""
    folder = RunFolder(checkpoint.parent.parent)
    if checkpoint.parent == folder.checkpoints:  # not written by bdkd update-bn
        summary: dict[str, Any] = {}
        if folder.summary.exists():
            summary = folder.read_summary("rewrite it with bdkd train --resume")
        if summary.get("selected_step") == step and name in summary["networks"]:
            images = summary.get("images")
            images = images if type(images) is int else 0
            return measured("test", images, summary["networks"][name])
        for line in folder.read_metrics():
            if line["step"] == step and line.get("split") == "val" and name in line:
                return measured("val", 0, line[name])
    return measured("", 0, {})


def measured(split: str, images: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`Facts` for the metrics of a network on a split."""
    numbers = {key: x for key, x in values.items() if x is None or isinstance(x, float)}
    numbers.pop("loss", None)
    return {"measured_on": split, "images": images, "metrics": numbers}


def _commit(source: Path) -> str | None:
    """Return the commit of the source, with ``-dirty`` if there are changes. Return None for an
    installed package, even inside the checkout of another project."""
    git = ["git", "-C", str(source.parent)]
    tracked = [*git, "ls-files", "--error-unmatch", source.name]
    describe = [*git, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        subprocess.run(tracked, capture_output=True, check=True, timeout=10)
        done = subprocess.run(describe, capture_output=True, check=True, timeout=60, text=True)
    except (OSError, subprocess.SubprocessError):  # no git, or not a checkout
        return None
    return done.stdout.strip() or None
