"""``bdkd export``: write one network of a run as self-contained files."""

import contextlib
import copy
import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from bdkd.data import Shard
from bdkd.errors import RunError, UsageError
from bdkd.evaluation.quantized import read_quantized
from bdkd.export.card import CARD, card_of_folder
from bdkd.export.facts import Exported, Facts, Format, Quantization
from bdkd.export.formats import FORMATS, decode, encode, open_network, read_exported
from bdkd.export.measure import measure, saturation_warning
from bdkd.export.onnx_format import replace_facts
from bdkd.export.quantize import float_operators, quantize
from bdkd.export.temperature import check_fit, fold_temperature
from bdkd.export.trained import Trained, measured
from bdkd.runs.checkpoint import explain_oserror, write_atomically
from bdkd.runs.folder import to_json
from bdkd.runs.summary import evaluator_of

DEFAULT_CALIBRATION_IMAGES = 512
PROFILED_IMAGES = 8
# Relative to the largest logit. Kernels sum in another order and batch norm is folded into weights,
# which gives errors of 1e-7 to 1e-5 in float32. A wrong graph gives errors as large as the logits.
TOLERANCE = 1e-4
INT8 = "-int8"  # at the end of the name of an int8 file


class Options(NamedTuple):
    """Options of an export."""

    quantize: bool = False
    """Also write an int8 file. Only ONNX."""
    calibration_images: int | None = None
    """Validation images for the ranges of activations. Default: 512, or all if there are fewer."""
    fit_temperature: bool = False
    """Fold the temperature that fits the validation images into the last layer."""
    evaluate: bool = True
    """Measure a changed network on the test images."""


PLAIN = Options()


class Written(NamedTuple):
    """The result of an export."""

    output: Path  # the requested file
    files: list[Path]
    error: float  # largest difference between the logits of the network and of the fp32 file
    largest: float  # largest absolute logit
    facts: Facts  # of ``output``
    summary: dict[str, Any] | None = None  # what ``bdkd evaluate`` prints of that file
    notes: tuple[str, ...] = ()


class _File(NamedTuple):
    exported: Exported
    trained: Trained  # the network that it was made from

    def network(self) -> nn.Module:
        """Return the network of the file, read back."""
        plain = copy.deepcopy(self.trained.network)
        return open_network(self.exported, plain, torch.device("cpu"))


def export(
    trained: Trained, kind: Format, output: Path, force: bool, options: Options = PLAIN
) -> Written:
    """Write a network to a file. Before writing, the content is read back and run on several images
    and on one image, and the logits are compared with those of the network.

    Args:
        output: path of the file. A model card is written next to it. ``options.quantize`` also
            writes the fp32 file, and compares the int8 file with it.
        force: replace existing files.

    Raises:
        UsageError: the file name does not have the suffix of its format, or there are fewer
            validation images than ``options.calibration_images``.
        RunError: a file exists, a file cannot be written, the file computes different logits, the
            network cannot be quantised, or no temperature can be fitted or folded.
    """
    check_output(kind, output, force, options)
    if options.quantize or options.fit_temperature:
        check_validation_images(trained, options)
    if options.fit_temperature:
        trained = with_temperature(trained, trained.network)
    path = baseline_of(output) if options.quantize else output
    file = _encoded(trained, kind, path)
    error, largest = same_logits(trained, kind, file.network())
    baseline: _File | None = None
    keep_baseline = False
    notes: tuple[str, ...] = ()
    if options.quantize:
        keep_baseline = _is_written(file.exported, force)
        images = _calibration_images(trained, options)
        baseline, file = file, _quantized(file, images, output)
        if options.fit_temperature:
            refitted = with_temperature(file.trained, file.network())
            file = _quantized(_encoded(refitted, kind, path), images, output, baseline)
        notes = _check_int8(file, images)
    changed = options.quantize or options.fit_temperature
    summary: dict[str, Any] | None = None
    if changed and options.evaluate:
        if baseline is not None and options.fit_temperature:
            baseline, _ = _evaluated(baseline, None)
        file, summary = _evaluated(file, baseline)
    contents = {file.exported.path: file.exported.content}
    if baseline is not None and not keep_baseline:
        contents = {baseline.exported.path: baseline.exported.content} | contents
    if summary is not None:
        _set_sizes(summary, contents, file.exported, baseline and baseline.exported)
        contents[output.with_suffix(".json")] = f"{to_json(summary, indent=2)}\n".encode()
    files = write_files(contents)
    if options.quantize and summary is None:
        _remove_comparison(output.with_suffix(".json"))  # of the file that was replaced
    card, note = card_of_folder(file.exported, force)
    if card is not None:
        files += write_files({output.with_name(CARD): card.encode()})
    notes += (note,) if note else ()
    return Written(output, files, error, largest, file.exported.facts, summary, notes)


def baseline_of(output: Path) -> Path:
    """Return the path of the fp32 file that is written with an int8 file."""
    if output.stem.endswith(INT8):
        return output.with_name(output.stem.removesuffix(INT8) + output.suffix)
    return output.with_name(f"{output.stem}-fp32{output.suffix}")


def check_validation_images(trained: Trained, options: Options) -> None:
    """Raise an error if a run has too few validation images for the options."""
    there, asked = trained.components.source.info.counts["val"], options.calibration_images
    if there == 0:
        option = "--quantize" if options.quantize else "--temperature"
        raise RunError(
            f"{option} needs validation images, and the run has none (data.validation is 0): train "
            "again with --data.validation 0.1 (training images would bias the result, and test "
            "images must stay unseen)"
        )
    if asked is not None and asked > there:
        raise UsageError(
            f"--calibration-images must be at most {there}, the number of validation images, got "
            f"{asked}"
        )


def _calibration_images(trained: Trained, options: Options) -> np.ndarray:
    """Return evenly spaced images of the validation split, (N, C, H, W) float32."""
    source = trained.components.source
    there = source.info.counts["val"]
    count = options.calibration_images or min(there, DEFAULT_CALIBRATION_IMAGES)
    batches = source.eval_batches("val", count, Shard(0, there // count))
    images = torch.cat([batch.views[0] for batch in batches])[:count].float().contiguous()
    found, wanted = tuple(images.shape[1:]), trained.facts.input_shape
    if found != wanted:
        raise RunError(
            f"the validation images have the shape {found}, and the network takes {wanted}: "
            "restore the data set, or pass its folder with --data-root"
        )
    return images.numpy()


def with_temperature(trained: Trained, network: nn.Module) -> Trained:
    """Fit the temperature of ``network`` on the validation images, and fold it into the last layer
    of ``trained``. The two may differ, for example because ``network`` is the int8 file."""
    facts = trained.facts
    evaluator = evaluator_of(trained.components, {facts.network: network})
    fitted = evaluator.fit_temperatures()[facts.network]
    temperature = check_fit(fitted, f"{facts.network} ({facts.model})")
    folded = fold_temperature(trained.network, temperature, trained.images, facts.network)
    facts = dataclasses.replace(
        facts, temperature=facts.temperature * temperature, **measured("", 0, {})
    )
    return trained._replace(network=folded, facts=facts)


def _encoded(trained: Trained, kind: Format, path: Path) -> _File:
    content = encode(kind, trained.network, trained.facts)
    return _File(decode(path, kind, content), trained)


def _quantized(
    fp32: _File, images: np.ndarray, output: Path, baseline: _File | None = None
) -> _File:
    """Return the int8 file of an fp32 file.

    Args:
        baseline: the fp32 file to compare with. Default: ``fp32``.
    """
    compared = (baseline or fp32).exported
    made = Quantization(len(images), compared.path.name, compared.weights)
    facts = dataclasses.replace(fp32.trained.facts, quantization=made, **measured("", 0, {}))
    content = quantize(fp32.exported, images, facts)
    return _File(decode(output, "onnx", content), fp32.trained)


@torch.inference_mode()
def _check_int8(file: _File, images: np.ndarray) -> tuple[str, ...]:
    """Check that the logits of an int8 file do not depend on the batch size. Return notes about
    operators that stay in floating point."""
    trained, network = file.trained, file.network()
    together = network(trained.images)
    single = torch.cat([network(image) for image in trained.images.split(1)])
    if not torch.equal(together, single):
        error = (together - single).abs().max().item()
        raise RunError(
            f"the int8 logits of {trained.facts.network} depend on the batch size: they differ by "
            f"{error:.2g} (largest {together.abs().max().item():.3g}); nothing was written"
        )
    notes = []
    if operators := float_operators(file.exported, images[:PROFILED_IMAGES]):
        named = ", ".join(f"{name} ({_percent(share)})" for name, share in operators.items())
        notes.append(f"operators computed in float (share of the time on this machine): {named}")
    if warning := saturation_warning(file.exported):
        notes.append(warning)
    return tuple(notes)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def _evaluated(file: _File, baseline: _File | None) -> tuple[_File, dict[str, Any]]:
    """Measure a file on the test images. Return the file with its metrics added, and the
    summary."""
    exported, trained = file.exported, file.trained
    count = trained.components.source.info.counts["test"]
    print(
        f"evaluating {exported.path.name} on {count:,} test images (--no-evaluate skips this)",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    against = None if baseline is None else baseline.exported
    summary = measure(exported, trained.components, "test", against)
    facts = dataclasses.replace(
        exported.facts,
        **measured("test", count, summary["networks"][exported.facts.network]),
    )
    if facts.quantization is not None and (compared := summary.get("comparison")):
        made = dataclasses.replace(
            facts.quantization, changes=compared["changes"], agreement=compared["agreement"]
        )
        facts = dataclasses.replace(facts, quantization=made)
    return _File(with_other_facts(exported, facts, trained.network), trained), summary


def _remove_comparison(path: Path) -> None:
    """Remove the file at ``path`` if it is the comparison of an earlier int8 file. A file with
    other content is kept."""
    with contextlib.suppress(OSError, ValueError):
        read_quantized(path)
        path.unlink()


def _set_sizes(
    summary: dict[str, Any], contents: Mapping[Path, bytes], exported: Exported,
    baseline: Exported | None,
) -> None:  # fmt: skip
    """Set the sizes of files in a summary. The sizes in it are out of date, because storing the
    metrics in the files changed them."""
    summary["networks"][exported.facts.network]["bytes"] = len(exported.content)
    if baseline is not None:
        written = contents.get(baseline.path)
        size = baseline.path.stat().st_size if written is None else len(written)
        summary["comparison"]["bytes"] = size


def with_other_facts(exported: Exported, facts: Facts, network: nn.Module) -> Exported:
    """Return a file with the same weights and other facts."""
    if exported.format == "onnx":
        content = replace_facts(exported, facts)
    else:
        content = encode(exported.format, network, facts)
    return decode(exported.path, exported.format, content)


def _is_written(exported: Exported, force: bool) -> bool:
    """Return whether an fp32 file with these weights exists already. Raise ``RunError`` if a
    different file exists and ``force`` is False."""
    if not force:
        with contextlib.suppress(RunError):  # missing or damaged
            if read_exported(exported.path).weights == exported.weights:
                return True
    refuse_existing(exported.path, force)
    return False


def write_files(contents: Mapping[Path, bytes]) -> list[Path]:
    """Write files and return their paths. Raise ``RunError`` if one cannot be written."""
    for path, content in contents.items():
        with explain_oserror(f"cannot write {path}", "choose another --output"):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content, "run the same command again, or choose another --output")
    return list(contents)


def refuse_existing(path: Path, force: bool) -> None:
    """Raise ``RunError`` if a file exists and ``force`` is False."""
    if path.exists() and not force:
        raise RunError(f"{path} exists: --force replaces it, --output names another")


def check_output(kind: Format, output: Path, force: bool, options: Options = PLAIN) -> None:
    """Raise ``UsageError`` or ``RunError`` for an output that cannot be written."""
    if output.suffix != (suffix := FORMATS[kind].suffix) or output.is_dir():
        raise UsageError(f"--output must be a file named *{suffix} with --to {kind}, got {output}")
    refuse_existing(output, force)
    if output.stem == INT8:
        raise UsageError(f"--output needs a name before {INT8}, such as model{INT8}, got {output}")
    if options.quantize or options.fit_temperature:
        refuse_existing(output.with_suffix(".json"), force)


@torch.inference_mode()
def same_logits(trained: Trained, kind: str, read_back: nn.Module) -> tuple[float, float]:
    """Return the largest difference between the logits of the network and of the file that was read
    back, and the largest logit. Raise ``RunError`` if they differ by more than rounding."""
    network = trained.network
    inputs = (trained.images, trained.images[:1])
    expected = torch.cat([network(images) for images in inputs])
    error = (expected - torch.cat([read_back(images) for images in inputs])).abs().max().item()
    largest = expected.abs().max().item()
    if not math.isfinite(largest):
        raise RunError(
            f"the logits of {trained.facts.network} are not finite, because its weights contain "
            "NaN or infinity: export another checkpoint; nothing was written"
        )
    if not error <= TOLERANCE * max(1.0, largest):  # also refuses NaN
        raise RunError(
            f"the {kind} file gives different logits from {trained.facts.network}: they differ by "
            f"{error:.2g} (largest {largest:.3g}); nothing was written"
        )
    return error, largest
