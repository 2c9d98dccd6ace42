"""Describe the differences between two networks that were measured on the same images."""

import textwrap
from collections.abc import Mapping
from typing import Any

from bdkd.cli.table import printable, table
from bdkd.metrics import METRICS

_WIDTH = 80
Change = Mapping[str, float | None]


def describe_comparison(summary: Mapping[str, Any]) -> list[str]:
    """Return paragraphs about the comparison of a file with another one."""
    compared = summary["comparison"]
    [network] = summary["networks"].values()
    names = compared["precision"], network["precision"]
    if names[0] == names[1]:
        names = "before", "after"
    changes, count = compared["changes"], compared["validation_images"]
    agreement = compared["agreement"]
    agree = "Predictions cannot be compared: the logits are not finite."
    if agreement["value"] is not None:
        low, high = (f"{100 * agreement[end]:.2f}%" for end in ("low", "high"))
        agree = (
            f"The predictions agree on {100 * agreement['value']:.2f}% of the images (95% interval "
            f"{low} to {high})."
        )
    sizes, ratio = (compared["bytes"], network["bytes"]), compared["bytes"] / network["bytes"]
    factor = f"{ratio:.2f} times smaller" if ratio > 1 else f"{1 / ratio:.2f} times larger"
    factor = "the same" if ratio == 1 else factor
    fitted = (
        f"T: the temperature that fits the {count:,} validation images, refitted for each network. "
        if count else "There are no validation images to fit a temperature on. "
    )  # fmt: skip
    caption = (
        f"95% intervals by paired bootstrap: {compared['draws']:,} resamples of the images, the "
        "same for both networks (top-1: Bonett-Price). They do not include the variation between "
        "training seeds or the error of fitting T. The interval of ECE is pivotal: it may "
        "not contain the difference, and it understates changes above one point. Look at NLL and T "
        "too. "
        f"{fitted}"
    )
    return [
        f"Changes from {printable(compared['file'])} ({compared['precision']}) on the same "
        f"{compared['images']:,} images:",
        _changes_table(changes, names),
        _paragraph(f"{agree} Sizes: {sizes[0]:,} and {sizes[1]:,} bytes ({factor})."),
        "\n".join(_paragraph(_conclusion(key, changes[key])) for key in ("top1", "nll", "ece")),
        _paragraph(caption),
    ]


def describe_temperature_gain(summary: Mapping[str, Any]) -> list[str]:
    """Return paragraphs about the temperature in the last layer of a file."""
    gain = summary["temperature_gain"]
    names = "without", "with"
    return [
        f"Gain of the temperature {gain['temperature']:.4g} in the last layer:",
        _changes_table(gain["changes"], names),
        _paragraph(_conclusion("ece", gain["changes"]["ece"])),
    ]


def _changes_table(changes: Mapping[str, Change], names: tuple[str, str]) -> str:
    rows = []
    for key, change in changes.items():
        metric = METRICS[key]._replace(digits=METRICS[key].digits + (key == "temperature"))
        low, high = (metric.show(change[end], "+") for end in ("low", "high"))
        rows.append([
            metric.label, metric.show(change["before"]), metric.show(change["after"]),
            metric.show(change["difference"], "+"),
            "–" if change["low"] is None else f"{low} to {high}",
        ])  # fmt: skip
    return table(["metric", *names, "difference", "95% interval"], rows)


def _conclusion(metric: str, change: Change) -> str:
    """Return a sentence about the interval of a change."""
    shown = METRICS[metric]
    name, unit = shown.label.removesuffix(" %"), " points" if shown.percent else ""
    low, high = change["low"], change["high"]
    if low is None or high is None:
        return f"The change of {name} cannot be computed."
    ends = [shown.show(end, "+") for end in (low, high)]
    if set(ends) == {shown.show(0.0, "+")}:
        return f"{name} does not change in its first {shown.digits} decimals."
    found = "no significant change, but every change in this interval is possible"
    if low > 0 or high < 0:
        found = f"{name} {'rises' if low > 0 else 'falls'}"
    return f"{name} changes by {ends[0]} to {ends[1]}{unit} (95% interval): {found}."


def _paragraph(text: str) -> str:
    return textwrap.fill(text.strip(), _WIDTH)
