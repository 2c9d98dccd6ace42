"""``bdkd export``: write one network of a run as a self-contained file."""

import copy
import dataclasses
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdkd.config import Recipe, nearest, parse_recipe, to_toml
from bdkd.data import Split
from bdkd.engine.components import build_components
from bdkd.engine.state import EMA_SUFFIX
from bdkd.errors import RunError, UsageError
from bdkd.export.card import MARK, model_card
from bdkd.export.facts import VERSION, Facts, Format
from bdkd.export.formats import FORMATS, decode, encode, open_network, without_others
from bdkd.extras import bdkd_version
from bdkd.runs.checkpoint import explain_oserror, load_checkpoint, write_atomically
from bdkd.runs.folder import RunFolder
from bdkd.runs.resume import check_data, warn_of_copied_statistics
from bdkd.runs.weights import mismatched_keys, network_weights, relocate

CARD = "README.md"
CHECKED_IMAGES = 64
# Relative to the largest logit. Kernels sum in another order and batch norm is folded into weights,
# which gives errors of 1e-7 to 1e-5 in float32. A wrong graph has errors of whole logits.
TOLERANCE = 1e-4


class Trained(NamedTuple):
    """A network with its selected weights, on the CPU in evaluation mode."""

    network: nn.Module
    facts: Facts
    images: Tensor  # (B, C, H, W) images that it was not trained on


class Written(NamedTuple):
    """The result of an export."""

    files: list[Path]
    error: float  # largest difference between the logits of the network and of the file
    largest: float  # largest absolute logit


def open_trained(checkpoint: Path, asked: str | None, data_root: str | None) -> Trained:
    """Load the network ``asked`` of a checkpoint, by default the only student, or its average if
    there is one.

    Raises:
        UsageError: there is no network of that name, or there are several students.
        RunError: the checkpoint or the data set cannot be read.
    """
    text, saved = load_checkpoint(checkpoint)
    recipe = parse_recipe(text, source=str(checkpoint), of_run=True)
    name = choose_network(recipe, list(saved["ema"]), asked)
    alone = relocate(without_others(recipe, name), "cpu", data_root)
    train = dataclasses.replace(recipe.train, channels_last=False)
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
    return Trained(network.eval(), facts, batch.views[0])


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
        raise UsageError(f"--network must say which one to export: {choice}")
    return candidates[0]


def export(trained: Trained, kind: Format, output: Path, force: bool) -> Written:
    """Write a network to a file. Before writing, the content is read back and run on several images
    and on one image, and the logits are compared with those of the network.

    Args:
        output: path of the file. A model card is written next to a safetensors file.
        force: replace existing files.

    Raises:
        UsageError: the file name does not have the suffix of its format.
        RunError: a file exists, cannot be written, or gives other logits.
    """
    check_output(kind, output, force)
    contents = {output: encode(kind, trained.network, trained.facts)}
    exported = decode(output, kind, contents[output])
    network = open_network(exported, copy.deepcopy(trained.network), torch.device("cpu"))
    error, largest = same_logits(trained, kind, network)
    if kind == "safetensors":
        contents[output.with_name(CARD)] = model_card(trained.facts, output.name).encode()
    return Written(write_files(contents), error, largest)


def write_files(contents: Mapping[Path, bytes]) -> list[Path]:
    """Write files and return their paths. Raise ``RunError`` if one cannot be written."""
    for path, content in contents.items():
        with explain_oserror(f"cannot write {path}", "choose another --output"):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content, "run the same command again, or choose another --output")
    return list(contents)


def refuse_existing(path: Path, force: bool) -> None:
    """Raise ``RunError`` if a file exists that ``force`` does not replace."""
    if path.exists() and not force:
        raise RunError(f"{path} exists: --force replaces it, --output names another")


def check_output(kind: Format, output: Path, force: bool) -> None:
    """Raise ``UsageError`` or ``RunError`` for an output that cannot be written."""
    if output.suffix != (suffix := FORMATS[kind].suffix) or output.is_dir():
        raise UsageError(f"--output must be a file named *{suffix} with --to {kind}, got {output}")
    refuse_existing(output, force)
    if kind == "safetensors":
        card = output.with_name(CARD)
        if card.exists() and MARK not in card.read_text("utf-8", "replace"):
            raise RunError(
                f"{card} is not a model card of bdkd, which is written next to {output.name}: "
                "choose another folder with --output"
            )
        if card.exists() and not force:
            raise RunError(f"{card} exists: --force replaces it, --output names another folder")


@torch.inference_mode()
def same_logits(trained: Trained, kind: str, read_back: nn.Module) -> tuple[float, float]:
    """Return the largest difference of a logit between the network and the one that was read back,
    and the largest logit. Raise ``RunError`` if they differ by more than rounding."""
    network = trained.network
    inputs = (trained.images, trained.images[:1])
    expected = torch.cat([network(images) for images in inputs])
    error = (expected - torch.cat([read_back(images) for images in inputs])).abs().max().item()
    largest = expected.abs().max().item()
    if not error <= TOLERANCE * max(1.0, largest):  # also refuses NaN
        raise RunError(
            f"{kind} gives other logits than {trained.facts.network}: off by {error:.2g} where "
            f"the largest is {largest:.3g}; nothing was written"
        )
    return error, largest


def _published(recipe: Recipe) -> str:
    """Return the recipe as TOML, without the paths of the run and of initial weights."""
    initial = recipe.networks.items()
    networks = {name: dataclasses.replace(network, weights=None) for name, network in initial}
    return to_toml(dataclasses.replace(recipe, run_dir=None, networks=networks))


def _measured(checkpoint: Path, name: str, step: int) -> dict[str, Any]:
    """Return the metrics of a network at a step: on the test images if the run selected these
    weights, else on the validation images."""
    folder = RunFolder(checkpoint.parent.parent)
    if checkpoint.parent == folder.checkpoints:  # not written by bdkd update-bn
        summary: dict[str, Any] = {}
        if folder.summary.exists():
            summary = folder.read_summary("rewrite it with bdkd train --resume")
        if summary.get("selected_step") == step and name in summary["networks"]:
            images = summary.get("images")
            return _metrics("test", images if type(images) is int else 0, summary["networks"][name])
        for line in folder.read_metrics():
            if line["step"] == step and line.get("split") == "val" and name in line:
                return _metrics("val", 0, line[name])
    return _metrics("", 0, {})


def _metrics(split: str, images: int, values: Mapping[str, Any]) -> dict[str, Any]:
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
