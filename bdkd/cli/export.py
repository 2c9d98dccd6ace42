"""``bdkd export``: write one network of a run as a file for deployment."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bdkd.cli.flags import parse


@dataclass(frozen=True)
class Arguments:
    """Export one network of a run, with its classes, normalisation and metrics. The file is read
    back, and its logits are compared with those of the network."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """The folder of a run (exports its selected checkpoint) or a checkpoint file."""
    to: Literal["onnx", "export", "safetensors", "timm", "torchvision"]
    """onnx: for ONNX runtimes. export: torch.export's .pt2. safetensors: weights and a model
    card. timm, torchvision: weights of the same network in this library."""
    network: str | None = None
    """Name of the network. Default: the student if there is only one (its moving average if it
    has one)."""
    output: Path | None = None
    """File to write. Default: RUN/export/NETWORK/model.(onnx, pt2 or safetensors), and for a
    library RUN/export/NETWORK/LIBRARY/model.(safetensors or pth)."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace existing files."""
    data_root: str | None = None
    """Folder of the data set, if it has moved since training."""


def run(given: list[str]) -> None:
    """Export the network, and print the files that were written."""
    arguments = parse(Arguments, "bdkd export", given)

    from bdkd.export.export import check_output, export, open_trained
    from bdkd.export.formats import FORMATS
    from bdkd.export.libraries import FILES, check_library_output, export_to_library
    from bdkd.runs.folder import run_of, selected_checkpoint

    to, output = arguments.to, arguments.output
    if to == "timm" or to == "torchvision":
        if output is not None:
            check_library_output(to, output, arguments.force)
    elif output is not None:
        check_output(to, output, arguments.force)
    checkpoint = selected_checkpoint(arguments.path)
    trained = open_trained(checkpoint, arguments.network, arguments.data_root)
    facts = trained.facts
    folder = run_of(checkpoint) / "export" / facts.network
    if to == "timm" or to == "torchvision":
        output = output or folder / to / FILES[to]
        written = export_to_library(trained, to, output, arguments.force)
    else:
        output = output or folder / f"model{FORMATS[to].suffix}"
        written = export(trained, to, output, arguments.force)
    shape = ", ".join(map(str, facts.input_shape))
    size = f"{facts.parameters:,} parameters"
    print(f"{facts.network} ({facts.model}), {size}, of {checkpoint}, step {facts.step}")
    print(f"images (batch, {shape}) float32, normalised; logits (batch, {len(facts.classes)})")
    found = f"{written.error:.2g} on {len(trained.images)} images"
    print(f"read back: logits differ by at most {found} (the largest is {written.largest:.3g})")
    for file in written.files:
        print(f"written  {file}")
