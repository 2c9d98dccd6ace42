"""Training over thousands of files from the command line: killed again and again, and watched.

``make soak`` takes 3,960 JPEGs of ImageNet's commonest size in 120 classes and ten epochs; a sample
of a few hundred files always runs.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from imagenet_trees import HEIGHT, WIDTH, labelled, make_tree
from launches import steps_done
from small_runs import metrics
from test_resume import assert_same_end

BATCH = 20


class Size(NamedTuple):
    """How much of everything."""

    classes: int
    training: int  # images a class
    validation: int
    epochs: int
    kills: int
    side: int  # pixels
    grows: float  # of the memory after two epochs; a leak of one batch an epoch is more

    @property
    def steps(self) -> int:
        """Of an epoch."""
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


SAMPLE = Size(20, 12, 2, 3, 1, 32, 1.15)
WHOLE = Size(120, 30, 3, 10, 6, 64, 1.05)


@pytest.fixture(scope="module", params=[
    pytest.param(SAMPLE, id="sample"), pytest.param(WHOLE, id="whole", marks=pytest.mark.soak),
])  # fmt: skip
def size(request) -> Size:
    return request.param


@pytest.fixture(scope="module")
def many(size, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("many") / "tree"
    return make_tree(root, *size[:3], sizes=((HEIGHT, WIDTH),))


class Seen(NamedTuple):
    """A run from outside, its workers included."""

    memory: int  # bytes that are no other process's
    files: int  # open
    threads: int
    processes: int


class Train:
    """``bdkd train`` in a process of its own."""

    def __init__(self, run: Path, *arguments: str) -> None:
        self.run, self.output = run, run.with_name(f"{run.name}.out")
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bdkd", "train", *arguments, "--run-dir", str(run)],
                stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def __enter__(self) -> "Train":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def until_step(self, step: int) -> None:
        deadline = time.monotonic() + 900
        while steps_done(self.run) < step:
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait(900)

    def seen(self) -> Seen:
        """The least of some looks: a checkpoint that is being written takes a file and a thread."""
        process, looks = psutil.Process(self.process.pid), []
        for _ in range(8):
            all_ = [process, *process.children(recursive=True)]
            memory = sum(p.memory_full_info().uss for p in all_)
            looks.append((memory, process.num_fds(), process.num_threads(), len(all_)))
            time.sleep(0.02)
        return Seen(*map(min, zip(*looks, strict=True)))


@pytest.mark.parametrize("loader", [
    "dali", pytest.param("pillow", marks=pytest.mark.soak),
])  # fmt: skip
def test_a_run_killed_again_and_again_ends_as_the_one_that_was_not(many, size, loader, tmp_path):
    """Bit for bit; and that one takes no more memory, files or threads from epoch to epoch."""
    arguments = size.arguments(many, loader)
    with Train(tmp_path / "whole", *arguments) as whole:
        seen = []
        for epoch in range(2, size.epochs + 1):
            whole.until_step(epoch * size.steps - size.steps // 2)
            seen.append(whole.seen())
        assert whole.end() == 0, whole.output.read_text()
    print(loader, *seen, sep="\n")
    first, last = seen[0], seen[-1]
    assert last[1:] == first[1:], seen
    assert last.memory < size.grows * first.memory, seen

    run, chance = tmp_path / "run", random.Random(0)
    span = size.epochs * size.steps // (size.kills + 1)
    for kill in range(size.kills):
        step = (kill + 1) * span - chance.randrange(size.steps // 12 + 1)  # in mid-epoch
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
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
