"""Write the README.md next to exported files: a model card for the Hugging Face Hub."""

import hashlib
import json
import shlex
from collections.abc import Sequence

from bdkd.config import Recipe, parse_recipe
from bdkd.errors import RunError
from bdkd.export.facts import Exported, Facts
from bdkd.export.formats import FORMATS, built_without_weights, read_exported
from bdkd.metrics import METRICS, Metric

CARD = "README.md"
MARK = "library_name: bdkd"  # a line of every card that bdkd wrote
_SEAL = "<!-- written by bdkd export; sha256 of the text above: "


def card_of_folder(exported: Exported, force: bool) -> tuple[str | None, str]:
    """Return the new model card of a file's folder, or None and why the existing card is kept.

    The card describes all exported files of the same network in the folder.

    Args:
        exported: the file that was written last.
        force: replace a card that was edited, or that describes another network.
    """
    card = exported.path.with_name(CARD)
    if card.exists():
        text = card.read_text("utf-8", "replace") if card.is_file() else ""
        if MARK not in text:
            return None, f"{card} is not a model card of bdkd: it was left as it is"
        if not force and describe(exported.facts) not in text:
            return (
                None,
                f"{card} describes another network: it was left as it is (--force replaces it)",
            )
        if not force and not _is_sealed(text):
            return None, f"{card} was edited: it was left as it is (--force replaces it)"
    files = [exported]
    for path in sorted(exported.path.parent.iterdir()):
        if path.suffix in (known.suffix for known in FORMATS.values()) and path != exported.path:
            try:
                sibling = read_exported(path)
            except RunError:  # not written by bdkd export, or damaged
                continue
            same = describe(sibling.facts) == describe(exported.facts)
            if same and sibling.facts.recipe == exported.facts.recipe:
                files.append(sibling)
    order = list(FORMATS)
    files.sort(key=lambda f: (order.index(f.format), f.facts.precision, f.path.name))
    text = model_card(files)
    return f"{text}\n{_SEAL}{_digest(text)} -->\n", ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_sealed(card: str) -> bool:
    """Return whether a card is unchanged since ``bdkd export`` wrote it."""
    text, seal, digest = card.rpartition(f"\n{_SEAL}")
    return bool(seal) and digest == f"{_digest(text)} -->\n"


def describe(facts: Facts) -> str:
    """Return one sentence that identifies the network of a file."""
    return (
        f"{facts.parameters:,} parameters, trained as {facts.role} with bdkd: objective "
        f"{facts.method}, seed {facts.seed}, the weights of step {facts.step:,}."
    )


def model_card(files: Sequence[Exported]) -> str:
    """Return the card of files of one network in the same folder."""
    facts = files[0].facts
    recipe = parse_recipe(facts.recipe, source=files[0].path.name, of_run=True)
    versions = ", ".join(f"{k} {v}" for k, v in facts.versions.items())
    paragraphs = [
        "\n".join(_front_matter(_variants(files), recipe)),
        f"# {facts.model}, {facts.network} of {recipe.name}",
        describe(facts),
        "## Files",
        "\n".join(["| file | precision | bytes |", "| --- | --- | ---: |", *map(_row, files)]),
        *_loads(files, recipe),
        "\n".join(_images(facts)),
        f"The {len(facts.classes)} logits are scores of these classes, in this order: "
        f"{', '.join(facts.classes)}.",
        "## Accuracy and calibration",
        *_results(files, recipe),
        "## Recipe",
        f"```toml\n{facts.recipe.strip()}\n```",
        f"Written by {versions}.\n",
    ]
    return "\n\n".join(paragraphs)


def _row(file: Exported) -> str:
    facts = file.facts
    precision: str = facts.precision
    if facts.quantization is not None:
        precision += (
            ": int8 weights with a scale for each channel, uint8 activations with ranges from "
            f"{facts.quantization.calibration_images:,} validation images"
        )
    if facts.temperature != 1:
        precision += f"; logits divided by the temperature {facts.temperature:.4g}"
    return f"| `{file.path.name}` | {precision} | {len(file.content):,} |"


def _variants(files: Sequence[Exported]) -> dict[str, Facts]:
    """Return the facts of measured files, one for each precision and temperature. The keys are
    labels such as ``int8, T = 1.5``."""
    found: dict[str, Facts] = {}
    for file in files:
        facts = file.facts
        label: str = facts.precision
        label += f", T = {facts.temperature:.4g}" if facts.temperature != 1 else ""
        if facts.metrics:
            found.setdefault(label, facts)
    return found


def _shown(facts: Facts) -> list[tuple[Metric, float]]:
    values = [(metric, facts.metrics.get(metric.key)) for metric in METRICS.values()]
    return [
        (metric, value)
        for metric, value in values
        if value is not None and (metric.hub or metric.of_samples)
    ]


def _front_matter(variants: dict[str, Facts], recipe: Recipe) -> list[str]:
    lines = [
        "---", MARK, "pipeline_tag: image-classification",
        "tags: [knowledge-distillation, bd-kd, calibration]",
    ]  # fmt: skip
    if variants:
        source = json.dumps(recipe.data.source)
        network = next(iter(variants.values())).network
        lines += ["model-index:", f"- name: {json.dumps(f'{recipe.name}-{network}')}", "  results:"]
    for label, facts in variants.items():
        lines += [
            "  - task: {type: image-classification}",
            f"    dataset: {{type: {source}, name: {source}, split: {facts.measured_on}, "
            f"args: {{precision: {json.dumps(label)}}}}}",
            "    metrics:",
            *(
                f"    - {{type: {metric.hub or metric.key}, value: {value}}}"
                for metric, value in _shown(facts)
            ),
        ]
    return [*lines, "---"]


def _loads(files: Sequence[Exported], recipe: Recipe) -> list[str]:
    """Return the section about loading the files."""
    by_format = {file.format: file.path.name for file in reversed(files)}
    sections = ["## Load"]
    if name := by_format.get("onnx"):
        names = " or ".join(f"`{file.path.name}`" for file in files if file.format == "onnx")
        load = f"session = onnxruntime.InferenceSession({json.dumps(name)})"
        images, run = _random_images(files[0].facts), 'session.run(["logits"], {"images": images})'
        code = ["import numpy as np", "import onnxruntime", "", *images, load, f"[logits] = {run}"]
        sections += [f"{names} with onnxruntime:", "\n".join(["```python", *code, "```"])]
    if name := by_format.get("export"):
        program = f"program = torch.export.load({json.dumps(name)}).module()"
        sections += [
            f"`{name}` with PyTorch. `torch.export.load` unpickles, so load only files that you "
            "trust.",
            "\n".join(["```python", "import torch", "", program, "```"]),
        ]
    if name := by_format.get("safetensors"):
        facts = files[0].facts
        options = built_without_weights(recipe.networks[facts.network.removesuffix("_ema")])
        arguments = [repr(facts.model), str(len(facts.classes)), str(facts.channels)]
        arguments += [f"{key}={value!r}" for key, value in options.items()]
        plugins = [
            f"# {name} registers the model or other parts of the recipe: import it first"
            if name.endswith(".py") else f"import {name}  # a plugin"
            for name in recipe.plugins
        ]  # fmt: skip
        code = [
            "from safetensors.torch import load_file", "from bdkd import create_model", *plugins,
            "", f"network = create_model({', '.join(arguments)}).eval()",
            f"network.load_state_dict(load_file({json.dumps(name)}))",
        ]  # fmt: skip
        sections.append("\n".join(["```python", *code, "```"]))
    return sections


def _images(facts: Facts) -> list[str]:
    channels, height, width = facts.input_shape
    shape, norm = f"Images are `(batch, {channels}, {height}, {width})`", facts.normalisation
    if norm is None:
        return [f"{shape}."]
    mean, std = ([float(f"{x:.9g}") for x in values] for values in (norm.mean, norm.std))
    return [
        f"{shape}, pixel values 0 to {norm.largest:g}, normalised by `(value - mean) / std`:",
        "", "```python", f"mean, std = {mean}, {std}", "```",
        "", "with one value for each channel.",
    ]  # fmt: skip


def _random_images(facts: Facts) -> list[str]:
    """Return lines of Python that make a batch of normalised random images."""
    shape, norm = (4, *facts.input_shape), facts.normalisation
    random = f"np.random.default_rng(0).random({shape}, np.float32)"
    if norm is None:
        return [f"images = {random}  # your images"]
    mean, std = (
        f"np.array({[float(f'{x:.9g}') for x in values]}, np.float32).reshape(1, -1, 1, 1)"
        for values in (norm.mean, norm.std)
    )
    return [
        f"pixels = {norm.largest:g} * {random}  # your images",
        f"images = (pixels - {mean}) / {std}",
    ]


def _results(files: Sequence[Exported], recipe: Recipe) -> list[str]:
    variants, name = _variants(files), files[0].path.name
    if not variants:
        return [f"Not measured yet: run `bdkd evaluate {name}`."]
    first = next(iter(variants.values()))
    where = {"test": "the test images", "val": "the validation images"}.get(first.measured_on, "")
    count = f"{first.images:,} images" if first.images else "images"
    unmeasured = [file.path.name for file in files if not file.facts.metrics]
    missing = f" Not measured: {', '.join(unmeasured)}." if unmeasured else ""
    paragraphs = [
        f"On {where} ({count}) of {recipe.data.source}. Accuracies and calibration errors are "
        f"fractions.{missing}",
        "\n".join([
            f"| metric | {' | '.join(variants)} |", f"| --- |{' ---: |' * len(variants)}",
            *(_metric_row(metric, variants) for metric, _ in _shown(first)),
        ]),
    ]  # fmt: skip
    for facts in variants.values():
        if facts.quantization and facts.quantization.baseline in [f.path.name for f in files]:
            paragraphs += _changes(facts)
    name = next((f.path.name for f in files if f.facts.precision == "int8"), name)
    command = ["bdkd", "evaluate", name]
    command += [] if first.measured_on in ("", "val") else ["--split", first.measured_on]
    command += [argument for plugin in recipe.plugins for argument in ("--plugin", plugin)]
    return [*paragraphs, f"Run `{shlex.join(command)}` to measure these values again."]


def _metric_row(metric: Metric, variants: dict[str, Facts]) -> str:
    values = [facts.metrics.get(metric.key) for facts in variants.values()]
    shown = ["–" if value is None else f"{value:.6g}" for value in values]
    return f"| {metric.description} | {' | '.join(shown)} |"


def _changes(facts: Facts) -> list[str]:
    """Return the changes of an int8 file from its fp32 file, with intervals."""
    made = facts.quantization
    if made is None or not made.changes:
        return []
    rows = []
    for key, change in made.changes.items():
        values = [change[name] for name in ("difference", "low", "high")]
        if key in METRICS and None not in values:
            difference, low, high = (f"{value:+.4g}" for value in values)
            rows.append(f"| {METRICS[key].description} | {difference} | {low} to {high} |")
    text = f"Changes of int8 from `{made.baseline}`, with intervals over the images"
    agreement = made.agreement
    if agreement is not None and agreement["value"] is not None:
        shown = [f"{agreement[key] or 0:.2%}" for key in ("value", "low", "high")]
        text += ". The predictions of {} of the images are equal (95% interval {} to {})".format(
            *shown
        )
    header = ["| metric | int8 - fp32 | 95% interval |", "| --- | ---: | ---: |"]
    return [f"{text}.", "\n".join([*header, *rows])]
