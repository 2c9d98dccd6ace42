"""Injected faults: saved files stay intact, and one clear line says what happened."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from launches import TINY, Launch
from small_runs import SMALL, TINY_RUN

import bdkd.runs.folder as run_folder
from bdkd.cli import main
from bdkd.distributed.context import DistributedContext
from bdkd.errors import RunError
from bdkd.runs.checkpoint import BackgroundWriter, load_checkpoint
from bdkd.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_figures")

FULL = "No space left on device; free some space"


# --- a full disk ----------------------------------------------------------------------------------


def test_training_continues_if_the_disk_is_full_at_a_checkpoint(tmp_path, monkeypatch, capsys):
    """The disk is full at steps 10 and 15 of 20. The previous checkpoint stays intact."""
    write, refused, left = run_folder.save_checkpoint, [], []

    def save(path, recipe, state):
        step = state["position"]["step"]
        if step in (10, 15):
            refused.append(step)
            left.append(sorted(p.name for p in path.parent.glob("step-*")))
            load_checkpoint(path.parent / "step-00000005.pt")
            raise RunError(f"cannot write {path}: {FULL}")
        write(path, recipe, state)

    monkeypatch.setattr(run_folder, "save_checkpoint", save)
    run = tmp_path / "run"
    main(["train", *SMALL, "--max-steps", "20", "--evaluate-every", "9", "--run-dir", str(run)])
    said = capsys.readouterr().out
    assert said.count("warning: training continues without this checkpoint: cannot write") == 2
    assert refused == [10, 15]
    assert left == [["step-00000005.pt"]] * 2
    assert load_checkpoint(run / "checkpoints" / "step-00000020.pt")[1]["position"]["step"] == 20
    assert json.loads((run / "summary.json").read_text())["selected_step"] == 20


def test_a_run_fails_if_its_last_checkpoint_cannot_be_written(tmp_path, monkeypatch, capsys):
    def save(path, recipe, state):
        raise RunError(f"cannot write {path}: {FULL}")

    monkeypatch.setattr(run_folder, "save_checkpoint", save)
    with pytest.raises(SystemExit) as ended:
        main(["train", *SMALL, "--max-steps", "2", "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_lines_of_metrics_are_kept_until_the_disk_has_space(tmp_path):
    """The limit on a file's size stops a write in the middle of a line, as a full disk does."""
    folder = RunFolder(tmp_path)
    assert folder.append_metrics({"step": 1, "text": "x" * 80}) is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (folder.metrics.stat().st_size + 10, hard))
    try:
        warning = folder.append_metrics({"step": 2})
        assert warning is not None
        assert str(folder.metrics) in warning
        assert folder.append_metrics({"step": 3})
        assert [line["step"] for line in folder.read_metrics()] == [1]
        with pytest.raises(RunError, match="cannot write"):
            folder.flush_metrics()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.append_metrics({"step": 4}) is None
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [
        1, 2, 3, 4,
    ]  # fmt: skip


# --- the writer -----------------------------------------------------------------------------------


def full() -> None:
    raise RunError(FULL)


def test_a_checkpoint_is_written_only_after_its_best_student():
    writer, written = BackgroundWriter(), []
    writer.submit(lambda: written.append("step 1"), full)
    with pytest.raises(RunError):
        writer.finish()
    assert written == []  # no checkpoint that refers to a best student without a file
    writer.submit(lambda: written.append("step 2"), lambda: written.append("best"))
    writer.submit(lambda: written.append("step 3"))
    writer.finish()
    assert written == ["best", "step 2", "step 3"]

    tries = []
    writer.submit(None, lambda: tries.append(0) if tries else (tries.append(1), full()))
    writer.wait()
    assert isinstance(writer.take_failure(), RunError)
    writer.submit(lambda: written.append("step 4"))
    writer.finish()
    assert tries == [1, 0]
    assert written[-1] == "step 4"


def test_one_set_of_files_is_written_at_a_time_and_the_caller_does_not_wait():
    writer, go, order = BackgroundWriter(), threading.Event(), []
    began = time.monotonic()
    writer.submit(lambda: (go.wait(), order.append(1)))
    assert order == []
    assert writer.take_failure() is None
    threading.Timer(0.3, go.set).start()
    writer.submit(lambda: order.append(2))
    assert order[:1] == [1]
    assert time.monotonic() - began >= 0.3
    writer.finish()
    assert order == [1, 2]


def test_a_failure_is_reported_once_and_only_for_the_last_set_of_files():
    writer = BackgroundWriter()
    writer.submit(full)
    writer.wait()
    assert isinstance(writer.take_failure(), RunError)
    assert writer.take_failure() is None
    writer.submit(full)
    writer.submit(lambda: None)
    writer.finish()  # no error, because the last set of files was written


def test_other_errors_of_the_writer_are_raised():
    writer = BackgroundWriter()
    writer.submit(lambda: {}["missing"])
    with pytest.raises(KeyError):
        writer.finish()


# --- ranks that hang, signals ---------------------------------------------------------------------


def test_a_hanging_rank_is_named_with_its_host(tmp_path):
    """SIGSTOP suspends the rank in the middle of its steps: it does not answer and does not end."""
    options = ("--shutdown-timeout", "1")
    with Launch(
        2, tmp_path / "run", *TINY, "--distributed.timeout", "4", options=options
    ) as launch:
        launch.until_step(6)
        launch.signal(1, signal.SIGSTOP)
        launch.until(lambda: "continue with --resume" in launch.text())
        launch.signal(1, signal.SIGKILL)  # torchrun would wait 30 s for the rank
        assert launch.end() == 1, launch.text()
    said = re.search(
        r"^bdkd: rank 1 on .*: ended, or no answer for 4 s .* while rank 0 was at step (\d+); "
        r"saved checkpoints are complete, continue with --resume$",
        launch.text(),
        re.MULTILINE,
    )
    assert said, launch.text()
    assert int(said[1]) >= 6
    assert load_checkpoint(launch.run / "checkpoints" / "step-00000004.pt")


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_makes_all_ranks_save_and_end(number, tmp_path):
    with Launch(2, tmp_path / "run", *TINY) as launch:
        launch.until_step(6)
        launch.process.send_signal(number)
        assert launch.end() == 1
    stopped = re.search(r"bdkd: stopped at step (\d+), saved in (.*);", launch.text())
    assert stopped, launch.text()
    assert load_checkpoint(launch.run / "checkpoints" / f"step-{int(stopped[1]):08d}.pt")


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        # a step that does not end
        ("os.kill(me, signal.SIGTERM); time.sleep(30)", 143, "0.5 s after SIGTERM"),
        # a second Ctrl-C of the user; the copy that torchrun sends at once does not count
        (
            "os.kill(me, signal.SIGINT); os.kill(me, signal.SIGINT); print('on'); time.sleep(0.3)\n"
            "    signals._SECOND_SIGINT_SECONDS = 0.1; os.kill(me, signal.SIGINT); print('no')",
            1,
            "KeyboardInterrupt",
        ),
    ],
    ids=["grace", "second Ctrl-C"],
)
def test_a_signal_ends_the_process_in_time(script, code, said):
    program = (
        "import os, signal, time\nfrom bdkd.runs import signals\nme = os.getpid()\n"
        f"with signals.StopRequest(grace=0.5) as stop:\n    {script}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode in (code, -signal.SIGINT if code == 1 else code)
    assert said in done.stderr
    assert "no" not in done.stdout.split()


class Store:
    """A stand-in for torch's store, in which only some ranks have reported."""

    def __init__(self, reported: dict[str, str]) -> None:
        self.values = reported

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


def test_ranks_that_do_not_report_are_named(monkeypatch):
    monkeypatch.setattr("bdkd.distributed.context._REPORT_SECONDS", 0.1)
    hosts = {f"host/{rank}": f"node{rank // 2}" for rank in range(4)}
    ranks = DistributedContext(0, 4, store=Store({**hosts, "lost/2": "step 7"}), timeout=30)  # type: ignore[arg-type]
    ranks.location = "step 7"
    line = ranks.describe_missing_ranks()
    assert line.startswith("rank 1 on node0, rank 3 on node1: ended, or no answer for 30 s")
    assert "step 7" in line
    everyone = Store({**hosts, **{f"lost/{rank}": "step 7" for rank in range(4)}})
    assert "network" in DistributedContext(0, 4, store=everyone).describe_missing_ranks()  # type: ignore[arg-type]


def test_only_connection_errors_mean_a_lost_rank():
    several = DistributedContext(0, 2)
    assert several.is_rank_lost(
        RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    )
    assert several.is_rank_lost(RuntimeError("Application timeout caused pair closure"))
    assert not several.is_rank_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not several.is_rank_lost(ValueError("gloo"))
    assert not DistributedContext().is_rank_lost(RuntimeError("gloo"))


@pytest.mark.parametrize(("how", "log"), [
    ("deleted", ["tensorboard"]),
    ("without checkpoints", []),
    pytest.param("deleted", [], marks=pytest.mark.soak),
    pytest.param("moved", [], marks=pytest.mark.soak),
    pytest.param("moved", ["tensorboard"], marks=pytest.mark.soak),
    pytest.param("without checkpoints", ["tensorboard"], marks=pytest.mark.soak),
])  # fmt: skip
def test_a_moved_or_deleted_folder_ends_the_run_in_one_line(how, log, tmp_path):
    """The run does not say that it is complete."""
    run, trash = tmp_path / "run", tmp_path / "trash"
    command = [sys.executable, "-m", "bdkd", "train", *TINY_RUN, "--train.epochs", "400",
               "--run-dir", str(run), "--log", *log]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        while not list(run.glob("checkpoints/step-*")):
            assert p.stdout.readline()
        gone = run / "checkpoints" if how == "without checkpoints" else run
        gone.rename(trash)
        if how == "deleted":
            shutil.rmtree(trash)
        out, err = p.communicate(timeout=120)
    assert p.returncode == 1
    (line,) = err.splitlines()
    assert f"the folder {run}" in line
    assert "was deleted or moved during the run" in line
    assert "complete" not in out + err
    assert "4800/4800" not in out
