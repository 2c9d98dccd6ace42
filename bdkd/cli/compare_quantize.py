"""Export and quantise the students of the runs of ``bdkd compare``."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import IO, Any

from bdkd.cli.compare_plan import PlannedRun, read_summary
from bdkd.cli.processes import Job, Outcome, run_jobs
from bdkd.config import Recipe
from bdkd.errors import Interrupted, RunError, UsageError
from bdkd.evaluation import comparison
from bdkd.evaluation.quantized import FILE, Quantized, QuantizedRun, read_quantized
from bdkd.plugins import plugin_arguments
from bdkd.runs.console import Console
from bdkd.runs.signals import StopRequest

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_quantizable(recipe: Recipe) -> None:
    """Check before the training that students can be quantised after it.

    Raises:
        UsageError: the recipe holds out no validation images.
        RunError: a package is missing.
    """
    if not recipe.data.has_validation():
        raise UsageError(
            "--quantize needs validation images for the ranges of the activations, and "
            "data.validation is 0: pass --data.validation 0.1"
        )
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise RunError(f"ONNX files need {', '.join(missing)}: pip install 'bdkd[export]'")


def quantize_all(
    runs: Sequence[PlannedRun], at_once: int, command: str, stream: IO[str] | None
) -> dict[str, Outcome]:
    """Export the students of finished runs to int8, ``at_once`` of them concurrently. Skip
    students that are already exported. Return the outcomes of the exports by name.

    Args:
        command: the command line, printed if a signal stops the exports.
        stream: where to print. Default: standard output.

    Raises:
        Interrupted: a signal was received.
    """
    jobs = list(_jobs(runs))
    if not jobs:
        return {}
    outcomes: dict[str, Outcome] = {}
    console = Console(len(jobs), 0, unit="file", stream=stream)

    def done(job: Job, outcome: Outcome) -> None:
        outcomes[job.name] = outcome
        console.step()
        if not outcome.code or stop.signal is None:
            found = f"failed: {outcome.message}" if outcome.code else "quantised"
            console.line(f"[{len(outcomes)}/{len(jobs)}] {job.name}  {found}")

    try:
        with StopRequest() as stop:
            console.line(f"{len(jobs)} students to quantise to int8, {at_once} at a time")
            run_jobs(jobs, at_once, done, lambda: stop.signal is not None)
    finally:
        console.close()
    if stop.signal is not None:
        quantised = sum(not outcome.code for outcome in outcomes.values())
        state = f"{quantised} of {len(jobs)} students are quantised"
        raise Interrupted(
            stop.signal, f"stopped; {state}; continue with the same command: {command}"
        )
    return outcomes


def read_students(planned: PlannedRun, run: comparison.Run) -> QuantizedRun:
    """Return a run with the comparisons of those of its int8 files that match its summary."""
    names = exported_networks(run.summary)
    found = {name: _current(planned, name, run.summary) for name in names}
    students = [quantized for quantized in found.values() if quantized is not None]
    return QuantizedRun(run, students, [name for name in names if found[name] is None])


def exported_networks(summary: Mapping[str, Any]) -> list[str]:
    """Return the names of the students of a run, or of their moving averages if there are any."""
    networks = summary["networks"]
    return [
        name for name, network in networks.items()
        if network["role"] == "student" and f"{name}_ema" not in networks
    ]  # fmt: skip


def _jobs(runs: Sequence[PlannedRun]) -> Iterator[Job]:
    for run in runs:
        summary = read_summary(run)
        for name in exported_networks(summary):
            if _current(run, name, summary) is None:
                job = f"{run.name} {name}"
                yield Job(job, partial(_arguments, run, name), run.path / "export.log")


def _arguments(run: PlannedRun, network: str) -> list[str]:
    return [
        "export", str(run.path), *plugin_arguments(), "--to", "onnx", "--quantize", "int8",
        "--network", network, "--force",
    ]  # fmt: skip


def _current(run: PlannedRun, network: str, summary: Mapping[str, Any]) -> Quantized | None:
    """Return the comparison of a network's int8 file. Return None if the file must be made again:
    it is missing or damaged, has other weights or a folded temperature, or was replaced without a
    comparison (``bdkd export --no-evaluate``)."""
    path = run.path / "export" / network / FILE
    try:
        quantized = read_quantized(path)
        size = path.with_suffix(".onnx").stat().st_size
    except (OSError, ValueError):
        return None
    found = (quantized.network, quantized.step, quantized.images, quantized.bytes[1])
    needed = (network, summary["selected_step"], summary["images"], size)
    return quantized if found == needed and quantized.temperature == 1 else None
