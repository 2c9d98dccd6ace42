"""The README.md next to exported weights, in the format of Hugging Face's hub."""

import json

from bdkd.config import Recipe, parse_recipe
from bdkd.export.facts import Facts
from bdkd.export.formats import built_without_weights
from bdkd.metrics import METRICS, Metric

Measured = list[tuple[Metric, float]]

MARK = "library_name: bdkd"  # marks a card that bdkd wrote


def model_card(facts: Facts, file: str) -> str:
    """Return the card of the weights in ``file``, a name in the same folder."""
    recipe = parse_recipe(facts.recipe, source=file)
    options = built_without_weights(recipe.networks[facts.network.removesuffix("_ema")])
    arguments = [repr(facts.model), str(len(facts.classes)), str(facts.channels)]
    arguments += [f"{key}={value!r}" for key, value in options.items()]
    measured = [
        (metric, value)
        for metric in METRICS
        if metric.hub and (value := facts.metrics.get(metric.key)) is not None
    ]
    return "\n".join(
        (
            *_front_matter(facts, recipe, measured),
            "",
            f"# {facts.model}, {facts.network} of {recipe.name}",
            "",
            f"{facts.parameters:,} parameters, trained as {facts.role} by bdkd: method "
            f"{facts.method}, seed {facts.seed}, the weights of step {facts.step:,}.",
            "",
            "## Load",
            "",
            "```python",
            "from safetensors.torch import load_file",
            "from bdkd import create_model",
            "",
            f"network = create_model({', '.join(arguments)}).eval()",
            f"network.load_state_dict(load_file({json.dumps(file)}))",
            "```",
            "",
            *_images(facts),
            "",
            f"The {len(facts.classes)} logits mean, in this order: {', '.join(facts.classes)}.",
            "",
            "## Accuracy and calibration",
            "",
            *_results(facts, file, measured),
            "",
            f"`bdkd evaluate {file}` measures it again.",
            "",
            "## Recipe",
            "",
            "```toml",
            facts.recipe.strip(),
            "```",
            "",
            f"Written by {', '.join(f'{k} {v}' for k, v in facts.versions.items())}.",
            "",
        )
    )


def _front_matter(facts: Facts, recipe: Recipe, measured: Measured) -> list[str]:
    lines = [
        "---", MARK, "pipeline_tag: image-classification",
        "tags: [knowledge-distillation, bd-kd, calibration]",
    ]  # fmt: skip
    if measured:
        source = json.dumps(recipe.data.source)
        lines += [
            "model-index:",
            f"- name: {json.dumps(f'{recipe.name}-{facts.network}')}",
            "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{type: {source}, name: {source}, split: {facts.measured_on}}}",
            "    metrics:",
            *(f"    - {{type: {metric.hub}, value: {value}}}" for metric, value in measured),
        ]
    return [*lines, "---"]


def _images(facts: Facts) -> list[str]:
    channels, height, width = facts.input_shape
    shape, norm = f"Images are `(batch, {channels}, {height}, {width})`", facts.normalisation
    if norm is None:
        return [f"{shape}."]
    mean, std = ([float(f"{x:.9g}") for x in values] for values in (norm.mean, norm.std))
    return [
        f"{shape}, pixel values 0 to {norm.largest:g}, and by channel `(value - mean) / std`:",
        "", "```python", f"mean, std = {mean}, {std}", "```",
    ]  # fmt: skip


def _results(facts: Facts, file: str, measured: Measured) -> list[str]:
    if not measured:
        return [f"Not measured where this was written: `bdkd evaluate {file}` does it."]
    where = {"test": "the test images", "val": "the validation images"}.get(facts.measured_on, "")
    count = f"{facts.images:,} images" if facts.images else "images"
    return [
        f"On {where} ({count}), nothing recalibrated; fractions in [0, 1] unless said otherwise.",
        "", "| metric | value |", "| --- | --- |",
        *(f"| {metric.description} | {value:.6g} |" for metric, value in measured),
    ]  # fmt: skip
