"""Unusual uses that random command lines found. Each ends with one line that names the cause."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import TINY_RUN, bdkd

from bdkd.cli import main
from bdkd.runs.folder import selected_checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    main(["train", *TINY_RUN, "--max-steps", "2", "--quiet", "--run-dir", str(folder)])
    main(["export", str(folder), "--to", "safetensors"])
    return folder


def fails(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "--debug" not in error
    return exit_.value.code, error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["data", "fetch", "cifar10", "--to", "~nouser/x"], "--to must be a path in which ~ names"),
        (["data", "check", "~nouser/x"], "ROOT must be a path"),
        (["train", *TINY_RUN, "--plugin", "~nouser/x.py"], "--plugin must be a path"),
        (["compare", *TINY_RUN, "--methods", "kd:temperature="],
         "--methods kd: temperature must be a number, got ''"),
        (["compare", *TINY_RUN, "--methods", "bdkd:gamma=x"], "gamma must be a number, got 'x'"),
        (["compare", *TINY_RUN, "--seeds", "1000000000000"], "--seeds must be at most 10,000"),
        (["compare", ""], "recipe"),
        (["train", *TINY_RUN, "--threads", "100000000"], "threads must be in [1, 4096], got"),
        (["train", *TINY_RUN, "--device", "cuda:99999999999999999999"], "device must be auto, cpu"),
        (["train", *TINY_RUN, "--networks.teacher.weights-key", ""],
         "networks.teacher.weights_key must be left out unless networks.teacher.weights is a file "
         "or the folder of a run, got ''"),
    ],
)  # fmt: skip
def test_an_unusable_value_is_named(arguments, reason, capsys):
    code, error = fails(capsys, *arguments)
    assert code in (1, 2)
    assert reason in error


def test_too_many_images_are_refused(finished, capsys):
    code, error = fails(capsys, "update-bn", str(finished), "--images", "99999999999")
    assert (code, "--images must be at least 1 and below 2**31" in error) == (2, True)


def test_a_comparison_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    done = bdkd("compare", *TINY_RUN, "--methods", "dml", "--seeds", "1", "--max-steps", "1",
                "--folder", str(tmp_path), timeout=60)  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"cannot write the folder {tmp_path}" in done.stderr


def test_resuming_a_run_without_metrics_gives_a_warning(tmp_path, capsys):
    main(["train", *TINY_RUN, "--max-steps", "2", "--quiet", "--run-dir", str(tmp_path)])
    (tmp_path / "metrics.jsonl").unlink()
    main(["train", "--resume", "--run-dir", str(tmp_path)])
    assert "warning: " in (said := capsys.readouterr().out)
    assert "metrics.jsonl contains no metrics to draw: curves.png was not written" in said


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_a_full_standard_output_is_named(option):
    """On Linux, writes to /dev/full fail because of missing space."""
    command = [sys.executable, "-m", "bdkd", option]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "bdkd: cannot read or write a stream: No space left on device; fix this and try again\n"
    )


def test_a_large_export_is_read_with_little_memory(finished):
    [path] = (finished / "export").rglob("*.safetensors")
    script = (
        "import resource, sys; from bdkd.cli import main; import torch\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**31,) * 2)\n"
        f"main(['evaluate', {str(path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [("networks", 10**30), ("ema", None), ("ema_copied_until", [None]), ("ema_updates", "x"),
     ("position", 1), ("ranks", {}), ("format", torch.ones(2))],
)  # fmt: skip
@pytest.mark.parametrize("command", ["evaluate", "export --to safetensors", "update-bn"])
def test_a_checkpoint_with_another_structure_is_named(
    key, value, command, finished, tmp_path, capsys
):
    content = torch.load(selected_checkpoint(finished), weights_only=True)
    (content if key == "format" else content["state"])[key] = value
    path = tmp_path / "step-00000002.pt"
    torch.save(content, path)
    name, *options = command.split()
    code, error = fails(capsys, name, str(path), *options)
    assert code == 1
    assert str(path) in error
