"""``bdkd update-bn``: recompute the batch norm statistics of a run's networks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdkd.cli.flags import parse
from bdkd.cli.table import table
from bdkd.errors import RunError, UsageError


@dataclass(frozen=True)
class Arguments:
    """Recompute the batch norm statistics of every network of a run on training images, and write
    a new checkpoint. The run does not change. Use this command if a warning about averaged networks
    recommends it, or after changing weights manually."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """The folder of a run (reads its selected checkpoint) or a checkpoint file."""
    images: int | None = None
    """Number of training images to use. Default: one epoch."""
    output: Path | None = None
    """Checkpoint to write. Default: RUN/update-bn/NAME_OF_THE_CHECKPOINT."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    data_root: str | None = None
    """Folder of the data set, if it has moved since training."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace the output if it exists."""


def run(given: list[str]) -> None:
    """Write the new checkpoint, and print the accuracy before and after."""
    arguments = parse(Arguments, "bdkd update-bn", given)
    if arguments.images is not None and not 1 <= arguments.images < 2**31:
        raise UsageError(f"--images must be at least 1 and below 2**31, got {arguments.images}")

    from bdkd.runs.folder import run_of, selected_checkpoint
    from bdkd.runs.update_bn import update_bn

    checkpoint = selected_checkpoint(arguments.path)
    output = arguments.output or run_of(checkpoint) / "update-bn" / checkpoint.name
    if output.exists():
        if not output.is_file():
            raise UsageError(f"--output must name a file, got {output}")
        if not arguments.force:
            raise RunError(f"{output} exists: --force replaces it, --output names another")
        if output.samefile(checkpoint):
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
