"""Training with two ranks on ImageNet's layout: a killed rank, and errors of one or all ranks."""

import dataclasses
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from launches import Launch
from test_resume import assert_same_end

from bdkd.config import load_recipe
from bdkd.data import Shard, create_source
from bdkd.data.base import epoch_order

# An epoch has 8 batches, of which the two ranks have unequal parts. The second epoch has larger
# images, random erasing is on, and checkpoints are in the middle of the epochs.
SMALL = [
    "imagenet-smoke", "--networks.teacher.model", "resnet8", "--networks.student.model", "resnet8",
    "--data.image-size", "32", "--data.progressive", "24", "32", "--data.erasing", "0.5",
    "--train.epochs", "2", "--train.batch-size", "13", "--train.precision", "fp32",
    "--checkpoint.every-steps", "3", "--log-every", "1", "--log", "--device", "cpu",
]  # fmt: skip


@pytest.mark.parametrize("loader", [pytest.param("dali", marks=pytest.mark.soak), "pillow"])
def test_two_ranks_resume_exactly_after_one_is_killed(tree, tmp_path, loader):
    data = ["--data.root", str(tree), "--data.loader", loader, "--data.workers", "1"]
    with Launch(2, tmp_path / "whole", *SMALL, *data) as whole:
        assert whole.end() == 0, whole.text()
    with Launch(2, tmp_path / "run", *SMALL, *data, options=("--max-restarts", "2")) as launch:
        launch.until_step(5)
        launch.signal(1, signal.SIGKILL)
        assert launch.end() == 0, launch.text()
    continued = re.search(r"continuing at step (\d+)", launch.text())
    assert continued, launch.text()
    assert int(continued[1]) % 8, "resumed between epochs"
    assert_same_end(launch.run, whole.run)


def test_a_bad_file_of_rank_1_is_an_error_of_one_line(tree, tmp_path):
    """The terminal shows one line, of the rank with the file. Its log has the traceback."""
    root = shutil.copytree(tree, tmp_path / "tree")
    config = dataclasses.replace(load_recipe("imagenet-smoke").data, root=str(root))
    images = create_source(config, 0, torch.device("cpu"), torch.channels_last).splits["train"]
    place = 13 + Shard(1, 2).of_batch(13).start  # the first of rank 1 in the second step
    file = Path(images.item(int(epoch_order(0, 0, len(images))[place])).path)
    file.write_bytes(file.read_bytes()[:2000])
    data = ["--data.root", str(root), "--data.loader", "pillow", "--data.workers", "1"]
    with Launch(2, tmp_path / "run", *SMALL, *data) as launch:
        assert launch.end() == 1, launch.text()
        assert not launch.pids()
    said = re.findall(r"^bdkd: .*cannot decode.*$", launch.text(), re.MULTILINE)
    assert len(said) == 1, launch.text()
    assert said[0].startswith(f"bdkd: rank 1: cannot decode the image {file}: ")
    assert "data.exclude" in said[0]
    assert "Traceback" in (launch.run / "logs" / "rank-1.log").read_text()


def test_an_error_of_all_ranks_is_printed_once(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree")
    shutil.rmtree(root / "val")
    with Launch(2, tmp_path / "run", *SMALL, "--data.root", str(root)) as launch:
        assert launch.end() == 1, launch.text()
    said = re.findall(r"^bdkd: .*$", launch.text(), re.MULTILINE)
    assert len(said) == 1, launch.text()
    assert "no folder" in said[0]
