"""``bdkd update-bn``: recompute the batch norm statistics of a run's networks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdkd.cli.table import table
from bdkd.errors import RunError, UsageError


@dataclass(frozen=True)
class Arguments:
    """Recompute the batch norm statistics of every network of a run on training images, and write
    a new checkpoint. The run itself does not change. Use it for averaged networks of checkpoints
    that say so, or after weights were changed by hand."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """A run's folder (its selected checkpoint is taken) or one checkpoint file."""
    images: int | None = None
    """Training images to use; without it, one epoch."""
    output: Path | None = None
    """The checkpoint to write; without it RUN/update-bn/NAME_OF_THE_CHECKPOINT."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    data_root: str | None = None
    """Folder of the data set, where it has moved since the training."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace the output if it exists."""


def run(given: list[str]) -> None:
    """Parse, recompute, write; print the accuracy before and after."""
    arguments = tyro.cli(Arguments, prog="bdkd update-bn", args=given)
    if arguments.images is not None and arguments.images < 1:
        raise UsageError(f"--images must be at least 1, got {arguments.images}")

    from bdkd.runs.folder import run_of, selected_checkpoint
    from bdkd.runs.update_bn import update_bn

    checkpoint = selected_checkpoint(arguments.path)
    output = arguments.output or run_of(checkpoint) / "update-bn" / checkpoint.name
    if output.exists() and not output.is_file():
        raise UsageError(f"--output must name a file, got {output}")
    if output.exists() and not arguments.force:
        raise RunError(f"{output} exists: --force replaces it, --output names another")
    if output.exists() and output.samefile(checkpoint):
        raise UsageError(f"--output must not be the checkpoint that is read, got {output}")
    done = update_bn(checkpoint, output, arguments.images, arguments.device, arguments.data_root)
    rows = [
        [name, f"{100 * before.top1:.2f}%", f"{100 * after.top1:.2f}%",
         f"{100 * before.ece:.2f}%", f"{100 * after.ece:.2f}%"]
        for name, before, after in done.results
    ]  # fmt: skip
    print(table(["network", "top-1 before", "after", "ECE before", "after"], rows))
    print(f"\n{done.split} images; statistics of {done.images:,} training images\n")
    print(f"written  {output}")
    print(f"use it   bdkd evaluate {output}, bdkd export {output}, or as networks.NAME.weights")
