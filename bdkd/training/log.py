"""What a run says: a progress line on a terminal, plain lines in a pipe, and metric sinks."""

import contextlib
import hashlib
import math
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from bdkd.config import Recipe, to_toml
from bdkd.errors import RunError


class Console:
    """Progress of the steps. On a terminal one line that is redrawn; in a pipe a line a call."""

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
        """A line that stays."""
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


def _loss(mean: float) -> str:
    """Nothing for a network that did not train."""
    return "" if math.isnan(mean) else f"loss {mean:.3f} "


class Sink(Protocol):
    """A place that scalars go to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        try:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        except OSError as error:  # its thread failed to write before this call
            raise RunError(
                f"cannot write TensorBoard events in {self.folder}: {error.strerror or error}; "
                "mend that and continue with --resume, or --log with nothing after it"
            ) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # said by scalars; the run's own files are whole
            self.writer.close()


class WandbSink:
    """A run at Weights & Biases; WANDB_MODE=offline keeps it in the run's folder."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import wandb

        # A resumed run finds itself again by its folder.
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
    """Raise ``RunError`` for a sink whose package is missing, before anything is written."""
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
    """The sinks that the recipe names."""
    sinks: list[Sink] = []
    if "tensorboard" in recipe.log:
        sinks.append(TensorBoardSink(events, start_step))
    if "wandb" in recipe.log:
        sinks.append(WandbSink(recipe, folder))
    return sinks


def flat_scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """``{"train/student/loss": ...}`` of one metrics line."""
    split = values["split"]
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{split}/{key}/{name}": number for name, number in value.items()}
        elif key not in ("step", "split") and value is not None:
            flat[f"{split}/{key}"] = value
    return flat
