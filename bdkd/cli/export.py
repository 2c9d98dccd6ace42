"""``bdkd export``: write one network of a run as files for deployment."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bdkd.cli.flags import parse
from bdkd.config import Count
from bdkd.errors import RunError, UsageError

if TYPE_CHECKING:
    from bdkd.export.export import Options, Written
    from bdkd.export.trained import Trained


@dataclass(frozen=True)
class Arguments:
    """Export one network of a run, with its classes, normalisation and metrics. The file is read
    back, and its logits are compared with those of the network."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """The folder of a run (exports its selected checkpoint) or a checkpoint file."""
    to: Literal["onnx", "export", "safetensors", "timm", "torchvision"]
    """onnx: an ONNX file. export: a .pt2 file of torch.export. safetensors: weights and a model
    card. timm, torchvision: weights for the same network in this library."""
    quantize: Literal["int8"] | None = None
    """With --to onnx: also write an int8 file, calibrated on validation images, and compare its
    accuracy and calibration with the fp32 file on the test images."""
    calibration_images: Count | None = None
    """Number of validation images that --quantize uses for the ranges of the activations.
    Default: 512, or all if there are fewer."""
    temperature: Literal["fitted"] | None = None
    """Divide the last layer by the temperature that fits the validation images, so that the softmax
    of the logits is better calibrated."""
    evaluate: bool = True
    """With --quantize or --temperature: measure the files on the test images."""
    network: str | None = None
    """Name of the network. Default: the student if there is only one (its moving average if it
    has one)."""
    output: Path | None = None
    """File to write. Default: RUN/export/NETWORK/model.(onnx, pt2 or safetensors), model-int8.onnx
    with --quantize, and for a library RUN/export/NETWORK/LIBRARY/model.(safetensors or pth)."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace existing files."""
    data_root: str | None = None
    """Folder of the data set, if it has moved since training."""


def run(given: list[str]) -> None:
    """Export the network, and print the files that were written."""
    arguments = parse(Arguments, "bdkd export", given)
    options = _options(arguments)

    from bdkd.export.export import check_output
    from bdkd.export.libraries import check_library_output
    from bdkd.export.trained import open_trained
    from bdkd.runs.folder import selected_checkpoint

    _refuse_exported(arguments.path)
    to, output = arguments.to, arguments.output
    if output is not None and (to == "timm" or to == "torchvision"):
        check_library_output(to, output, arguments.force)
    elif output is not None and to != "timm" and to != "torchvision":
        check_output(to, output, arguments.force, options)
    checkpoint = selected_checkpoint(arguments.path)
    trained = open_trained(checkpoint, arguments.network, arguments.data_root)
    written = _export(arguments, checkpoint, trained, options)
    _print(written, checkpoint, len(trained.images))


def _options(arguments: Arguments) -> "Options":
    """Return the options. Raise ``UsageError`` if they cannot be combined."""
    from bdkd.export.export import Options

    quantize, to = arguments.quantize is not None, arguments.to
    if quantize and to != "onnx":
        raise UsageError(f"--quantize needs --to onnx, got --to {to}")
    if arguments.calibration_images is not None and not quantize:
        raise UsageError("--calibration-images needs --quantize int8")
    fit = arguments.temperature is not None
    if not arguments.evaluate and not (quantize or fit):
        raise UsageError("--no-evaluate needs --quantize or --temperature: add one, or omit it")
    return Options(quantize, arguments.calibration_images, fit, arguments.evaluate)


def _refuse_exported(path: Path) -> None:
    """Raise ``RunError`` if a path is an exported file."""
    from bdkd.export.formats import is_exported, read_exported

    if not is_exported(path) or path.is_dir():
        return
    precision = read_exported(path).facts.precision
    again = "it is quantised already; " if precision == "int8" else ""
    raise RunError(f"{path} is an exported file ({precision}): {again}give the folder of its run")


def _export(
    arguments: Arguments, checkpoint: Path, trained: "Trained", options: "Options"
) -> "Written":
    from bdkd.export.export import INT8, export
    from bdkd.export.formats import FORMATS
    from bdkd.export.libraries import FILES, export_to_library
    from bdkd.runs.folder import run_of

    to, output, force = arguments.to, arguments.output, arguments.force
    folder = run_of(checkpoint) / "export" / trained.facts.network
    if to == "timm" or to == "torchvision":
        output = output or folder / to / FILES[to]
        return export_to_library(trained, to, output, force, options)
    name = f"model{INT8}" if options.quantize else "model"
    output = output or folder / f"{name}{FORMATS[to].suffix}"
    return export(trained, to, output, force, options)


def _print(written: "Written", checkpoint: Path, images: int) -> None:
    facts = written.facts
    shape = ", ".join(map(str, facts.input_shape))
    size = f"{facts.parameters:,} parameters"
    print(f"{facts.network} ({facts.model}), {size}, of {checkpoint}, step {facts.step}")
    print(f"images (batch, {shape}) float32, normalised; logits (batch, {len(facts.classes)})")
    found = f"{written.error:.2g} on {images} images"
    print(
        f"read back: logits differ by at most {found} (the largest logit is {written.largest:.3g})"
    )
    if facts.temperature != 1:
        print(f"temperature {facts.temperature:.4g}, folded into the last layer")
    if written.summary is not None:
        from bdkd.cli.evaluate import described

        print(f"\n{described(written.summary)}\n")
    for note in written.notes:
        print(note)
    for file in written.files:
        print(f"written  {file}")
    if facts.quantization is not None:
        names = (facts.quantization.baseline, written.output.name)
        paths = [shlex.quote(str(written.output.with_name(name))) for name in names]
        print(f"measure the latency    bdkd benchmark {' '.join(paths)}")
