"""Training on thousands of files from the command line. The runs are killed and measured.

``make soak`` uses 3,960 JPEGs of ImageNet's most common size in 120 classes, for ten epochs.
A sample of a few hundred files always runs.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from imagenet_trees import HEIGHT, WIDTH, labelled, make_tree
from small_runs import metrics
from test_resume import assert_same_end

from bdkd.data.imagenet.dali import READERS

BATCH = 20


class Size(NamedTuple):
    """The size of a test."""

    classes: int
    training: int  # images per class
    validation: int
    epochs: int
    kills: int
    side: int  # pixels
    grows: float  # limit of the memory, relative to the second epoch; a leak per step exceeds it

    @property
    def steps(self) -> int:
        """Return the number of steps of an epoch."""
        return self.classes * self.training // BATCH

    def arguments(self, root: Path, loader: str) -> list[str]:
        return [
            "imagenet-smoke", "--data.root", str(root), "--data.loader", loader,
            "--networks.teacher.model", "resnet8", "--networks.student.model", "resnet8",
            "--data.validation", "0", "--data.workers", "1", "--threads", "1", "--device", "cpu",
            "--data.image-size", str(self.side), "--data.erasing", "0.5", "--data.mixup", "0.2",
            "--data.rand-augment", "1", "5", "--train.precision", "fp32",
            "--train.batch-size", str(BATCH), "--train.epochs", str(self.epochs),
            "--checkpoint.every-steps", str(self.steps // 3 + 1), "--log-every", "1", "--log",
        ]  # fmt: skip


SAMPLE = Size(20, 12, 2, 4, 1, 32, 1.15)
WHOLE = Size(120, 30, 3, 10, 6, 64, 1.05)
LONG = pytest.mark.timeout(7200)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144",
}  # fmt: skip


@pytest.fixture(scope="module", params=[
    pytest.param(SAMPLE, id="sample"),
    pytest.param(WHOLE, id="whole", marks=[pytest.mark.soak, LONG]),
])  # fmt: skip
def size(request) -> Size:
    return request.param


@pytest.fixture(scope="module")
def many(size, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("many") / "tree"
    return make_tree(root, *size[:3], sizes=((HEIGHT, WIDTH),))


class Seen(NamedTuple):
    """The resources of a run, including its workers."""

    memory: int  # bytes that no other process shares
    files: int  # open files except images
    images: int  # open images, at most one for each thread that reads them
    threads: int
    processes: int


class Train:
    """``bdkd train`` in a separate process."""

    def __init__(self, run: Path, *arguments: str) -> None:
        self.run, self.output = run, run.with_name(f"{run.name}.out")
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bdkd", "train", *arguments, "--run-dir", str(run)],
                stdout=output, stderr=subprocess.STDOUT,
                # glibc returns freed memory at once, so that its own caches are not measured.
                env={**os.environ, **ENVIRONMENT},
            )  # fmt: skip

    def __enter__(self) -> "Train":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def step(self) -> int:
        """Return the last step in the metrics. Only the end of the file is read, because reading
        the whole file every time would slow down the run."""
        metrics = self.run / "metrics.jsonl"
        if not metrics.exists():
            return 0
        found = re.findall(rb'"step": (\d+),', metrics.read_bytes()[-4096:])
        return int(found[-1]) if found else 0

    def until_step(self, step: int) -> None:
        while self.step() < step:
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait()

    def watched(self, tree: Path, steps: int) -> dict[int, list[Seen]]:
        """Measure each epoch but the first, until the run ends. The first and last steps of an
        epoch are left out, because evaluation opens and closes other files."""
        looks = defaultdict(list)
        while self.process.poll() is None:
            time.sleep(0.05)
            epoch, step = divmod(self.step(), steps)
            if epoch and 2 <= step <= steps - 2:
                # Stop the run, so that it cannot end while a slow machine measures it.
                self.process.send_signal(signal.SIGSTOP)
                try:
                    if self.step() == epoch * steps + step:
                        looks[epoch].append(self.seen(tree))
                except psutil.NoSuchProcess:  # a worker that ended
                    continue
                finally:
                    self.process.send_signal(signal.SIGCONT)
        return looks

    def seen(self, tree: Path) -> Seen:
        process = psutil.Process(self.process.pid)
        all_ = [process, *process.children(recursive=True)]
        memory = sum(p.memory_full_info().uss for p in all_)
        images = sum(Path(file.path).is_relative_to(tree) for file in process.open_files())
        files = process.num_fds() - images
        return Seen(memory, files, images, process.num_threads(), len(all_))


@pytest.mark.soak  # test_imagenet_ranks.py kills and resumes one run in every suite
@pytest.mark.parametrize("loader", ["dali", "pillow"])
def test_a_run_that_is_killed_several_times_ends_as_one_that_is_not(many, size, loader, tmp_path):
    """The results are equal bit for bit. The run that is not killed does not use more memory, files
    or threads from epoch to epoch."""
    arguments = size.arguments(many, loader)
    with Train(tmp_path / "whole", *arguments) as whole:
        looks = whole.watched(many, size.steps)
        assert whole.end() == 0, whole.output.read_text()
    # Temporary files and threads, such as those of a checkpoint, are in the maximum and not in the
    # minimum.
    least = {epoch: Seen(*map(min, zip(*seen, strict=True))) for epoch, seen in looks.items()}
    most = {epoch: Seen(*map(max, zip(*seen, strict=True))) for epoch, seen in looks.items()}
    for epoch, seen in looks.items():
        print(f"{loader} {epoch}: {least[epoch]} to {most[epoch]}, {len(seen)} looks")
    first, last = min(looks), max(looks)
    assert last > first
    assert least[last].files <= most[first].files
    assert least[last].threads <= most[first].threads
    assert least[last].processes <= most[first].processes
    assert max(seen.images for seen in most.values()) <= READERS
    assert least[last].memory < size.grows * least[first].memory

    run, chance = tmp_path / "run", random.Random(0)
    span = size.epochs * size.steps // (size.kills + 1)
    for kill in range(size.kills):
        step = (kill + 1) * span - size.steps // 2 - chance.randrange(size.steps // 12 + 1)
        with Train(run, *(["--resume"] if kill else arguments)) as train:
            train.until_step(step)
            os.kill(train.process.pid, signal.SIGKILL)
            assert train.end() == -signal.SIGKILL
    with Train(run, "--resume") as train:
        assert train.end() == 0, train.output.read_text()
    continued = re.findall(r"continuing at step (\d+)", train.output.read_text())
    assert len(continued) == size.kills
    assert any(int(step) % size.steps for step in continued), continued
    assert_same_end(run, whole.run)


@pytest.mark.soak
@LONG
def test_damaged_files_among_thousands_are_found_and_left_out(tmp_path):
    root = make_tree(tmp_path / "tree", *WHOLE[:3], sizes=((HEIGHT, WIDTH),))
    files = [file for split in ("train", "val") for file, _ in labelled(root, split)]
    chance = random.Random(0)
    damaged = sorted(chance.sample(files, 40), key=files.index)
    for number, file in enumerate(damaged):
        whole = file.read_bytes()
        cut = chance.randrange(700, len(whole) - 2000)
        file.write_bytes([whole[:cut], b"", b"a text\n" * 99, whole[:300]][number % 4])
    listed = tmp_path / "bad.txt"
    command = [sys.executable, "-m", "bdkd", "data", "check", str(root), "--to", str(listed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "40 of 3,960 images cannot be decoded" in done.stderr
    found = [line.split("\t")[0] for line in listed.read_text().splitlines()[1:]]
    assert found == [str(file.relative_to(root)) for file in damaged]
    arguments = [*WHOLE.arguments(root, "dali"), "--train.epochs", "1"]
    with Train(tmp_path / "run", *arguments, "--data.exclude", str(listed)) as train:
        assert train.end() == 0, train.output.read_text()
    trained = sum("loss" in str(line) for line in metrics(tmp_path / "run"))
    in_train = sum(name.startswith("train/") for name in found)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["networks"]
    assert trained >= (WHOLE.classes * WHOLE.training - in_train) // BATCH
