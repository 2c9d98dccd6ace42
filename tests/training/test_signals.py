"""A signal is a request to stop: answered at the end of a step, and never lost or left behind."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from bdkd.runs import signals
from bdkd.runs.signals import StopRequest


def send(number: int) -> None:
    os.kill(os.getpid(), number)  # to this process, whose handler runs before the next line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_the_request_and_a_later_one_does_not_replace_it(number):
    with StopRequest() as stop:
        assert stop.signal is None
        send(number)
        assert stop.signal == number
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert stop.signal == number


def test_the_handlers_of_before_are_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest():
        assert all(signal.getsignal(n) != old for n, old in zip(numbers, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


def test_only_a_ctrl_c_two_seconds_after_the_first_signal_interrupts_at_once(monkeypatch):
    """Sooner it may be the same Ctrl-C, which reaches a rank from the terminal and torchrun."""
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


def test_the_grace_begins_with_the_first_signal_and_ends_with_the_step(monkeypatch):
    """What the process does when it is over is in test_faults."""
    ended: list[tuple[int, float]] = []
    monkeypatch.setattr(signals, "_end", lambda *arguments: ended.append(arguments))
    with StopRequest(grace=0.1):
        time.sleep(0.15)  # no signal yet
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert ended == []
    time.sleep(0.15)  # the step was done in time
    assert ended == []
    with StopRequest(grace=0.01):
        send(signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while not ended and time.monotonic() < deadline:
            time.sleep(0.005)
        assert ended == [(signal.SIGUSR1, 0.01)]
