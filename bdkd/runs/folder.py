"""The folder of a run: what lies where, who may write to it, and what can be taken up again."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from bdkd.config import Recipe, parse_recipe, to_toml
from bdkd.errors import DamagedFile, RunError, first_line
from bdkd.evaluation.predictions import Predictions, to_bytes
from bdkd.runs.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from bdkd.text import read_text

# A restarted run may be here before the processes of the one before it have all gone.
LOCK_SECONDS = 20.0
CHECKPOINT_NAME = re.compile(r"(step|best)-(\d{8})\.pt")


class RunFolder:
    """``config.toml``, ``metrics.jsonl``, ``summary.json``, ``checkpoints/``, ``figures/`` of a
    run."""

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
        self.saved = path / ".saved"  # exists once a checkpoint was written
        self._lock: IO[str] | None = None
        self._unwritten: list[str] = []

    def launched_by(self, identity: str) -> bool:
        """Whether the launch of this identity was the last to train here."""
        try:
            return (self.path / ".lock").read_text("utf-8") == identity
        except (OSError, UnicodeDecodeError):
            return False

    def open_for_training(self, resume: str, identity: str | None = None) -> bool:
        """Create and lock the folder. Returns whether it holds a run to continue, which may have
        been stopped before its first checkpoint.

        Args:
            resume: ``never``, ``auto`` (if there is something to resume) or ``require``.
            identity: of the launch, remembered for :meth:`launched_by`.

        Raises:
            RunError: the folder cannot be written, another process trains in it, it holds a run
                (or none) contrary to ``resume``, or it holds a run without ``config.toml``.
        """
        started = self._holds_run()
        if resume == "require" and not started:
            raise RunError(f"nothing to resume: {self.path} holds no run")
        try:
            for folder in (self.path, self.checkpoints, self.figures):
                folder.mkdir(parents=True, exist_ok=True)
            # "a": if this run is refused, the file has not changed
            self._lock = open(self.path / ".lock", "a")  # noqa: SIM115 - held while the run lives
        except OSError as error:
            raise RunError(
                f"cannot write the run's folder {self.path}: {error.strerror or error}; "
                "choose another with --run-dir"
            ) from error
        self._wait_for_lock(LOCK_SECONDS if identity and self.launched_by(identity) else 0.0)
        started = self._holds_run()  # another process may have begun one meanwhile
        for folder in (self.path, self.checkpoints, self.figures):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()  # of a writer that was killed; under the lock there is no other
        if started and resume == "never":
            raise RunError(
                f"{self.path} already holds a run: continue it with --resume or choose another "
                "--run-dir"
            )
        self._lock.truncate(0)
        self._lock.write(identity or "")
        self._lock.flush()
        return started

    def open_run(
        self, resume: str, identity: str | None
    ) -> tuple[bool, tuple[Path, dict[str, Any]] | None]:
        """Call :meth:`open_for_training`. Returns its result and the newest checkpoint, if any."""
        continues = self.open_for_training(resume, identity)
        return continues, self.newest_state(warn=print) if continues else None

    def _holds_run(self) -> bool:
        """Whether a run has begun here. ``RunError`` if it has lost its ``config.toml``."""
        try:
            if self.config.exists():
                return True
            left = [p for p in (self.summary, self.metrics) if p.exists()]
        except OSError as error:
            raise RunError(f"cannot read {self.path}: {error.strerror or error}") from error
        left += [p for p in self._checkpoint_files() if not p.name.startswith(".")]
        if left:
            raise RunError(
                f"{self.path} holds {left[0].relative_to(self.path)} of a run, but no config.toml: "
                "put it back to resume that run, or choose another --run-dir"
            )
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
                    raise RunError(
                        f"another process is training in {self.path}: wait for it or choose "
                        "another --run-dir"
                    ) from error
                time.sleep(0.1)

    def close(self) -> None:
        """Let others train here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, recipe: Recipe) -> None:
        text = to_toml(recipe)
        write_atomically(self.config, lambda file: file.write(text.encode()))

    def read_config(self) -> Recipe:
        try:
            text = read_text(self.config)
        except (OSError, RunError) as error:
            raise RunError(
                f"no run at {self.path}: cannot read {self.config} ({first_line(error)})"
            ) from error
        return parse_recipe(text, source=str(self.config))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        text = to_json(summary, indent=2) + "\n"
        write_atomically(self.summary, lambda file: file.write(text.encode()))

    def write_predictions(self, predictions: Predictions) -> None:
        content = to_bytes(predictions)
        write_atomically(self.predictions, lambda file: file.write(content))

    def checkpoint_paths(self, kind: str = "step") -> list[Path]:
        """Return the checkpoints, ``step`` or ``best``, the newest first.

        Raises:
            RunError: the folder is there and cannot be read.
        """
        named = ((CHECKPOINT_NAME.fullmatch(p.name), p) for p in self._checkpoint_files())
        return sorted((p for match, p in named if match and match[1] == kind), reverse=True)

    def resumable_paths(self) -> list[Path]:
        """Return all checkpoints, the newest first. The best student's file has the whole state
        too, and is the newest one if the run was killed before it saved again."""
        saved = [*self.checkpoint_paths("step"), *self.checkpoint_paths("best")]
        return sorted(saved, key=step_of, reverse=True)

    def _checkpoint_files(self) -> list[Path]:
        try:
            return list(self.checkpoints.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise RunError(
                f"cannot read the folder {self.checkpoints}: {error.strerror or error}; nothing "
                "was changed"
            ) from error

    def step_path(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.pt"

    def best_path(self, step: int) -> Path:
        return self.checkpoints / f"best-{step:08d}.pt"

    def save(self, step: int, recipe: Recipe, state: Mapping[str, Any], keep: int) -> Path:
        """Write the checkpoint of a step. Of the older ones, keep the newest ``keep - 1`` and the
        best students that these refer to."""
        path = self.step_path(step)
        self._save(path, recipe, state)
        kept, dropped = self.checkpoint_paths()[:keep], self.checkpoint_paths()[keep:]
        known = [p for p in self.checkpoint_paths("best") if step_of(p) <= step_of(kept[-1])]
        for old in (*dropped, *known[1:]):
            with contextlib.suppress(OSError):  # tried again with the next checkpoint
                old.unlink()
        return path

    def save_best(self, step: int, recipe: Recipe, state: Mapping[str, Any]) -> None:
        """Keep the best student under its step: until a checkpoint knows of it, the one before it
        stays too."""
        self._save(self.best_path(step), recipe, state)

    def _save(self, path: Path, recipe: Recipe, state: Mapping[str, Any]) -> None:
        save_checkpoint(path, to_toml(recipe), state)
        with contextlib.suppress(OSError):
            self.saved.touch()

    def drop_after(self, step: int) -> None:
        """Remove the lines of metrics that a run that continues at ``step`` writes again."""
        kept = [to_json(line) for line in self.read_metrics() if line["step"] <= step]
        text = "".join(f"{line}\n" for line in kept)
        write_atomically(self.metrics, lambda file: file.write(text.encode()))

    def newest_state(self, warn: Callable[[str], object]) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint, or None if the run was stopped before its first one.

        A checkpoint whose checksums prove that it is damaged is renamed to ``*.damaged``, ``warn``
        gets the proof, and the one before is taken. Any other failure may pass, so it ends the
        command and changes nothing.

        Raises:
            RunError: a checkpoint cannot be read, or the run has had checkpoints and has none now.
        """
        for path in self.resumable_paths():
            try:
                return path, load_checkpoint(path)[1]
            except DamagedFile as error:
                aside = _free_name(path)
                try:
                    path.rename(aside)  # or it would count as one of those to keep
                except OSError as reason:
                    raise RunError(
                        f"{error}; it could not be renamed to {aside.name}: "
                        f"{reason.strerror or reason}"
                    ) from error
                warn(f"{path} is damaged: {error.__cause__}; it was renamed to {aside.name}")
        self._refuse_to_start_over()
        return None

    def _refuse_to_start_over(self) -> None:
        """Raise ``RunError`` if a run without checkpoints was once saved: to continue it from step
        0 would overwrite what is left of it."""
        files = self._checkpoint_files()
        aside = [p.name for p in files if ".damaged" in p.suffixes or p.suffix == ".unreadable"]
        last = max((line["step"] for line in self.read_metrics()), default=0)
        # Runs of older versions have no mark. The first checkpoint is written before the second.
        written = self.saved.exists() or last > 2 * self.read_config().checkpoint.every_steps
        if aside:
            found = f"it holds {', '.join(sorted(aside))}"
        elif self.summary.exists() or written:
            found = f"the run had come to step {last}, so it was saved once"
        else:
            return
        raise RunError(
            f"no checkpoint in {self.checkpoints} to resume from ({found}): put one back, or "
            "choose another --run-dir to start anew"
        )

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines that can be read: a run that was killed may have cut off its last."""
        try:
            content = self.metrics.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"cannot read {self.metrics}: {error.strerror or error}") from error
        lines = []
        for line in content.splitlines(keepends=True):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, or not even text
                continue
            if (
                line.endswith(b"\n")
                and isinstance(values, dict)
                and type(values.get("step")) is int
            ):
                lines.append(values)
        return lines

    def append_metrics(self, values: Mapping[str, Any]) -> str | None:
        """One JSON object, one line. Where the disk is full the line waits for the next call, and
        what to tell the user is returned."""
        self._unwritten.append(to_json(values) + "\n")
        try:
            self._write_metrics()
        except OSError as error:
            return (
                f"cannot write {self.metrics}: {first_line(error)}; its lines are kept and tried "
                "again"
            )
        return None

    def flush_metrics(self) -> None:
        """Write the lines that still wait.

        Raises:
            RunError: they cannot be written.
        """
        try:
            self._write_metrics()
        except OSError as error:
            raise RunError(
                f"cannot write {self.metrics}: {first_line(error)}; mend that and continue with "
                "--resume (what was saved before is whole)"
            ) from error

    def _write_metrics(self) -> None:
        with open(self.metrics, "ab", buffering=0) as file:
            whole = file.seek(0, os.SEEK_END)
            try:
                for line in self._unwritten:
                    text = line.encode()
                    if file.write(text) != len(text):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(whole)  # never half a line
                raise
        self._unwritten.clear()


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to, or the checkpoint's own folder."""
    run = checkpoint.parent.parent
    return run if (run / "config.toml").exists() else checkpoint.parent


def selected_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: a file, or the selected one of a run's folder."""
    if path.is_file():
        return path
    folder = RunFolder(path)
    if not path.is_dir() or not folder.config.exists():
        raise RunError(
            f"no run and no checkpoint at {path}: give the folder of a run (it holds config.toml "
            "and checkpoints/) or a file from there"
        )
    saved = folder.checkpoint_paths()
    if folder.read_config().train.select == "best":
        saved = folder.checkpoint_paths("best") or saved
    if not saved:
        raise RunError(
            f"the run {path} has no checkpoint yet: wait for its first, or bdkd train --resume "
            f"--run-dir {path}"
        )
    return saved[0]


def _free_name(checkpoint: Path) -> Path:
    """A name for a damaged checkpoint: ``*.damaged``, or ``*.damaged.2`` if that is taken."""
    names = [checkpoint.with_suffix(".damaged")]
    names += [checkpoint.with_suffix(f".damaged.{number}") for number in range(2, 1000)]
    return next(name for name in names if not os.path.lexists(name))


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.stem.split("-")[1])


def to_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON: a number that is not finite becomes null."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def default_run_dir(recipe: Recipe, resume: str) -> Path:
    """``runs/<recipe>-<method>-seed<seed>``: the newest such run to resume, or the first free."""
    base = Path("runs") / f"{recipe.name}-{recipe.objective.name}-seed{recipe.seed}"
    numbered = [base, *(base.with_name(f"{base.name}-{k}") for k in range(2, 1000))]
    taken = [p for p in numbered if os.path.lexists(p)]
    if resume != "never" and taken:
        return taken[-1]
    return next(p for p in numbered if p not in taken)
