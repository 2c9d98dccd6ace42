"""The folder of a run: its files, its lock and its checkpoints."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any

from bdkd.config import Recipe, parse_recipe, to_toml
from bdkd.config.load import MAX_RECIPE_BYTES
from bdkd.config.toml import parse_toml
from bdkd.errors import DamagedFile, RunError, reason_of
from bdkd.evaluation.metric_lines import LineReader
from bdkd.evaluation.predictions import Predictions, to_bytes
from bdkd.runs.checkpoint import explain_oserror, load_checkpoint, save_checkpoint, write_atomically
from bdkd.text import open_regular, read_text, unicode_hint_of_path, without_waiting

# When torchrun restarts the ranks, processes of the previous attempt may still hold the lock.
LOCK_SECONDS = 20.0
MAX_SUMMARY_BYTES = 2**26
CHECKPOINT_NAME = re.compile(r"(step|best)-(\d{8})\.pt")
Saved = tuple[Path, dict[str, Any]]  # a checkpoint and its state


class RunFolder:
    """The files of a run: ``config.toml``, ``metrics.jsonl``, ``summary.json``, ``checkpoints/``,
    ``figures/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.predictions = path / "predictions.safetensors"
        self.checkpoints = path / "checkpoints"
        self.figures = path / "figures"
        self.events = path / "events"
        self.logs = path / "logs"
        self.saved = path / ".saved"  # exists if the run has written a checkpoint
        self._lock: IO[str] | None = None
        self._unwritten: list[str] = []

    def launched_by(self, identity: str) -> bool:
        """Return whether the launch with this identifier was the last one to train here."""
        try:
            return read_text(self.path / ".lock") == identity
        except (OSError, RunError):
            return False

    def open_for_training(self, resume: str, identity: str | None = None) -> bool:
        """Create and lock the folder.

        Args:
            resume: ``never``, ``auto`` (resume if there is a run) or ``require``.
            identity: identifier of the launch, stored for :meth:`launched_by`.

        Returns:
            Whether the folder contains a run to continue. The run may have no checkpoint yet.

        Raises:
            RunError: the folder cannot be written, another process trains in it, ``resume`` forbids
                or requires a run in it, or its run has no ``config.toml``.
        """
        started = self._holds_run()
        if resume == "require" and not started:
            raise RunError(f"nothing to resume: {self.path} contains no run")
        folders = (self.path, self.checkpoints, self.figures)
        failed = f"cannot write the run's folder {self.path}"
        with explain_oserror(failed, "choose another with --run-dir"):
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            # Mode "a" does not change the file if this run is refused below.
            self._lock = open(self.path / ".lock", "a", opener=without_waiting)  # noqa: SIM115
        self._wait_for_lock(LOCK_SECONDS if identity and self.launched_by(identity) else 0.0)
        started = self._holds_run()  # another process may have started one in the meantime
        for leftover in chain.from_iterable(folder.glob(".*.tmp") for folder in folders):
            leftover.unlink()  # left by a killed process; no other process writes while we lock
        if started and resume == "never":
            raise RunError(
                f"{self.path} already contains a run: continue it with --resume or choose another "
                "--run-dir"
            )
        with explain_oserror(f"cannot write {self.path / '.lock'}", "remove it"):
            self._lock.truncate(0)
            self._lock.write(identity or "")
            self._lock.flush()
        return started

    def open_run(self, resume: str, identity: str | None) -> tuple[bool, Saved | None]:
        """Call :meth:`open_for_training`. Return its result and the newest checkpoint, or None."""
        continues = self.open_for_training(resume, identity)
        return continues, self.newest_state(warn=print) if continues else None

    def has_begun(self) -> bool:
        """Return whether the run has written metrics, a checkpoint or results. A run writes only
        ``config.toml`` before it starts to train."""
        return self.metrics.exists() or self.summary.exists() or bool(self.resumable_paths())

    def _holds_run(self) -> bool:
        """Return whether a run has started here. Raise ``RunError`` if its ``config.toml`` is
        missing."""
        with explain_oserror(f"cannot read {self.path}"):
            if self.config.exists():
                return True
            left = [p for p in (self.summary, self.metrics) if p.exists()]
        left += [p for p in self._checkpoint_files() if not p.name.startswith(".")]
        if left:
            name = left[0].relative_to(self.path)
            found = f"{self.path} contains {name} of a run, but no config.toml"
            remedy = "put it back to resume that run, or choose another --run-dir"
            raise RunError(f"{found}: {remedy}")
        return False

    def _wait_for_lock(self, seconds: float) -> None:
        assert self._lock is not None
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if time.monotonic() >= deadline:
                    busy = f"another process is training in {self.path}"
                    remedy = "wait until it ends or choose another --run-dir"
                    raise RunError(f"{busy}: {remedy}") from error
                time.sleep(0.1)

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, recipe: Recipe) -> None:
        write_atomically(self.config, to_toml(recipe).encode())

    def read_config(self) -> Recipe:
        return parse_recipe(self._config_text(), source=str(self.config), of_run=True)

    def selects_best(self) -> bool:
        """Return whether ``train.select`` is ``best``. This does not load plugins of the recipe."""
        try:
            return parse_toml(self._config_text())["train"]["select"] == "best"
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.config} has no train.select: add the key, or restore the file"
            ) from error

    def _config_text(self) -> str:
        try:
            return read_text(self.config, limit=MAX_RECIPE_BYTES)
        except OSError as error:
            failed = f"cannot read {self.config} ({error.strerror})"
            raise RunError(f"no run at {self.path}: {failed}") from error

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.summary, (to_json(summary, indent=2) + "\n").encode())

    def read_summary(self, remedy: str) -> dict[str, Any]:
        """Return the content of ``summary.json``.

        Args:
            remedy: for the error message: how to write the file again.

        Raises:
            RunError: the file is missing or contains no results of networks.
        """
        try:
            summary = json.loads(read_text(self.summary, limit=MAX_SUMMARY_BYTES))
            networks = summary["networks"]
            if not networks or not all(isinstance(x, dict) for x in networks.values()):
                raise ValueError("it contains no networks")
            if not summary["wall_seconds"] >= 0:
                raise ValueError("it contains no wall_seconds")
        except OSError as error:
            failed = f"cannot read {self.summary}: {reason_of(error)}"
            raise RunError(f"{failed}; {remedy}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            failed = f"{self.summary} is not a summary that bdkd wrote"
            raise RunError(f"{failed}: {remedy}") from error
        return summary

    def write_predictions(self, predictions: Predictions) -> None:
        write_atomically(self.predictions, to_bytes(predictions))

    def checkpoint_paths(self, kind: str = "step") -> list[Path]:
        """Return the checkpoints of a kind (``step`` or ``best``), newest first. Raise ``RunError``
        if the folder exists but cannot be read."""
        named = ((CHECKPOINT_NAME.fullmatch(p.name), p) for p in self._checkpoint_files())
        return sorted((p for match, p in named if match and match[1] == kind), reverse=True)

    def resumable_paths(self) -> list[Path]:
        """Return all checkpoints, newest first. ``best`` checkpoints also contain the complete
        state. One of them is the newest if the run was killed before it saved again."""
        saved = [*self.checkpoint_paths("step"), *self.checkpoint_paths("best")]
        return sorted(saved, key=step_of, reverse=True)

    def _checkpoint_files(self) -> list[Path]:
        with explain_oserror(f"cannot read the folder {self.checkpoints}", "nothing was changed"):
            try:
                return list(self.checkpoints.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return []

    def step_path(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.pt"

    def best_path(self, step: int) -> Path:
        return self.checkpoints / f"best-{step:08d}.pt"

    def save(self, step: int, recipe: Recipe, state: Mapping[str, Any], keep: int) -> Path:
        """Write the checkpoint of a step, and delete old checkpoints. Keep the newest ``keep``
        checkpoints and the ``best`` checkpoints that they refer to."""
        self._save(path := self.step_path(step), recipe, state)
        kept, dropped = self.checkpoint_paths()[:keep], self.checkpoint_paths()[keep:]
        known = [p for p in self.checkpoint_paths("best") if step_of(p) <= step_of(kept[-1])]
        for old in (*dropped, *known[1:]):
            with contextlib.suppress(OSError):  # retried when the next checkpoint is saved
                old.unlink()
        return path

    def save_best(self, step: int, recipe: Recipe, state: Mapping[str, Any]) -> None:
        """Write the ``best`` checkpoint of a step. The previous ``best`` checkpoint is kept until a
        ``step`` checkpoint refers to the new one."""
        self._save(self.best_path(step), recipe, state)

    def _save(self, path: Path, recipe: Recipe, state: Mapping[str, Any]) -> None:
        save_checkpoint(path, to_toml(recipe), state)
        with contextlib.suppress(OSError):
            self.saved.touch()

    def drop_after(self, step: int) -> None:
        """Remove the metrics of later steps, because a resumed run writes them again. Convert the
        remaining lines to the current format."""
        kept = [to_json(line) for line in self.read_metrics() if line["step"] <= step]
        write_atomically(self.metrics, "".join(f"{line}\n" for line in kept).encode())

    def newest_state(self, warn: Callable[[str], object]) -> Saved | None:
        """Return the newest checkpoint, or None if the run was stopped before its first one.

        If checksums prove that a checkpoint is damaged, this method renames it to ``*.damaged``,
        calls ``warn`` with a message, and uses the previous checkpoint. Other failures may be
        temporary, so they raise an error and change no files.

        Raises:
            RunError: a checkpoint cannot be read, or all checkpoints of the run are missing.
        """
        for path in self.resumable_paths():
            try:
                return path, load_checkpoint(path)[1]
            except DamagedFile as error:
                suffixes = [".damaged", *(f".damaged.{number}" for number in range(2, 1000))]
                aside = _first_free(map(path.with_suffix, suffixes))
                try:
                    path.rename(aside)  # so that it does not count as a checkpoint to keep
                except OSError as reason:
                    failed = f"it could not be renamed to {aside.name}"
                    raise RunError(f"{error}; {failed}: {reason.strerror or reason}") from error
                warn(f"{path} is damaged: {error.__cause__}; it was renamed to {aside.name}")
        self._refuse_to_start_over()
        return None

    def _refuse_to_start_over(self) -> None:
        """Raise ``RunError`` if the run had checkpoints, because a restart from step 0 would
        overwrite its files."""
        files = self._checkpoint_files()
        aside = [p.name for p in files if ".damaged" in p.suffixes or p.suffix == ".unreadable"]
        last = max((line["step"] for line in self.read_metrics()), default=0)
        # Runs of older versions have no file .saved, but saved a checkpoint before 2 * every_steps.
        written = self.saved.exists() or last > 2 * self.read_config().checkpoint.every_steps
        if aside:
            found = f"the folder contains {', '.join(sorted(aside))}"
        elif self.summary.exists() or written:
            found = f"the run had reached step {last}, so it had been saved"
        else:
            return
        remedy = "put one back, or choose another --run-dir to start a new run"
        raise RunError(f"no checkpoint in {self.checkpoints} to resume from ({found}): {remedy}")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the valid lines of ``metrics.jsonl``, converted to the current format. The last
        line may be incomplete if the run was killed."""
        with explain_oserror(f"cannot read {self.metrics}"):
            content = b""
            if self.metrics.exists():
                with open_regular(self.metrics) as file:
                    content = file.read()
        lines, reader = [], LineReader()
        for line in content.splitlines(keepends=True):
            with contextlib.suppress(ValueError):  # not JSON, or not UTF-8
                values = reader.parse(line)
                if values is not None and line.endswith(b"\n"):
                    lines.append(values)
        return lines

    def append_metrics(self, values: Mapping[str, Any]) -> str | None:
        """Append one line of JSON. If it cannot be written, for example because the disk is full,
        keep it for the next call and return a warning."""
        self._unwritten.append(to_json(values) + "\n")
        try:
            self._write_metrics()
        except OSError as error:
            return f"cannot write {self.metrics}: {error.strerror}; bdkd tries again later"
        return None

    def flush_metrics(self) -> None:
        """Write the lines that could not be written before. Raise ``RunError`` if this fails."""
        remedy = "fix the cause and continue with --resume"
        with explain_oserror(f"cannot write {self.metrics}", remedy):
            self._write_metrics()

    def _write_metrics(self) -> None:
        with open(self.metrics, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                for line in self._unwritten:
                    text = line.encode()
                    if file.write(text) != len(text):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)  # remove a partial line
                raise
        self._unwritten.clear()


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that wrote a checkpoint, or else the checkpoint's folder."""
    run = checkpoint.parent.parent
    return run if (run / "config.toml").exists() else checkpoint.parent


def selected_checkpoint(path: Path) -> Path:
    """Return the selected checkpoint of a run's folder. Return the path itself if it is a file.

    Raises:
        RunError: there is no run at the path, or the run has no checkpoint yet.
    """
    if path.is_file():
        return path
    folder = RunFolder(path)
    if not path.is_dir() or not folder.config.exists():
        raise RunError(
            f"no run and no checkpoint at {path}: give the folder of a run, which contains "
            f"config.toml and checkpoints/, or a checkpoint file{unicode_hint_of_path(path)}"
        )
    saved = folder.checkpoint_paths()
    if folder.selects_best():
        saved = folder.checkpoint_paths("best") or saved
    if not saved:
        remedy = f"wait for the first one, or run bdkd train --resume --run-dir {path}"
        raise RunError(f"the run {path} has no checkpoint yet: {remedy}")
    return saved[0]


def _first_free(paths: Iterable[Path]) -> Path:
    return next(path for path in paths if not os.path.lexists(path))


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.stem.split("-")[1])


def to_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Return strict JSON. NaN and infinity become null."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def default_run_dir(recipe: Recipe, resume: str) -> Path:
    """Return ``runs/<recipe>-<objective>-seed<seed>``, with a number such as ``-2`` if there are
    several. A new run gets the first folder that does not exist, a resumed run the newest one."""
    base = Path("runs") / f"{recipe.name}-{recipe.objective.name}-seed{recipe.seed}"
    numbered = [base, *(base.with_name(f"{base.name}-{k}") for k in range(2, 1000))]
    taken = [p for p in numbered if os.path.lexists(p)]
    if resume != "never" and taken:
        return taken[-1]
    return _first_free(numbered)
