"""Compare fp32 and int8 students over methods and seeds.

``bdkd export --quantize int8`` writes ``model-int8.json``, which compares the int8 file of one
student with its fp32 file. This module makes rows of ``bdkd compare`` from these comparisons: for
each method, one row for the int8 student and one for its change from fp32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from bdkd.extras import missing_packages

if message := missing_packages(("msgspec",)):
    raise ImportError(message)

import msgspec
from msgspec import Meta

from bdkd.errors import RunError
from bdkd.evaluation import comparison
from bdkd.evaluation.comparison import Cell, Row, Table, show_p
from bdkd.evaluation.paired import LEVEL
from bdkd.metrics import METRICS
from bdkd.text import read_text

FILE = "model-int8.json"
MAX_BYTES = 2**24
SHOWN = ("top1", "ece", "nll", "brier")

# The file may be untrusted: larger numbers would overflow in means and ratios.
_Value = Annotated[float, Meta(ge=-1e30, le=1e30)] | None
_Count = Annotated[int, Meta(ge=1, le=2**53)]


class _Change(msgspec.Struct):
    before: _Value
    after: _Value
    difference: _Value
    low: _Value
    high: _Value


class _Agreement(msgspec.Struct):
    value: Annotated[float, Meta(ge=0, le=1)] | None


class _Comparison(msgspec.Struct):
    bytes: _Count
    agreement: _Agreement
    changes: dict[str, _Change]


class _Network(msgspec.Struct):
    model: str
    role: str
    bytes: _Count


class _Gain(msgspec.Struct):
    temperature: Annotated[float, Meta(gt=0, le=1e30)]
    changes: dict[str, _Change]


class _File(msgspec.Struct):
    step: Annotated[int, Meta(ge=0, le=2**53)]
    split: str
    images: _Count
    networks: dict[str, _Network]
    comparison: _Comparison
    temperature_gain: _Gain | None = None


@dataclass(frozen=True)
class Quantized:
    """The int8 file of one student, compared with its fp32 file on the test images."""

    network: str
    model: str
    step: int
    images: int
    bytes: tuple[int, int]  # of the fp32 file and of the int8 file
    agreement: float | None  # share of the images with equal predictions
    changes: Mapping[str, Mapping[str, float | None]]
    """By metric: ``before`` (fp32), ``after`` (int8), ``difference``, and ``low`` and ``high``, the
    95% interval over images."""
    temperature: float = 1.0
    """The temperature that is folded into the last layer of the int8 file. 1 if there is none."""
    ece_without: float = math.nan
    """ECE of the int8 file without the temperature. NaN if the file has no temperature."""

    def value(self, metric: str, when: str) -> float:
        """Return a number of ``changes``, or NaN if it is missing."""
        found = self.changes.get(metric, {}).get(when)
        return math.nan if found is None else found


def read_quantized(path: Path) -> Quantized:
    """Read a ``model-int8.json``.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not the comparison of one int8 network on the test images.
    """
    try:
        content = msgspec.json.decode(read_text(path, limit=MAX_BYTES), type=_File)
    except (RunError, RecursionError, msgspec.DecodeError) as error:
        raise ValueError(f"{path.name} is not the comparison of an int8 file: {error}") from error
    if len(content.networks) != 1 or content.split != "test":
        raise ValueError(f"{path.name} is not the comparison of one network on the test images")
    [(name, network)] = content.networks.items()
    compared = content.comparison
    return Quantized(
        name, network.model, content.step, content.images, (compared.bytes, network.bytes),
        compared.agreement.value,
        {key: msgspec.to_builtins(change) for key, change in compared.changes.items()},
        *_gain_of(content.temperature_gain),
    )  # fmt: skip


def _gain_of(gain: _Gain | None) -> tuple[float, float]:
    """Return the temperature of a file, and its ECE without the temperature."""
    if gain is None:
        return 1.0, math.nan
    ece = gain.changes.get("ece")
    return gain.temperature, math.nan if ece is None or ece.before is None else ece.before


@dataclass(frozen=True)
class QuantizedRun:
    """One run and the int8 files of its students."""

    run: comparison.Run
    students: Sequence[Quantized]
    missing: Sequence[str] = ()  # students that have no int8 file


def quantized_rows(runs: Sequence[QuantizedRun], methods: Sequence[str], when: str) -> list[Row]:
    """Return the rows of the students' values.

    Args:
        when: ``before`` (fp32), ``after`` (int8) or ``difference``. Tests of differences compare
            the changes of two methods.
    """
    selected = []
    for quantized in runs:
        run = quantized.run
        networks: dict[str, Any] = {}
        for student in quantized.students:
            values = {key: student.value(key, when) for key in student.changes}
            networks[student.network] = {"role": "student", "model": student.model, **values}
        if networks:
            summary = {"wall_seconds": run.summary["wall_seconds"], "networks": networks}
            selected.append(replace(run, summary=summary))
    return comparison.compare(selected, methods)


def labelled(runs: Sequence[QuantizedRun], methods: Sequence[str]) -> list[Row]:
    """Return the rows of ``comparison.csv``: the exported networks in fp32 and in int8, and the
    changes."""
    rows = []
    for when, label in (("before", "fp32"), ("after", "int8"), ("difference", "int8 - fp32")):
        for row in quantized_rows(runs, methods, when):
            rows.append(replace(row, network=f"{row.network} ({label})"))
    return rows


def changes(runs: Sequence[QuantizedRun], methods: Sequence[str], network: str) -> Table:
    """Return the table of one network: fp32, int8 and the mean change over seeds with its interval,
    for each method and metric."""
    header = ["method", "metric", "fp32", "int8", "int8 - fp32", "95% interval", "seeds"]
    found = {
        when: {row.method: row for row in quantized_rows(runs, methods, when)
               if row.network == network}
        for when in ("before", "after", "difference")
    }  # fmt: skip
    lines = []
    for method, row in found["difference"].items():
        for key in SHOWN:
            metric, cell = METRICS[key], row.cells[key]
            ends = [found[when][method].cells[key] for when in ("before", "after")]
            shown = [
                metric.show(end.mean) + ("" if end.std is None else f" ± {metric.show(end.std)}")
                for end in ends
            ]
            ends_of_interval = [metric.show(end, "+") for end in cell.interval or ()]
            lines.append([
                method, metric.label, *shown, metric.show(cell.mean, "+"),
                " to ".join(ends_of_interval) or "–", str(len(cell.values)),
            ])  # fmt: skip
    return header, lines


def differences(runs: Sequence[QuantizedRun], methods: Sequence[str], network: str) -> Table:
    """Return the table of tests that compare the changes of each method with those of the first."""
    rows = quantized_rows(runs, methods, "difference")
    return comparison.differences(rows, network, [METRICS[key] for key in SHOWN])


def notes(runs: Sequence[QuantizedRun], methods: Sequence[str]) -> list[str]:
    """Return paragraphs that explain the tables."""
    students = [student for run in runs for student in run.students]
    text = [
        "fp32 and int8: the exported ONNX files on the same test images. The interval is that of "
        "the t-test over seeds, without correction: a mean change is significant at 5% if its "
        "interval does not contain 0. By chance, about one of 20 intervals does not. The tests "
        "compare the change of each method, seed by seed, with the change of "
        f"{methods[0]}, with Holm's correction for each metric and test."
    ]
    if without := [f"{r.run.method} seed {r.run.seed} {n}" for r in runs for n in r.missing]:
        text.append(f"The tables leave out these int8 files: {', '.join(without)}.")
    if not students:
        return text[1:]
    excluded = sum(
        student.value("ece", "low") > 0 or student.value("ece", "high") < 0 for student in students
    )
    ratios = [student.bytes[0] / student.bytes[1] for student in students]
    sizes = " to ".join(dict.fromkeys(f"{ratio:.1f}" for ratio in (min(ratios), max(ratios))))
    text.append(
        f"In {excluded} of {len(students)} files the interval over images of the change of ECE "
        "does not contain 0 (by chance alone, expect 5 to 10%). int8 files are "
        f"{sizes} times smaller."
    )
    for network in dict.fromkeys(student.network for student in students):
        text += _findings(runs, methods, network)
    return text


def _findings(runs: Sequence[QuantizedRun], methods: Sequence[str], network: str) -> list[str]:
    """Return a sentence for each metric. It names the methods whose change differs from that of the
    first method in at least one of the two tests."""
    rows = [row for row in quantized_rows(runs, methods, "difference") if row.network == network]
    found = []
    for key in SHOWN:
        p_values = {row.method: _p_values(row.cells[key]) for row in rows}
        if not (every := [p for of_method in p_values.values() for p in of_method.values()]):
            continue
        differing = [
            f"{method} ({', '.join(f'{test} p {show_p(p)}' for test, p in of_method.items())})"
            for method, of_method in p_values.items()
            if min(of_method.values(), default=1.0) < LEVEL
        ]
        label = METRICS[key].label.removesuffix(" %")
        if differing:
            which = f"the change of {', '.join(differing)} differs from that of {methods[0]}"
        else:
            which = (
                f"no test finds that the change of a method differs from that of {methods[0]} "
                f"(smallest p {show_p(min(every))})"
            )
        found.append(f"{network}, {label}: {which}.")
    return found


def _p_values(cell: Cell) -> dict[str, float]:
    """Return the corrected p-value of each test of a cell, by the name of the test."""
    of_tests = {"t-test": cell.p_t, "Wilcoxon": cell.p_wilcoxon}
    return {test: p for test, p in of_tests.items() if p is not None}
