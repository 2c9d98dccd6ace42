"""One trained network, taken out of its run and written for those who have no use for the rest."""

import copy
import dataclasses
import json
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdkd.config import Recipe, nearest, parse_recipe, to_toml
from bdkd.data import Split
from bdkd.errors import RunError, UsageError
from bdkd.training.checkpoint import (
    first_line,
    load_checkpoint,
    mismatched_keys,
    network_weights,
    write_atomically,
)
from bdkd.training.exported import (
    SUFFIXES,
    VERSION,
    Facts,
    Format,
    alone,
    decode,
    encode,
    open_network,
)
from bdkd.training.model_card import MARK, model_card
from bdkd.training.resume import check_data, warn_of_copied_statistics
from bdkd.training.run_folder import RunFolder
from bdkd.training.setup import Setup
from bdkd.training.state import EMA_SUFFIX

CARD = "README.md"
CHECKED_IMAGES = 64
# Of the largest logit. Kernels add in another order and batch norm is folded into weights: 1e-7 to
# 1e-5 is what float32 leaves; a wrong graph is off by whole logits.
TOLERANCE = 1e-4


class Trained(NamedTuple):
    """A network with its selected weights, on the CPU in evaluation mode."""

    network: nn.Module
    facts: Facts
    images: Tensor  # (B, C, H, W) some that it was not trained on


class Written(NamedTuple):
    """What an export has left."""

    files: list[Path]
    error: float  # largest difference of a logit that was read back
    largest: float  # logit, in absolute value


def open_trained(checkpoint: Path, asked: str | None, data_root: str | None) -> Trained:
    """One network of a checkpoint.

    Args:
        asked: the network's name; without it the one student, or rather its average.

    Raises:
        UsageError: no network of that name, or several students to choose from.
        RunError: the checkpoint or the data set cannot be read.
    """
    text, saved = load_checkpoint(checkpoint)
    recipe = parse_recipe(text, source=str(checkpoint))
    name = choose_network(recipe, list(saved["ema"]), asked)
    root = recipe.data.root if data_root is None else data_root
    setup = Setup(
        dataclasses.replace(
            alone(recipe, name),
            device="cpu",
            data=dataclasses.replace(recipe.data, root=root),
            train=dataclasses.replace(recipe.train, channels_last=False),
        ),
        initial_weights=False,
    )
    check_data(checkpoint, saved, setup.source.info.identity())
    if name in saved["ema"]:
        warn_of_copied_statistics(checkpoint, saved, recipe.train.ema_decay)
    member = name.removesuffix(EMA_SUFFIX)
    network = setup.networks.members[member]
    weights = network_weights(saved, name, checkpoint)
    mismatch = mismatched_keys(network, weights)
    if mismatch:
        raise RunError(f"{checkpoint} does not fit its own recipe: {name}: {mismatch}")
    network.load_state_dict(weights)
    info, config = setup.source.info, recipe.networks[member]
    step = saved["position"]["step"]
    facts = Facts(
        version=VERSION, network=name, model=config.model, role=config.role,
        parameters=sum(p.numel() for p in network.parameters()),
        method=recipe.objective.name, seed=recipe.seed, step=step, recipe=_published(recipe),
        classes=tuple(info.classes), channels=info.channels, image_size=info.image_size,
        normalisation=info.normalisation, versions=_versions(),
        **_measured(checkpoint, name, step),
    )  # fmt: skip
    split: Split = "val" if info.counts["val"] else "test"
    batch = next(iter(setup.source.eval_batches(split, CHECKED_IMAGES)))
    return Trained(network.eval(), facts, batch.views[0])


def choose_network(recipe: Recipe, averages: Sequence[str], asked: str | None) -> str:
    """The network that is meant, by name."""
    names = [*recipe.networks, *averages]
    if asked is not None:
        if asked not in names:
            raise UsageError(f"--network {asked!r} is not in the run: {nearest(asked, names)}")
        return asked
    students = [name for name, network in recipe.networks.items() if network.role == "student"]
    candidates = list(averages) or students or names
    if len(candidates) > 1:
        raise UsageError(
            f"--network must say which one to export: {', '.join(candidates)} "
            f"(the run has {', '.join(names)})"
        )
    return candidates[0]


def export(trained: Trained, kind: Format, output: Path, force: bool) -> Written:
    """Write a network, after the file that is to be has been read back and run: its logits are the
    network's, on some images and on one alone.

    Args:
        output: the file; of safetensors, a model card lies beside it.
        force: replace what is there.

    Raises:
        UsageError: a name that does not say its format.
        RunError: something is there already, cannot be written, or gives other logits.
    """
    card = output.with_name(CARD) if kind == "safetensors" else None
    check_output(kind, output, force)
    content = encode(kind, trained.network, trained.facts)
    error, largest = _check(trained, kind, output, content)
    _write(output, content)
    if card is not None:
        _write(card, model_card(trained.facts, output.name).encode())
    return Written([output, *([card] if card else [])], error, largest)


def check_output(kind: Format, output: Path, force: bool) -> None:
    """Raise for an output that cannot be, before anything is computed."""
    if output.suffix != SUFFIXES[kind] or output.is_dir():
        raise UsageError(
            f"--output must be a file named *{SUFFIXES[kind]} with --to {kind}, got {output}"
        )
    if output.exists() and not force:
        raise RunError(f"{output} exists: --force replaces it, --output names another")
    if kind == "safetensors":
        card = output.with_name(CARD)
        if card.exists() and MARK not in card.read_text("utf-8", "replace"):
            raise RunError(
                f"{card} is not a model card of bdkd's, and one goes beside {output.name}: choose "
                "another folder with --output"
            )
        if card.exists() and not force:
            raise RunError(f"{card} exists: --force replaces it, --output names another folder")


@torch.inference_mode()
def _check(trained: Trained, kind: Format, output: Path, content: bytes) -> tuple[float, float]:
    """Largest difference of a logit between the network and the file, and the largest logit."""
    network, images = trained.network, trained.images
    wanted = [network(images), network(images[:1])]
    exported = decode(output, kind, content)
    read_back = open_network(exported, copy.deepcopy(network), torch.device("cpu"))
    came = [read_back(images), read_back(images[:1])]
    # torch's maximum, because Python's max() loses a NaN that is not the first value.
    errors = [(a - b).abs().max() for a, b in zip(wanted, came, strict=True)]
    error = torch.stack(errors).max().item()
    largest = max(logits.abs().max().item() for logits in wanted)
    if not error <= TOLERANCE * max(1.0, largest):  # NaN too
        raise RunError(
            f"{kind} gives other logits than {trained.facts.network}: off by {error:.2g} where "
            f"the largest is {largest:.3g}; nothing was written"
        )
    return error, largest


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
    except (OSError, RunError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__ or error
        raise RunError(
            f"cannot write {path}: {first_line(cause)}; free some space or choose another --output"
        ) from error


def _published(recipe: Recipe) -> str:
    """The recipe without what is nobody's business: where the run and its first weights lay."""
    networks = {
        name: dataclasses.replace(network, weights=None)
        for name, network in recipe.networks.items()
    }
    return to_toml(dataclasses.replace(recipe, run_dir=None, networks=networks))


def _measured(checkpoint: Path, name: str, step: int) -> dict[str, Any]:
    """What the run knows of a network at a step: on the test images where it ended with these
    weights, or else on the validation images."""
    folder = RunFolder(checkpoint.parent.parent)
    if checkpoint.parent != folder.checkpoints:  # of bdkd update-bn: the run did not measure it
        return _metrics("", 0, {})
    summary = _read_summary(folder.summary)
    if summary.get("selected_step") == step and name in summary["networks"]:
        return _metrics("test", summary["images"], summary["networks"][name])
    for line in folder.read_metrics():
        if line["step"] == step and line.get("split") == "val" and name in line:
            return _metrics("val", 0, line[name])
    return _metrics("", 0, {})


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"networks": {}}
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read {path}: {first_line(error)}; bdkd train --resume writes it anew"
        ) from error


def _metrics(split: str, images: int, values: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {
        key: value
        for key, value in values.items()
        if (value is None or isinstance(value, float)) and key != "loss"
    }
    return {"measured_on": split, "images": images, "metrics": numbers}


def _versions() -> dict[str, str]:
    found = {"bdkd": version("bdkd"), "torch": str(torch.__version__)}
    commit = _commit(Path(__file__))
    return found | ({"commit": commit} if commit else {})


def _commit(source: Path) -> str | None:
    """The commit of the source that runs, ``-dirty`` where it was changed since; None for an
    installed package, also one that lies inside another project's checkout."""
    git = ["git", "-C", str(source.parent)]
    tracked = [*git, "ls-files", "--error-unmatch", source.name]
    describe = [*git, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        subprocess.run(tracked, capture_output=True, check=True, timeout=10)
        done = subprocess.run(describe, capture_output=True, check=True, timeout=60, text=True)
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        return None
    return done.stdout.strip() or None
