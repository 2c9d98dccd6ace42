"""Measure how long a checkpoint stops or slows the training loop.

    python bench/checkpoint_stall.py [--every 50] [--checkpoints 6] [--recipe digits]

Trains a recipe in one process, in a temporary folder. The *stall* is the time that the loop spends
on taking a snapshot, and on waiting for the previous file if it is still being written. The second
number is the extra time of steps during which a file is being written. Both are also given as
shares of the time between two checkpoints.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from progress import Progress

from bdkd.config import CheckpointConfig, load_recipe
from bdkd.data import Batch
from bdkd.engine.components import build_components
from bdkd.runs.checkpointer import Checkpointer
from bdkd.runs.folder import RunFolder
from bdkd.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--checkpoints", type=int, default=6)
    arguments = parser.parse_args()

    stalls: list[tuple[float, float]] = []  # when a save ended, and how long it stopped the loop
    steps: list[tuple[float, bool]] = []  # seconds of a step, and whether a file was being written
    save, step = Checkpointer.save, Trainer.train_step
    current: list[Checkpointer] = []

    def timed_save(self: Checkpointer, newest: bool, best: bool) -> None:
        current[:] = [self]
        began = time.perf_counter()
        save(self, newest, best)
        stalls.append((time.perf_counter(), time.perf_counter() - began))

    def timed_step(self: Trainer, batch: Batch) -> None:
        progress.start()  # before the measured time
        writing = bool(current) and current[0].writer.busy()
        began = time.perf_counter()
        step(self, batch)
        steps.append((time.perf_counter() - began, writing))

    Checkpointer.save, Trainer.train_step = timed_save, timed_step  # type: ignore[method-assign]
    total = arguments.every * arguments.checkpoints
    progress = Progress("checkpoint_stall: step", total + 1)
    with tempfile.TemporaryDirectory() as folder, progress:
        recipe = load_recipe(arguments.recipe)
        recipe = dataclasses.replace(
            recipe, max_steps=total + 1, run_dir=folder, log=(), evaluate_every=10**6,
            checkpoint=CheckpointConfig(every_steps=arguments.every),
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            Trainer(build_components(recipe)).train(RunFolder(Path(folder)))
        size = max(p.stat().st_size for p in (Path(folder) / "checkpoints").glob("step-*"))

    regular = stalls[: arguments.checkpoints]
    between = statistics.median(b[0] - a[0] for a, b in itertools.pairwise(regular))
    stall = statistics.median(seconds for _, seconds in regular)
    quiet = statistics.median(seconds for seconds, writing in steps if not writing)
    busy = [seconds for seconds, writing in steps if writing]
    slower = (statistics.median(busy) - quiet) * len(busy) / len(regular) if busy else 0.0
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.recipe}, "
        f"{len(regular)} checkpoints of {size / 1e6:.1f} MB, {arguments.every} steps apart\n"
        f"  time between them       {1e3 * between:9.1f} ms  (step {1e3 * quiet:.1f} ms)\n"
        f"  stall of the loop       {1e3 * stall:9.2f} ms  {stall / between:8.2%}\n"
        f"  slower steps in a write {1e3 * slower:9.2f} ms  {slower / between:8.2%}  "
        f"({len(busy) / len(regular):.1f} steps per checkpoint)"
    )


if __name__ == "__main__":
    main()
