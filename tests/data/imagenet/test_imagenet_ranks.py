"""Training on ImageNet's layout by two ranks: what one of them dies of, and what comes back."""

import re
import shutil
import signal

import pytest
from imagenet_trees import labelled
from launches import Launch
from test_resume import assert_same_end

# 108 images in 8 batches an epoch, of which the two ranks take unequal parts; the second epoch is
# larger, everything is varied, and the checkpoints lie in the middle of the epochs.
SMALL = [
    "imagenet-smoke", "--networks.teacher.model", "resnet8", "--networks.student.model", "resnet8",
    "--data.image-size", "32", "--data.progressive", "24", "32", "--data.erasing", "0.5",
    "--train.epochs", "2", "--train.batch-size", "13", "--train.precision", "fp32",
    "--checkpoint.every-steps", "3", "--log-every", "1", "--log", "--device", "cpu",
]  # fmt: skip


@pytest.mark.parametrize("loader", [pytest.param("dali", marks=pytest.mark.soak), "pillow"])
def test_two_ranks_killed_in_mid_epoch_end_as_two_that_were_not(tree, tmp_path, loader):
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


def test_a_bad_file_ends_both_ranks_and_is_named(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree")
    for file, _ in labelled(root, "train")[::20]:
        file.write_bytes(file.read_bytes()[:2000])
    data = ["--data.root", str(root), "--data.loader", "pillow", "--data.workers", "1"]
    with Launch(2, tmp_path / "run", *SMALL, *data) as launch:
        assert launch.end() == 1, launch.text()
        assert not launch.pids()
    text = launch.text() + "".join(f.read_text() for f in (launch.run / "logs").glob("*.log"))
    assert re.search(r"cannot decode the image .*data\.exclude", text), text
