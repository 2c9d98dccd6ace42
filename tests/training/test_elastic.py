"""torchrun restarts killed ranks, and the run ends like a run that was never killed."""

import random
import re
import signal
import time

import pytest
from launches import TINY, Launch, steps_done
from small_runs import bdkd, shown_step
from test_resume import assert_same_end

from bdkd.cli import main


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Return a function that trains an unkilled run once for each number of ranks."""
    folder, done = tmp_path_factory.mktemp("whole"), {}

    def of(ranks: int):
        if ranks not in done:
            with Launch(ranks, folder / str(ranks), *TINY) as launch:
                assert launch.end() == 0, launch.text()
            done[ranks] = launch.run
        return done[ranks]

    return of


# A soak, because test_imagenet_ranks.py kills one of two ranks in every run of the suite.
@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_killed_rank_restarts_and_the_run_ends_bit_for_bit_the_same(ranks, whole_run, tmp_path):
    with Launch(ranks, tmp_path / "run", *TINY, options=("--max-restarts", "3")) as launch:
        launch.until_step(10)
        launch.signal(ranks - 1, signal.SIGKILL)
        assert launch.end() == 0, launch.text()
    continued = re.search(r"continuing at step (\d+), from .*step-\d+\.pt", launch.text())
    assert continued, launch.text()
    assert int(continued[1]) >= 4  # checkpoint.every-steps is 4
    assert_same_end(launch.run, whole_run(ranks))


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_kills_at_random_moments(ranks, whole_run, tmp_path):
    """Kill a random rank at a random moment, twenty times in one run."""
    kills, chance = 20, random.Random(ranks)
    options = ("--max-restarts", str(kills), "--monitor-interval", "0.1")
    with Launch(ranks, tmp_path / "run", *TINY, options=options) as launch:
        for index in range(kills):
            # Each attempt starts from the last checkpoint. Later attempts train further.
            goal = min(18, index + chance.randrange(2))
            launch.until(lambda g=goal, i=index: restarts(launch) >= i and has_trained(launch, g))
            time.sleep(chance.random() * 0.05)
            pids = launch.pids()
            launch.signal(chance.choice(sorted(pids)), signal.SIGKILL)
            print(f"kill {index + 1} at step {steps_done(launch.run)}")
        assert launch.end() == 0, launch.text()
    assert_same_end(launch.run, whole_run(ranks))


def restarts(launch: Launch) -> int:
    return launch.text().count("continuing at step")


def has_trained(launch: Launch, step: int) -> bool:
    """Return whether the current attempt has trained a step and all of its ranks run."""
    continued = launch.text().rpartition("continuing at step")[2]
    said = [number for number in map(shown_step, continued.splitlines()) if number is not None]
    return bool(said) and said[-1] >= step and len(launch.pids()) == launch.ranks


def test_a_run_resumes_at_the_same_image_on_another_number_of_ranks(tmp_path):
    """Stop two ranks with SIGUSR1, as Slurm does before a time limit, and resume in one process."""
    options = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
    with Launch(2, tmp_path / "run", *TINY, options=options) as launch:
        launch.until_step(6)
        launch.process.send_signal(signal.SIGUSR1)
        assert launch.end() == 1, launch.text()  # torchrun's exit code
    stopped = re.search(r"bdkd: stopped at step (\d+), saved in (.*);", launch.text())
    assert stopped, launch.text()
    assert (
        'Traceback (most recent call last):\n  File "/'
        not in (launch.run / "logs" / "rank-1.log").read_text()
    )
    done = bdkd("train", "--resume", "--run-dir", str(launch.run), timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"continuing at step {stopped[1]}, from {stopped[2]}" in done.stdout
    assert "resuming on 1 rank a run that trained on 2" in done.stdout
    assert "normalises over 64 images" in done.stdout
    assert f" {int(stopped[1]) + 1}/19 " in done.stdout


def test_a_restart_continues_only_the_run_of_its_own_launch(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    arguments = [
        "train", "digits", "--run-dir", str(run), "--log", "--max-steps", "1",
        "--networks.teacher.model", "resnet8",
    ]  # fmt: skip
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    main(arguments)
    main(arguments)
    assert "continuing at step 1" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    for _ in range(2):  # torchrun's second attempt is refused too
        with pytest.raises(SystemExit) as refused:
            main(arguments)
        assert refused.value.code == 1
        assert "already contains a run" in capsys.readouterr().err
