"""``bdkd export``: one network of a run, for those who have no use for the rest of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Arguments:
    """Write the student alone, with what whoever runs it needs to know; read back and compared."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """A run's folder (its selected checkpoint is taken) or one checkpoint file."""
    to: Literal["onnx", "export", "safetensors"]
    """onnx: for ONNX runtimes; export: torch.export's .pt2; safetensors: weights and a model
    card."""
    network: str | None = None
    """Any network of the run, by name; without it the one student (its average, where it has
    one)."""
    output: Path | None = None
    """The file to write; without it RUN/export/NETWORK/model.(onnx, pt2 or safetensors)."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace what is there."""
    data_root: str | None = None
    """Folder of the data set, where it has moved since the training."""


def run(given: list[str]) -> None:
    """Parse, export, say what was written."""
    arguments = tyro.cli(Arguments, prog="bdkd export", args=given)

    from bdkd.export.export import check_output, export, open_trained
    from bdkd.export.formats import FORMATS
    from bdkd.runs.folder import run_of, selected_checkpoint

    if arguments.output is not None:
        check_output(arguments.to, arguments.output, arguments.force)
    checkpoint = selected_checkpoint(arguments.path)
    trained = open_trained(checkpoint, arguments.network, arguments.data_root)
    facts = trained.facts
    output = arguments.output or (
        run_of(checkpoint) / "export" / facts.network / f"model{FORMATS[arguments.to].suffix}"
    )
    written = export(trained, arguments.to, output, arguments.force)
    shape = ", ".join(map(str, facts.input_shape))
    print(
        f"{facts.network} ({facts.model}), {facts.parameters:,} parameters, of {checkpoint}, step "
        f"{facts.step}"
    )
    print(f"images (batch, {shape}) float32, normalised; logits (batch, {len(facts.classes)})")
    print(
        f"read back: logits differ by at most {written.error:.2g} on {len(trained.images)} images "
        f"(the largest is {written.largest:.3g})"
    )
    for file in written.files:
        print(f"written  {file}")
