"""Write the README.md next to exported weights: a model card for the Hugging Face Hub."""

import json
import shlex

from bdkd.config import Recipe, parse_recipe
from bdkd.export.facts import Facts
from bdkd.export.formats import built_without_weights
from bdkd.metrics import METRICS, Metric

Measured = list[tuple[Metric, float]]

MARK = "library_name: bdkd"  # a line of every card that bdkd wrote


def model_card(facts: Facts, file: str) -> str:
    """Return the card of the weights in ``file``, a file in the same folder."""
    recipe = parse_recipe(facts.recipe, source=file, of_run=True)
    options = built_without_weights(recipe.networks[facts.network.removesuffix("_ema")])
    arguments = [repr(facts.model), str(len(facts.classes)), str(facts.channels)]
    arguments += [f"{key}={value!r}" for key, value in options.items()]
    values = [(metric, facts.metrics.get(metric.key)) for metric in METRICS.values()]
    measured = [
        (metric, value)
        for metric, value in values
        if value is not None and (metric.hub or metric.of_samples)
    ]
    plugins = [
        f"# {name} registers the model or other parts of the recipe: import it first"
        if name.endswith(".py") else f"import {name}  # a plugin"
        for name in recipe.plugins
    ]  # fmt: skip
    command = ["bdkd", "evaluate", file]
    command += [] if facts.measured_on in ("", "val") else ["--split", facts.measured_on]
    command += [argument for name in recipe.plugins for argument in ("--plugin", name)]
    load = [
        "from safetensors.torch import load_file", "from bdkd import create_model", *plugins, "",
        f"network = create_model({', '.join(arguments)}).eval()",
        f"network.load_state_dict(load_file({json.dumps(file)}))",
    ]  # fmt: skip
    paragraphs = [
        "\n".join(_front_matter(facts, recipe, measured)),
        f"# {facts.model}, {facts.network} of {recipe.name}",
        f"{facts.parameters:,} parameters, trained as {facts.role} with bdkd: objective "
        f"{facts.method}, seed {facts.seed}, the weights of step {facts.step:,}.",
        "## Load",
        "\n".join(["```python", *load, "```"]),
        "\n".join(_images(facts)),
        f"The {len(facts.classes)} logits are scores of these classes, in this order: "
        f"{', '.join(facts.classes)}.",
        "## Accuracy and calibration",
        "\n".join(_results(facts, file, measured)),
        f"Run `{shlex.join(command)}` to measure these values again.",
        "## Recipe",
        f"```toml\n{facts.recipe.strip()}\n```",
        f"Written by {', '.join(f'{k} {v}' for k, v in facts.versions.items())}.\n",
    ]
    return "\n\n".join(paragraphs)


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
            *(
                f"    - {{type: {metric.hub or metric.key}, value: {value}}}"
                for metric, value in measured
            ),
        ]
    return [*lines, "---"]


def _images(facts: Facts) -> list[str]:
    channels, height, width = facts.input_shape
    shape, norm = f"Images are `(batch, {channels}, {height}, {width})`", facts.normalisation
    if norm is None:
        return [f"{shape}."]
    mean, std = ([float(f"{x:.9g}") for x in values] for values in (norm.mean, norm.std))
    return [
        f"{shape}, pixel values 0 to {norm.largest:g}, normalised by `(value - mean) / std`:",
        "", "```python", f"mean, std = {mean}, {std}", "```",
    ]  # fmt: skip


def _results(facts: Facts, file: str, measured: Measured) -> list[str]:
    if not measured:
        return [f"Not measured yet: run `bdkd evaluate {file}`."]
    where = {"test": "the test images", "val": "the validation images"}.get(facts.measured_on, "")
    count = f"{facts.images:,} images" if facts.images else "images"
    return [
        f"On {where} ({count}), without recalibration. Fractions are in [0, 1] unless noted.",
        "", "| metric | value |", "| --- | --- |",
        *(f"| {metric.description} | {value:.6g} |" for metric, value in measured),
    ]  # fmt: skip
