"""Run folders, read as they are: finished, running, cut off in the middle of a line, or broken.

What cannot be read is said in a note of the run; what can be is shown.
"""

import json
import math
import tomllib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdkd.errors import RunError
from bdkd.evaluation.predictions import Predictions, read_predictions
from bdkd.metrics import CHARTED, STEP_CHARTED


@dataclass
class Series:
    """One metric over the steps; a null is NaN."""

    steps: array = field(default_factory=lambda: array("d"))
    values: array = field(default_factory=lambda: array("d"))


@dataclass
class Run:
    """What one folder holds. Networks are by name, the averages of students among them."""

    path: Path
    name: str
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any]
    series: dict[tuple[str, str, str], Series]  # by network ("" for the step's), split, metric
    steps_per_epoch: float | None
    predictions: Predictions | None
    profile: dict[str, Any]
    notes: list[str]

    @property
    def networks(self) -> list[str]:
        """Names in the summary's order, then those of the metrics and the configuration."""
        named = [*_table(self.summary, "networks"), *(n for n, _, _ in self.series if n)]
        return list(dict.fromkeys([*named, *_table(self.config, "networks")]))

    @property
    def method(self) -> str:
        return str(self.summary.get("method") or _table(self.config, "objective").get("name")
                   or "run")  # fmt: skip

    @property
    def seed(self) -> object:
        return self.config.get("seed", self.summary.get("seed"))

    def role(self, network: str) -> str:
        """``student`` or ``teacher``: as configured; an average has the role of its network."""
        configured = _table(self.config, "networks")
        sources = [name for name in configured if network.startswith(name)]
        source = configured[max(sources, key=len)] if sources else None
        role = source.get("role") if isinstance(source, dict) else None
        told = _table(_table(self.summary, "networks"), network).get("role")
        return str(role or told or ("teacher" if "teacher" in network else "student"))

    def judged(self, role: str) -> list[str]:
        """The networks that stand for a role: averages, where they are kept, before their own."""
        names = [name for name in self.networks if self.role(name) == role]
        averaged = {n.removesuffix("_ema") for n in names if n.endswith("_ema")}
        return [name for name in names if name not in averaged]

    def result(self, network: str, metric: str) -> float:
        """A number of the summary, or NaN."""
        value = _table(_table(self.summary, "networks"), network).get(metric)
        return _known(value)

    def result_of_run(self, metric: str) -> float:
        """A number of the summary's head, or NaN."""
        return as_number(self.summary.get(metric))

    def model(self, network: str) -> str:
        configured = _table(_table(self.config, "networks"), network).get("model")
        return str(_table(_table(self.summary, "networks"), network).get("model")
                   or configured or "")  # fmt: skip


def as_number(value: object) -> float:
    """A float, or NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # JSON's integers have no end
        return math.nan


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders that the paths mean: each itself, or the folders of runs in it.

    Raises:
        RunError: there is none at a path.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        try:
            inside = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
            here = [path] if is_run(path) else [p for p in inside if is_run(p)]
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror or error}") from error
        if not here:
            what = "holds no run, nor folders of runs" if path.is_dir() else "is no folder"
            raise RunError(
                f"{path} {what}: give the folder of a run (with config.toml and metrics.jsonl), "
                "or one that holds such folders"
            )
        for run in here:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.toml", "metrics.jsonl"))


def read_run(path: Path) -> Run:
    """Everything of a folder that a report shows."""
    notes: list[str] = []
    config = _read(path / "config.toml", tomllib.loads, notes)
    summary = _read(path / "summary.json", json.loads, notes)
    profile = _read(path / "profile.json", json.loads, notes)
    series, steps_per_epoch = _read_metrics(path / "metrics.jsonl", notes)
    if not (path / "summary.json").exists():
        notes.append("not finished: it has no summary.json yet")
    predictions = None
    try:
        if (path / "predictions.safetensors").exists():
            predictions = read_predictions(path / "predictions.safetensors")
        elif summary:
            notes.append("no predictions.safetensors: its images are not in the diagrams")
    except (OSError, ValueError) as error:
        notes.append(_line(error))
    name = path.resolve().name
    config_text = _text(path / "config.toml")
    return Run(
        path,
        name,
        config,
        config_text,
        summary,
        series,
        steps_per_epoch,
        predictions,
        profile,
        notes,
    )


def _text(path: Path) -> str:
    """As much of it as a page should hold, also where it is no TOML."""
    try:
        return path.read_bytes()[:20_000].decode("utf-8", "replace")
    except OSError:  # said in a note already
        return ""


def _read(path: Path, parse: Any, notes: list[str]) -> dict[str, Any]:
    try:
        values = parse(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"cannot read {path.name}: {_line(error)}")
        return {}
    if not isinstance(values, dict):
        notes.append(f"cannot read {path.name}: it is no table")
        return {}
    return values


def _read_metrics(
    path: Path, notes: list[str]
) -> tuple[dict[tuple[str, str, str], Series], float | None]:
    series: dict[tuple[str, str, str], Series] = {}
    steps_per_epoch: float | None = None
    broken = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                values = _parse(line)
                if values is None:
                    broken += line.endswith(b"\n")  # the last may be cut off, or being written
                    continue
                step, epoch = as_number(values.get("step")), as_number(values.get("epoch"))
                split = str(values.get("split"))
                if split != "train" and 1 <= epoch <= step:
                    rate = step / epoch  # too large by part of an epoch where the run was stopped
                    steps_per_epoch = min(steps_per_epoch or math.inf, rate) or None
                for network, metric, value in _numbers(values):
                    points = series.setdefault((network, split, metric), Series())
                    points.steps.append(step)
                    points.values.append(value)
    except FileNotFoundError:
        notes.append("no metrics yet")
    except OSError as error:
        notes.append(f"cannot read {path.name}: {_line(error)}")
    if not any(split == "val" for _, split, _ in series):
        watched = [key for key in series if key[1] == "test"]  # watch_test
        for key in watched:
            series[key[0], "val", key[2]] = series.pop(key)
        if watched:
            notes.append("its curves are of the test images, which have chosen no checkpoint")
    if broken:
        notes.append(f"{broken} lines of {path.name} cannot be read and are left out")
    return series, steps_per_epoch


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not text, or nested without end
        return None
    if not isinstance(values, dict) or not 0 <= as_number(values.get("step")) < 1e12:
        return None
    return values


def _numbers(values: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += [(key, m, _known(v)) for m, v in value.items() if m in CHARTED]
        elif key in STEP_CHARTED:
            found.append(("", key, _known(value)))
    return found


def _known(value: object) -> float:
    number = as_number(value)
    return number if abs(number) < 1e30 else math.nan  # infinities draw nothing


def _table(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _line(error: BaseException) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())[:300]


def read_comparisons(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """``comparison.md`` of the folders that ``bdkd compare`` made, with its folder."""
    found = []
    for path in dict.fromkeys(paths):
        file = path / "comparison.md"
        if file.is_file():
            try:
                found.append((path, file.read_text("utf-8")[:100_000]))
            except (OSError, ValueError) as error:
                raise RunError(f"cannot read {file}: {_line(error)}") from error
    return found
