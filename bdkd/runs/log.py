"""The log of a run: ``metrics.jsonl``, a progress bar or plain lines, TensorBoard and wandb."""

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from bdkd.config import Recipe, to_toml
from bdkd.data import Split
from bdkd.engine.state import TrainingState
from bdkd.errors import RunError
from bdkd.runs.folder import RunFolder


class MetricsLogger:
    """Writes the metrics of a run, and measures the time of its log intervals.

    All ranks use one; only rank 0 writes and prints. Evaluations and checkpoints stop the clock of
    an interval (:meth:`paused`).

    Args:
        state: a state that is already resumed. Metrics of later steps are removed from the folder.
        last_step: of the run.
        progress_bar: draw one if standard error is a terminal.
    """

    def __init__(
        self, state: TrainingState, folder: RunFolder, last_step: int, progress_bar: bool
    ) -> None:
        self.state, self.folder, self.last_step = state, folder, last_step
        self.is_rank0 = state.context.is_rank0
        self.sinks: list[Sink] = []
        step = state.progress.step
        if self.is_rank0:
            folder.write_config(state.recipe)  # a refused resume has changed nothing
            folder.drop_after(step)
            self.sinks = open_sinks(state.recipe, folder.path, folder.events, step)
        self.console = Console(last_step, step, progress_bar and self.is_rank0)
        self.start_interval()
        self._counted = time.monotonic()  # until when progress.seconds counts

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the progress bar and the sinks."""
        self.console.close()
        for sink in self.sinks:
            sink.close()
        self.sinks = []

    def line(self, text: str) -> None:
        """Print a line."""
        self.console.line(text)

    def start_interval(self) -> None:
        """Start a log interval."""
        self._clock, self._images = time.monotonic(), 0

    def step(self, images: int) -> None:
        """Count a step of so many images."""
        self.console.step()
        self._images += images

    def interval(self) -> tuple[int, float]:
        """Return the images and the seconds of the current interval."""
        return self._images, time.monotonic() - self._clock

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock of the interval."""
        began = time.monotonic()
        yield
        self._clock += time.monotonic() - began

    def count_time(self) -> None:
        """Add the time since the last call to the progress, in which a checkpoint saves it."""
        now = time.monotonic()
        self.state.progress.seconds += now - self._counted
        self._counted = now

    def training(self, values: dict[str, Any]) -> None:
        """Log the means of an interval, and start the next one."""
        self.write(values)
        self.count_time()
        progress = self.state.progress
        left = progress.seconds / progress.step * (self.last_step - progress.step)
        self.console.metrics(values, left)
        self.start_interval()

    def evaluation(self, split: Split, networks: Mapping[str, Mapping[str, float]]) -> None:
        """Log an evaluation: metrics by network."""
        progress = self.state.progress
        self.write({"step": progress.step, "epoch": progress.epoch, "split": split, **networks})
        shown = "  ".join(
            f"{name} top-1 {100 * metrics['top1']:.1f}% ECE {100 * metrics['ece']:.1f}%"
            for name, metrics in networks.items()
        )
        title = {"val": "validation", "test": "test images (not used for selection)"}[split]
        self.line(f"epoch {progress.epoch}  {title}  {shown}")

    def write(self, values: dict[str, Any]) -> None:
        """Write one line of metrics. A sink that fails is dropped, because ``metrics.jsonl`` has
        everything."""
        if not self.is_rank0:
            return
        if warning := self.folder.append_metrics(values):
            self.line(f"warning: {warning}")
        for sink in list(self.sinks):
            try:
                sink.scalars(values["step"], flat_scalars(values))
            except RunError as error:
                self.line(f"warning: training goes on without this log: {error}")
                self.sinks.remove(sink)

    def flush(self) -> None:
        """Write the lines that wait for space on the disk. Raises ``RunError`` if that fails."""
        if self.is_rank0:
            self.folder.flush_metrics()


class Console:
    """Shows progress: one line that is redrawn on a terminal, one for each interval in a pipe."""

    def __init__(self, total_steps: int, done: int, bar: bool = True) -> None:
        self.bar = tqdm(
            total=total_steps, initial=done, unit="step", dynamic_ncols=True,
            disable=not (bar and sys.stderr.isatty()),
        )  # fmt: skip
        self.total_steps = total_steps

    def step(self) -> None:
        self.bar.update(1)

    def metrics(self, values: Mapping[str, Any], seconds_left: float) -> None:
        """Show the means of a log interval."""
        networks = {k: v for k, v in values.items() if isinstance(v, dict)}
        text = "  ".join(
            f"{name} {_loss(v['loss'])}top-1 {100 * v['top1']:.1f}%" for name, v in networks.items()
        )
        text += f"  {values['images_per_second']:.0f} images/s"
        if self.bar.disable:
            minutes, seconds = divmod(round(seconds_left), 60)
            print(
                f"step {values['step']}/{self.total_steps}  epoch {values['epoch']}  {text}  "
                f"{minutes}:{seconds:02d} left",
                flush=True,
            )
        else:
            self.bar.set_postfix_str(text)

    def line(self, text: str) -> None:
        """Print a line."""
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


def _loss(mean: float) -> str:
    """Return the loss as text, or nothing for a network that did not train."""
    return "" if math.isnan(mean) else f"loss {mean:.3f} "


class Sink(Protocol):
    """Receives the metrics as scalars."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Writes event files into the run's folder."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        try:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        except OSError as error:  # its thread failed to write earlier
            raise RunError(
                f"cannot write TensorBoard events in {self.folder}: {error.strerror or error}; "
                "mend that and continue with --resume, or --log with nothing after it"
            ) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # reported by scalars(); the run's own files are whole
            self.writer.close()


class WandbSink:
    """Logs to Weights & Biases. WANDB_MODE=offline keeps the run in its folder."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import wandb

        # A resumed run has the same identifier, because it has the same folder.
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(
            project="bdkd", name=folder.name, dir=str(folder), id=identity, resume="allow",
            config={"recipe": to_toml(recipe)},
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def check_sinks(recipe: Recipe) -> None:
    """Raise ``RunError`` if the package of a sink is missing, before anything is written."""
    needs = {"tensorboard": ("tensorboard", "'bdkd[train]'"), "wandb": ("wandb", "wandb")}
    for sink in recipe.log:
        module, package = needs[sink]
        try:
            import_module(module)
        except ImportError as error:
            raise RunError(
                f"--log {sink} needs {module}: pip install {package} "
                "(or --log with nothing after it)"
            ) from error


def open_sinks(recipe: Recipe, folder: Path, events: Path, start_step: int) -> list[Sink]:
    """Open the sinks that the recipe names."""
    sinks: list[Sink] = []
    if "tensorboard" in recipe.log:
        sinks.append(TensorBoardSink(events, start_step))
    if "wandb" in recipe.log:
        sinks.append(WandbSink(recipe, folder))
    return sinks


def flat_scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return a line of metrics as ``{"train/student/loss": ...}``."""
    split = values["split"]
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{split}/{key}/{name}": number for name, number in value.items()}
        elif key not in ("step", "split") and value is not None:
            flat[f"{split}/{key}"] = value
    return flat
