"""Read the folders of finished, running, interrupted or broken runs.

Each run has notes about the files that cannot be read.
"""

import json
import math
import shlex
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bdkd.config.migration import migrate
from bdkd.config.toml import parse_toml
from bdkd.errors import RunError, shown
from bdkd.evaluation.metric_lines import LineReader, as_number
from bdkd.evaluation.predictions import Predictions, read_predictions
from bdkd.evaluation.quantized import FILE as QUANTIZED
from bdkd.evaluation.quantized import Quantized, read_quantized
from bdkd.metrics import METRICS, STEP_CHARTED
from bdkd.models.registry import default_options
from bdkd.plugins import missing_plugins
from bdkd.text import open_regular, read_text

MAX_FILE_BYTES = 2**28  # maximum size of a summary or a profile
MAX_QUANTIZED = 64  # maximum number of int8 files of a run


@dataclass
class Series:
    """One metric over the steps. null becomes NaN."""

    steps: array = field(default_factory=lambda: array("d"))
    values: array = field(default_factory=lambda: array("d"))


@dataclass
class Run:
    """The content of the files of one run. Moving averages of students count as networks."""

    path: Path
    name: str
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any]
    series: dict[tuple[str, str, str], Series]  # by network ("" for the step), split and metric
    steps_per_epoch: float | None
    predictions: Predictions | None
    profile: dict[str, Any]
    notes: list[str]
    quantized: list[Quantized] = field(default_factory=list)
    """The int8 files of its students."""

    @property
    def networks(self) -> list[str]:
        """Names of the networks, in the order of the summary, the metrics and the configuration."""
        named = [*_table(self.summary, "networks"), *(n for n, _, _ in self.series if n)]
        return list(dict.fromkeys([*named, *_table(self.config, "networks")]))

    @property
    def method(self) -> str:
        configured = _table(self.config, "objective").get("name")
        return str(self.summary.get("method") or configured or "run")

    @property
    def seed(self) -> object:
        return self.config.get("seed", self.summary.get("seed"))

    @property
    def wall_seconds(self) -> float:
        return as_number(self.summary.get("wall_seconds"))

    def role(self, network: str) -> str:
        """Return ``student`` or ``teacher``. A moving average has the role of its network."""
        configured = _table(self.config, "networks")
        sources = [name for name in configured if network.startswith(name)]
        source = configured[max(sources, key=len)] if sources else None
        role = source.get("role") if isinstance(source, dict) else None
        role = role or self._summary_of(network).get("role")
        return str(role or ("teacher" if "teacher" in network else "student"))

    def networks_with_role(self, role: str) -> list[str]:
        """Return the networks with a role. If a network has a moving average, return only the
        average."""
        names = [name for name in self.networks if self.role(name) == role]
        averaged = {n.removesuffix("_ema") for n in names if n.endswith("_ema")}
        return [name for name in names if name not in averaged]

    def result(self, network: str, metric: str) -> float:
        """Return a number of the summary, or NaN if it is missing."""
        return _drawable(self._summary_of(network).get(metric))

    def model(self, network: str) -> str:
        configured = _table(_table(self.config, "networks"), network).get("model")
        return str(self._summary_of(network).get("model") or configured or "")

    def _summary_of(self, network: str) -> dict[str, Any]:
        return _table(_table(self.summary, "networks"), network)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return each path that is a run folder, and the run folders inside the other paths.

    Raises:
        RunError: a path contains no run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        try:
            inside = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
            runs = [path] if _is_run(path) else [p for p in inside if _is_run(p)]
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror or error}") from error
        if not runs:
            problem = "contains no run folder" if path.is_dir() else "is not a folder"
            raise RunError(
                f"{path} {problem}: pass the folder of a run (with config.toml and metrics.jsonl), "
                "or a folder of run folders"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.toml", "metrics.jsonl"))


def read_run(path: Path) -> Run:
    """Read a run folder. Missing and broken files are reported in the notes of the run."""
    notes: list[str] = []
    config = _read(path / "config.toml", parse_toml, notes)
    summary = _read(path / "summary.json", json.loads, notes)
    profile = _read(path / "profile.json", json.loads, notes)
    series, epoch_ends = _read_metrics(path / "metrics.jsonl", notes)
    steps_per_epoch = _steps_per_epoch(epoch_ends, config.get("max_steps"))
    config = _current(config)
    needed = config.pop("plugins", [])
    for name in missing_plugins(map(str, needed if isinstance(needed, list) else [])):
        notes.append(f"metrics of a plugin are left out: --plugin {shlex.quote(name)} shows them")
    if not (path / "summary.json").exists():
        notes.append("not finished: there is no summary.json yet")
    predictions = None
    try:
        if (path / "predictions.safetensors").exists():
            predictions = read_predictions(path / "predictions.safetensors")
        elif summary:
            notes.append("no predictions.safetensors: the diagrams do not include this run")
    except (OSError, ValueError) as error:
        notes.append(_one_line(error))
    try:
        with open_regular(path / "config.toml") as file:
            config_text = file.read(20_000).decode("utf-8", "replace")
    except (OSError, RunError):  # already in the notes
        config_text = ""
    return Run(
        path, path.resolve().name, config, config_text, summary, series, steps_per_epoch,
        predictions, profile, notes, _read_quantized(path, summary, notes),
    )  # fmt: skip


def _read_quantized(path: Path, summary: Mapping[str, Any], notes: list[str]) -> list[Quantized]:
    """Return the comparisons of the run's int8 files with their fp32 files."""
    found = []
    for file in sorted(path.glob(f"export/*/{QUANTIZED}"))[:MAX_QUANTIZED]:
        try:
            quantized = read_quantized(file)
        except (OSError, ValueError) as error:
            notes.append(_one_line(error))
            continue
        left_out = f"{file.relative_to(path)} is left out: it"
        if quantized.network != file.parent.name:  # would count twice
            notes.append(f"{left_out} belongs in the folder {shown(quantized.network)}")
        elif quantized.step != summary.get("selected_step"):
            notes.append(f"{left_out} has the weights of another step")
        elif (onnx := file.with_suffix(".onnx")).is_file() and (
            onnx.stat().st_size != quantized.bytes[1]
        ):
            notes.append(f"{left_out} is the comparison of another {onnx.name}")
        else:
            found.append(quantized)
    return found


def _read(path: Path, parse: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    try:
        values = parse(read_text(path, limit=MAX_FILE_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, RunError, ValueError, RecursionError) as error:
        notes.append(f"cannot read {path.name}: {_one_line(error)}")
        return {}
    if not isinstance(values, dict):
        notes.append(f"cannot read {path.name}: the content is not a table")
        return {}
    return values


class _EpochEnd(NamedTuple):
    """The last line of an epoch that has been read so far."""

    step: int
    evaluated: bool


def _read_metrics(
    path: Path, notes: list[str]
) -> tuple[dict[tuple[str, str, str], Series], dict[int, _EpochEnd]]:
    """Return the series of a ``metrics.jsonl``, and the last line of each epoch."""
    series: dict[tuple[str, str, str], Series] = {}
    ends: dict[int, _EpochEnd] = {}
    broken, reader = 0, LineReader()
    try:
        with open_regular(path) as file:
            for line in file:
                values = _parse(reader, line)
                if values is None:
                    broken += line.endswith(b"\n")  # the last line may be incomplete
                    continue
                step, epoch, split = values["step"], values.get("epoch"), str(values.get("split"))
                if type(epoch) is int:
                    ends[epoch] = _EpochEnd(step, split != "train")
                for network, metric, value in _numbers(values):
                    points = series.setdefault((network, split, metric), Series())
                    points.steps.append(step)
                    points.values.append(value)
    except FileNotFoundError:
        notes.append("no metrics yet")
    except (OSError, RunError) as error:
        notes.append(f"cannot read {path.name}: {_one_line(error)}")
    if not any(split == "val" for _, split, _ in series):
        watched = [key for key in series if key[1] == "test"]  # option watch_test
        for key in watched:
            series[key[0], "val", key[2]] = series.pop(key)
        if watched:
            notes.append("the curves show the test images, which did not select a checkpoint")
    if broken:
        notes.append(f"{broken} lines of {path.name} cannot be read and are left out")
    return series, ends


def _steps_per_epoch(ends: Mapping[int, _EpochEnd], max_steps: object) -> float | None:
    """Return the number of steps in an epoch, or None if no epoch is known to have ended.

    An epoch ends with an evaluation. A run that ``max_steps`` stopped also has an evaluation in the
    middle of an epoch.
    """
    rates = [
        end.step / epoch
        for epoch, end in ends.items()
        if end.evaluated and 1 <= epoch <= end.step and (epoch < max(ends) or end.step != max_steps)
    ]
    return max(rates, default=None)


def _current(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run in the format of this version, so that runs of older
    versions are grouped with runs of this version."""
    config = migrate(config)
    networks = _table(config, "networks")
    filled = {
        name: {**network, "options": {**_defaults(network), **_table(network, "options")}}
        for name, network in networks.items()
        if isinstance(network, dict)
    }
    return {**config, "networks": {**networks, **filled}} if filled else config


def _defaults(network: Mapping[str, Any]) -> dict[str, Any]:
    model = network.get("model")
    return default_options(model) if isinstance(model, str) else {}


def _parse(reader: LineReader, line: bytes) -> dict[str, Any] | None:
    try:
        return reader.parse(line)
    except ValueError:
        return None


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield network, metric and value of the numbers of a line that have charts."""
    charted = {metric.key for metric in METRICS.values() if metric.charted}
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((key, m, _drawable(v)) for m, v in value.items() if m in charted)
        elif key in STEP_CHARTED:
            yield "", key, _drawable(value)


def _drawable(value: object) -> float:
    number = as_number(value)
    return number if abs(number) < 1e30 else math.nan  # a chart cannot show infinity


def _table(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _one_line(error: BaseException) -> str:
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(message.split())[:300]


def read_comparisons(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return the folders that ``bdkd compare`` made with the text of their ``comparison.md``."""
    found = []
    for path in dict.fromkeys(paths):
        file = path / "comparison.md"
        if file.is_file():
            try:
                with open_regular(file) as stream:
                    found.append((path, stream.read(200_000).decode("utf-8", "replace")))
            except OSError as error:
                raise RunError(f"cannot read {file}: {_one_line(error)}") from error
    return found
