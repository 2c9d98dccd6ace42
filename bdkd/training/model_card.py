"""The README.md beside exported weights, in the form that Hugging Face's hub reads."""

import json

from bdkd.config import parse_recipe
from bdkd.training.exported import Facts, built_without_weights

MARK = "library_name: bdkd"  # by which a card of ours is known

# Our name, the hub's metric type, and what a reader calls it; fractions unless said otherwise.
METRICS = {
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("top_5_accuracy", "top-5 accuracy"),
    "nll": ("nll", "negative log likelihood, nats"),
    "brier": ("brier_score", "Brier score"),
    "ece": ("expected_calibration_error", "expected calibration error (ECE), 15 bins"),
    "ece_if_calibrated": ("ece_if_calibrated", "ECE of a perfectly calibrated network, so many "
                          "images"),
    "mce": ("maximum_calibration_error", "largest gap of a bin (MCE)"),
    "adaptive_ece": ("adaptive_ece", "ECE over 15 bins of equal count"),
    "classwise_ece": ("classwise_ece", "ECE class by class"),
    "entropy": ("entropy", "mean entropy of the predictions, nats"),
}  # fmt: skip


def model_card(facts: Facts, file: str) -> str:
    """The card of the weights in ``file``, a name in the same folder."""
    recipe = parse_recipe(facts.recipe, source=file)
    options = built_without_weights(recipe.networks[facts.network.removesuffix("_ema")])
    arguments = [repr(facts.model), str(len(facts.classes)), str(facts.channels)]
    arguments += [f"{key}={value!r}" for key, value in options.items()]
    channels, height, width = facts.input_shape
    norm = facts.normalisation
    measured = {key: facts.metrics[key] for key in METRICS if facts.metrics.get(key) is not None}
    where = {"test": "the test images", "val": "the validation images"}.get(facts.measured_on, "")

    lines = [
        "---", MARK, "pipeline_tag: image-classification",
        "tags: [knowledge-distillation, bd-kd, calibration]",
    ]  # fmt: skip
    if measured:
        lines += [
            "model-index:",
            f"- name: {json.dumps(f'{recipe.name}-{facts.network}')}",
            "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{type: {json.dumps(recipe.data.source)}, "
            f"name: {json.dumps(recipe.data.source)}, split: {facts.measured_on}}}",
            "    metrics:",
            *(
                f"    - {{type: {METRICS[key][0]}, value: {value}}}"
                for key, value in measured.items()
            ),
        ]
    lines += [
        "---",
        "",
        f"# {facts.model}, {facts.network} of {recipe.name}",
        "",
        f"{facts.parameters:,} parameters, trained as {facts.role} by bdkd: method {facts.method}, "
        f"seed {facts.seed}, the weights of step {facts.step:,}.",
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
        f"Images are `(batch, {channels}, {height}, {width})`"
        + (
            f", pixel values 0 to {norm.largest:g}, and by channel `(value - mean) / std`:"
            if norm
            else "."
        ),
    ]
    if norm:
        mean, std = ([float(f"{x:.9g}") for x in values] for values in (norm.mean, norm.std))
        lines += ["", "```python", f"mean, std = {mean}, {std}", "```"]
    lines += ["", f"The {len(facts.classes)} logits mean, in this order: "
              f"{', '.join(facts.classes)}."]  # fmt: skip
    lines += ["", "## Accuracy and calibration", ""]
    if measured:
        count = f"{facts.images:,} images" if facts.images else "images"
        lines += [
            f"On {where} ({count}), nothing recalibrated; fractions in [0, 1] unless said "
            "otherwise.", "", "| metric | value |", "| --- | --- |",
            *(f"| {METRICS[key][1]} | {value:.6g} |" for key, value in measured.items()),
        ]  # fmt: skip
    else:
        lines.append(f"Not measured where this was written: `bdkd evaluate {file}` does it.")
    lines += ["", f"`bdkd evaluate {file}` measures it again."]
    lines += ["", "## Recipe", "", "```toml", facts.recipe.strip(), "```", ""]
    lines.append(f"Written by {', '.join(f'{k} {v}' for k, v in facts.versions.items())}.")
    return "\n".join(lines) + "\n"
