"""A signal during ``torch.compile`` ends the run at once and leaves no compiler process behind."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compiler import COMPILER
from small_runs import TINY_RUN, components_of, objective_of, tiny_state, trainer_of
from test_step import a_batch

from bdkd.cli.train import parse
from bdkd.config import load_recipe
from bdkd.engine import interruption
from bdkd.engine.interruption import CompilationInterrupted, interruptible
from bdkd.errors import Interrupted
from bdkd.runs.checkpoint import load_checkpoint
from bdkd.runs.folder import RunFolder
from bdkd.trainer import Trainer


@pytest.fixture(autouse=True)
def fresh():
    interruption.reset()
    yield
    interruption.reset()


def processes_of(session: int) -> list[str]:
    """Return the commands of the running processes of a session."""
    listed = subprocess.run(["ps", "-s", str(session), "-o", "stat=,args="],
                            capture_output=True, text=True)  # fmt: skip
    return [line for line in listed.stdout.splitlines() if not line.startswith("Z")]


@pytest.mark.skipif(
    COMPILER != "inductor", reason="no C++ compiler for inductor: the tests below do not need one"
)
@pytest.mark.parametrize(
    ("number", "whom"),
    [
        pytest.param(signal.SIGTERM, "the run", marks=pytest.mark.soak),
        (signal.SIGINT, "all"),
        pytest.param(signal.SIGUSR1, "the run", marks=pytest.mark.soak),
    ],
)
def test_a_signal_during_compilation_ends_the_run(number, whom, tmp_path):
    """A terminal sends Ctrl-C to the compiler processes too, and they fail."""
    run, output = tmp_path / "run", tmp_path / "output"
    command = [sys.executable, "-m", "bdkd", "train", *TINY_RUN, "--train.compile", "--run-dir"]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    with output.open("w") as file:
        process = subprocess.Popen([*command, str(run)], stdout=file, stderr=file, env=environment,
                                   start_new_session=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while "compiling the step" not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(3)  # into the compilation, which takes half a minute
        assert "compiled and ran the step once" not in output.read_text()
        (os.killpg if whom == "all" else os.kill)(process.pid, number)
        # The time depends on the load. Without an interruption the run would stop in step 1.
        assert process.wait(100) == 128 + number
        *_, line = output.read_text().splitlines()
        again = shlex.join(["bdkd", "train", "--resume", "--run-dir", str(run)])
        assert line in (
            f"bdkd: stopped before the first step; nothing had to be saved; continue with: {again}",
            # This line appears if torch traces for 10 s more.
            f"bdkd: {signal.Signals(number).name} while compiling: stopped; --resume continues "
            "from the last checkpoint",
        )
        assert "Traceback" not in output.read_text()
        time.sleep(1)
        assert processes_of(process.pid) == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_compiler_error_after_the_signal_is_an_interruption():
    with pytest.raises(ValueError, match="wrong"), interruptible():
        raise ValueError("wrong")

    def fails_after_the_signal() -> None:
        interruption.request(signal.SIGTERM)
        raise RuntimeError("C++ compile error")

    with pytest.raises(CompilationInterrupted), interruptible():
        fails_after_the_signal()
    with pytest.raises(CompilationInterrupted), interruptible():
        pytest.fail("a compilation began after the signal")


def test_the_process_ends_if_the_compilation_does_not_fail():
    script = (
        "import signal, time; from bdkd.engine import interruption as i; i.PATIENCE_SECONDS = 0.5\n"
        "with i.interruptible(): i.request(signal.SIGTERM); time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 143
    assert done.stderr == (
        "bdkd: SIGTERM while compiling: stopped; --resume continues from the last checkpoint\n"
    )


def test_a_request_does_not_end_a_later_compilation_of_the_process(monkeypatch):
    monkeypatch.setattr(interruption, "PATIENCE_SECONDS", 0.5)
    with interruptible():
        interruption.request(signal.SIGTERM)  # the compilation succeeds nevertheless
        time.sleep(0.1)
    interruption.reset()
    killed = []
    monkeypatch.setattr(interruption, "_kill_compilers", lambda: killed.append(1))
    with interruptible():
        time.sleep(0.8)  # the process does not end
    assert killed == []


def test_a_signal_outside_a_compilation_interrupts_nothing():
    interruption.request(signal.SIGTERM)


def test_an_interrupted_step_leaves_the_state_unchanged():
    """The first part of the step changes the statistics of batch norm and adds gradients."""
    state = tiny_state()
    trainer = trainer_of(state, objective_of(state))
    state.networks.train()
    forward_backward = trainer.forward_backward

    def interrupted(micro_batch):
        forward_backward(micro_batch)
        raise CompilationInterrupted

    trainer.forward_backward = interrupted
    before = {name: x.clone() for name, x in state.networks.state_dict().items()}
    with pytest.raises(CompilationInterrupted):
        trainer.train_step(a_batch())
    after = state.networks.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert all(p.grad is None or not p.grad.any() for p in state.networks.parameters())
    assert state.progress.step == 0


def test_the_steps_before_a_later_compilation_are_saved(tmp_path, monkeypatch):
    """A new batch shape compiles again. Here a signal interrupts the compilation in step 4."""
    options = ["tiny", "--train.epochs", "1", "--run-dir", str(tmp_path)]
    trainer = Trainer(components_of(parse(options, load_recipe(*TINY_RUN)).config))
    forward_backward, calls = trainer.forward_backward, []

    def compiles(micro_batch):
        calls.append(micro_batch)
        if len(calls) == 4:
            with interruptible():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                raise RuntimeError("C++ compile error")
        return forward_backward(micro_batch)

    monkeypatch.setattr(trainer, "forward_backward", compiles)
    with pytest.raises(Interrupted, match="stopped at step 3, saved in") as raised:
        trainer.train(RunFolder(Path(tmp_path)), progress_bar=False)
    assert raised.value.exit_code == 143
    saved = load_checkpoint(RunFolder(tmp_path).step_path(3))[1]
    assert saved["position"]["step"] == 3
