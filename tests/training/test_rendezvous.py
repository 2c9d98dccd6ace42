"""Ranks that cannot connect exit in time and print one line with the cause and what to do."""

import os
import socket
import subprocess
import sys
import time

import pytest
from small_runs import TINY_RUN

from bdkd.distributed.rendezvous import JoinError, read_launch

ADDRESS = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "1"}


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def start(tmp_path, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "bdkd", "train", *TINY_RUN, "--distributed.timeout", "2",
               "--device", "cpu", "--run-dir", str(tmp_path / "run")]  # fmt: skip
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    environment = {**inherited, **ADDRESS, "MASTER_PORT": free_port(), **variables}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def line_of(process: subprocess.Popen) -> str:
    """Wait for a rank that fails, and return the only line that it prints."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "cannot reach the others at 127.0.0.1:{port} within 2 s (distributed.timeout): "
             "Connection refused; start rank 0 on that machine"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, "cannot reach the others at no-such-host"),
        ({"RANK": "0"}, "waited 2 s (distributed.timeout) for rank 1: start every rank with"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT must be a whole number from 1 to 65535, got 'abc'"),
    ],
)  # fmt: skip
def test_a_rank_that_cannot_join_says_why_in_one_line(variables, expected, tmp_path):
    began, port = time.monotonic(), free_port()
    process = start(tmp_path, **{"MASTER_PORT": port, **variables})
    assert expected.format(port=port) in line_of(process)
    assert time.monotonic() - began < 30  # the import of torch and the timeout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MASTER_PORT": "99999"}, "MASTER_PORT must be a whole number from 1 to 65535"),
        ({"RANK": "2"}, "RANK must be a whole number from 0 to 1 (WORLD_SIZE is 2), got '2'"),
        ({"RANK": "x"}, "RANK must be a whole number from 0 to 1"),
        ({"RANK": "-1"}, "RANK must be a whole number from 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1, got '0'"),
        ({"WORLD_SIZE": "1"}, "RANK must be a whole number from 0 to 0 (WORLD_SIZE is 1)"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number of at least 1"),
    ],
)  # fmt: skip
def test_invalid_variables_are_named(variables, expected, monkeypatch):
    for name, value in {**ADDRESS, "MASTER_PORT": "29500", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(JoinError) as raised:
        read_launch()
    assert str(raised.value).startswith(expected)


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        line = line_of(start(tmp_path, RANK="0", MASTER_PORT=str(port)))
    assert f"cannot open port {port} (MASTER_PORT): Address already in use" in line


def test_another_program_at_the_address_is_reported(tmp_path):
    """A proxy or a web server may listen at the address of rank 0."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        line = line_of(start(tmp_path, MASTER_PORT=str(server.getsockname()[1])))
    assert "cannot reach the others at 127.0.0.1:" in line


def test_ranks_started_without_torchrun_train(tmp_path):
    port = free_port()
    ranks = [start(tmp_path, RANK=rank, MASTER_PORT=port) for rank in "10"]
    for process in ranks:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert (tmp_path / "run" / "summary.json").exists()
