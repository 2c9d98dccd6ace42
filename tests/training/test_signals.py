"""A signal requests a stop at the end of the step, and the previous handlers are restored."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from bdkd.runs import signals
from bdkd.runs.signals import StopRequest


def send(number: int) -> None:
    os.kill(os.getpid(), number)  # the handler of this process runs before the next line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_later_signal_does_not_replace_the_first(number):
    with StopRequest() as stop:
        assert stop.signal is None
        send(number)
        assert stop.signal == number
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert stop.signal == number


def test_the_previous_signal_handlers_are_restored():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest():
        assert all(signal.getsignal(n) != old for n, old in zip(numbers, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_ctrl_c_interrupts_at_once_only_after_two_seconds(monkeypatch):
    """An earlier SIGINT may be the same Ctrl-C: ranks get it from the terminal and torchrun."""
    now = 100.0
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now))
    with StopRequest() as stop:
        send(signal.SIGINT)
        now = 102.0
        send(signal.SIGINT)
        now = 150.0
        send(signal.SIGTERM)  # a scheduler may repeat it
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.signal == signal.SIGINT


def test_the_grace_period_is_from_the_first_signal_to_the_end_of_the_step(monkeypatch):
    """test_faults checks that the process ends when the grace period is over."""
    ended: list[tuple[int, float]] = []
    monkeypatch.setattr(signals, "_end", lambda *arguments: ended.append(arguments))
    with StopRequest(grace=0.1):
        time.sleep(0.15)  # no signal yet
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert ended == []
    time.sleep(0.15)  # the step ended within the grace period
    assert ended == []
    with StopRequest(grace=0.01):
        send(signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while not ended and time.monotonic() < deadline:
            time.sleep(0.005)
        assert ended == [(signal.SIGUSR1, 0.01)]
