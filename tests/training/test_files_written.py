"""Atomic writes, snapshots, strict JSON, and the weights of each network in a checkpoint."""

import errno
import json
import math
import os
import threading
from pathlib import Path

import pytest
import torch
from small_runs import Tiny, initial
from torch import nn

from bdkd.engine.state import snapshot
from bdkd.errors import RunError
from bdkd.runs.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from bdkd.runs.folder import RunFolder, to_json
from bdkd.runs.weights import load_weights, mismatched_keys, network_weights


def test_a_file_keeps_its_old_content_until_the_new_content_is_complete(tmp_path):
    path = tmp_path / "file"
    for content, old in (
        (b"first", None),
        (b"second, longer", b"first"),
        (b"3", b"second, longer"),
    ):

        def write(file, content=content, old=old):
            file.write(content)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == old

        write_atomically(path, write)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EIO, "fix the cause"),
    ],
)
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(number, remedy, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(RunError, match=f"{os.strerror(number)}; {remedy}.* with --resume"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_synced_to_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """Without this order, a power cut could leave a file of zeros under the name of the old one."""
    order, replace, fsync = [], os.replace, os.fsync

    def record_fsync(handle):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def record_replace(source, target):
        order.append("replaced")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomically(tmp_path / "file", lambda file: file.write(b"content"))
    file, *others = order
    assert "file" in file
    assert others == [
        "replaced",
        tmp_path.name,
    ]  # the folder is synced last, because it has the name


def test_a_snapshot_does_not_change_with_the_next_steps():
    """Training continues while a snapshot is written."""
    weights = torch.zeros(3, requires_grad=True)
    state = {"a": weights, "b": [torch.ones(2), (torch.ones(1), 5)], "c": {"d": "text"}}
    copied = snapshot(state)
    with torch.no_grad():
        weights.add_(1)
        state["b"][0].add_(1)
        state["b"][1][0].add_(1)
    assert copied["a"].tolist() == [0, 0, 0]
    assert not copied["a"].requires_grad
    assert copied["b"][0].tolist() == [1, 1]
    assert isinstance(copied["b"][1], tuple)
    assert copied["b"][1][0].tolist() == [1]
    assert (copied["b"][1][1], copied["c"]) == (5, {"d": "text"})


def test_numbers_that_are_not_finite_are_null_in_json():
    """The result is strict JSON at any depth, which every program can read."""
    values = {"loss": math.nan, "a": {"b": math.inf, "c": -math.inf, "d": 0.5}, "e": [1, None]}
    expected = {"loss": None, "a": {"b": None, "c": None, "d": 0.5}, "e": [1, None]}
    assert json.loads(to_json(values), parse_constant=pytest.fail) == expected


# --- initial weights ------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Return a checkpoint of two networks and one average, all with different weights."""
    torch.manual_seed(0)
    teacher, student, average = (Tiny().state_dict() for _ in range(3))
    networks = {f"members.teacher.{key}": value for key, value in teacher.items()}
    networks |= {f"members.student.{key}": value for key, value in student.items()}
    state = {"networks": networks, "ema": {"student_ema": average}, "position": {},
             "data": {"classes": ["cat", "dog"]}}  # fmt: skip
    save_checkpoint(tmp_path / "step.pt", "", state)
    return tmp_path / "step.pt"


def test_each_network_of_a_checkpoint_is_found_by_its_name(checkpoint):
    state = load_checkpoint(checkpoint)[1]
    first = "0.weight"
    kinds = {name: network_weights(state, name, checkpoint)[first]
             for name in ("teacher", "student", "student_ema")}  # fmt: skip
    assert torch.equal(kinds["teacher"], state["networks"]["members.teacher.0.weight"])
    assert torch.equal(kinds["student"], state["networks"]["members.student.0.weight"])
    assert torch.equal(kinds["student_ema"], state["ema"]["student_ema"][first])
    with pytest.raises(RunError, match="no network 'pupil': it has student, student_ema, teacher"):
        network_weights(state, "pupil", checkpoint)
    network = Tiny()
    assert load_weights(network, "teacher", initial(checkpoint)).classes == ["cat", "dog"]
    assert torch.equal(network[0].weight, kinds["teacher"])
    assert torch.equal(network[1].running_var, torch.ones(6))


def test_weights_that_do_not_fit_are_named():
    network, weights = nn.Linear(2, 3), nn.Linear(2, 3).state_dict()
    assert mismatched_keys(network, weights) == ""
    assert mismatched_keys(network, {"weight": weights["weight"]}) == "it lacks 'bias'"
    wide = mismatched_keys(nn.Linear(4, 3), weights)
    assert wide == "'weight' has shape (3, 2), needed (3, 4)"
    assert "it contains 'more', but the network does not" in mismatched_keys(
        network, {**weights, "more": 1}
    )
    assert "'bias' has shape ()" in mismatched_keys(network, {**weights, "bias": 1.0})


def test_a_restarted_launch_waits_for_the_lock_of_its_own_run(tmp_path):
    """torchrun may restart ranks before the kernel has released the lock of a killed rank."""
    first, second, stranger = (RunFolder(tmp_path / "run") for _ in range(3))
    assert first.open_for_training("auto", "launch 1") is False
    assert second.launched_by("launch 1")
    assert not second.launched_by("launch 2")
    with pytest.raises(RunError, match="another process is training in"):
        stranger.open_for_training("auto", "launch 2")
    ends = threading.Timer(0.5, first.close)
    ends.start()
    second.open_for_training("auto", "launch 1")
    ends.join()
    second.close()
