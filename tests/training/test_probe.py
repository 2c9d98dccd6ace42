"""Timing of steps and evaluations without a run, measured with a fake clock."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from small_runs import TINY_RUN, components_of, same

from bdkd import probe
from bdkd.cli.train import parse
from bdkd.config import load_recipe
from bdkd.engine import throughput
from bdkd.engine.components import Components
from bdkd.engine.throughput import StepTimes
from bdkd.probe import Limit, measure, time_evaluation, time_forward, time_steps
from bdkd.trainer import Trainer

WAIT = 0.25  # seconds for a batch


class Clock:
    now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (probe, throughput):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


class SlowSource:
    """A data source that takes ``WAIT`` seconds for each batch and records the epochs."""

    def __init__(self, source, clock: Clock) -> None:
        self.source, self.clock, self.epochs, self.closed = source, clock, [], 0

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    def train_batches(self, epoch, *arguments):
        self.epochs.append(epoch)
        try:
            for batch in self.source.train_batches(epoch, *arguments):
                self.clock.now += WAIT
                yield batch
        finally:
            self.closed += 1

    def eval_batches(self, *arguments):
        for batch in self.source.eval_batches(*arguments):
            self.clock.now += WAIT
            yield batch


def slow_trainer(clock: Clock, *options: str, step=None) -> Trainer:
    """Return a trainer whose steps take the given times in order, by default 0.75 s each."""
    components = components_of(parse([*TINY_RUN, *options], load_recipe(*TINY_RUN)).config)
    source = SlowSource(components.source, clock)
    trainer = Trainer(Components(**{**vars(components), "source": source}))
    seconds = itertools.repeat(0.75) if step is None else iter(step)
    compute = trainer.compute_step

    def slow(batch) -> None:
        clock.now += next(seconds)
        compute(batch)

    trainer.compute_step = slow
    return trainer


@pytest.mark.parametrize(
    ("seconds", "turns"), [(0.01, 20), (1.0, 5), (2.4, 3), (1000.0, 2)], ids=lambda x: str(x)
)
def test_a_limit_stops_by_time_between_its_bounds(clock, seconds, turns):
    count = 0
    for _ in Limit(2, 20, 5.0).turns():
        count += 1
        clock.now += seconds
    assert count == turns


def test_step_times_include_waits_and_exclude_the_warm_up(clock):
    steps = [100.0, 0.75, 1.75, 0.75]  # the first one compiles
    times = time_steps(slow_trainer(clock, step=steps), Limit(1, 1), Limit(3, 3))
    assert times.seconds == pytest.approx((1.0, 2.0, 1.0))
    assert times.data_wait == pytest.approx(3 * WAIT / 4)
    assert times.images == 4
    assert times.memory_mib > 50
    assert times.images_per_second == pytest.approx(3.0)


def test_percentiles_of_step_times():
    times = StepTimes(tuple(x / 10 for x in range(11)), 8, 0.0, 0.0)
    assert times.percentile(50) == pytest.approx(0.5)
    assert times.percentile(90) == pytest.approx(0.9)
    assert times.mean == pytest.approx(0.5)
    assert times.images_per_second == pytest.approx(16)
    assert StepTimes((2.0,), 8, 0.0, 0.0).percentile(90) == 2.0


def test_more_steps_than_in_an_epoch_repeat_the_last_epoch(clock):
    """The images of ``data.progressive`` are largest in the last epoch. The loader is closed at the
    end, and the learning rate stays within the schedule of three epochs of twelve steps."""
    trainer = slow_trainer(clock)
    rates = []
    set_rate = trainer.state.set_learning_rate

    def spy() -> None:
        set_rate()
        rates.append(trainer.state.optimizer.param_groups[0]["lr"])

    trainer.state.set_learning_rate = spy  # type: ignore[method-assign]
    time_steps(trainer, Limit(1, 1), Limit(60, 60))
    assert trainer.source.epochs == [2] * 6
    assert trainer.source.closed == 6
    assert len(rates) == 61
    assert rates[:12] == rates[12:24]
    assert all(0 < rate <= 0.05 for rate in rates)


def test_an_evaluation_is_timed_by_its_batches(clock):
    """Each batch of four images takes a quarter of a second, and 12 images are three batches."""
    trainer = slow_trainer(clock)
    assert time_evaluation(trainer, Limit(1, 20, 2.0)) == pytest.approx(3 * WAIT / 12)
    clock.now = 0.0
    assert time_evaluation(trainer, Limit(1, 20, 0.5)) == pytest.approx(2 * WAIT / 8)
    # A warm-up batch, a batch that decides the number of batches, and two timed batches
    assert clock.now == pytest.approx(4 * WAIT)
    assert time_evaluation(trainer, Limit(1, 20, 0.0)) == pytest.approx(WAIT / 4)


def test_the_time_is_0_without_images_to_evaluate(clock):
    trainer = slow_trainer(clock)
    info = trainer.source.info
    empty = SimpleNamespace(info=SimpleNamespace(counts={**info.counts, "val": 0, "test": 0}))
    trainer.components = Components(**{**vars(trainer.components), "source": empty})
    assert time_evaluation(trainer, Limit(1, 20, 2.0)) == 0


def test_forward_passes_use_evaluation_mode_and_change_nothing(clock):
    trainer = slow_trainer(clock)
    network = trainer.state.networks.members["student"]
    network.train()
    before = copy.deepcopy(network.state_dict())
    modes = []

    def forward(images):
        clock.now += 0.5
        modes.append((network.training, torch.is_inference_mode_enabled(), tuple(images.shape)))

    network.register_forward_hook(lambda module, inputs, output: forward(*inputs))
    times = time_forward(trainer, "student", Limit(1, 1), Limit(2, 2))
    assert times.seconds == (0.5, 0.5)
    assert times.images == 4
    assert modes == [(False, True, (4, 3, 8, 8))] * 3
    assert network.training
    assert same(dict(network.state_dict()), dict(before))


@pytest.mark.parametrize("options", [[], ["--train.accumulate", "2", "--train.ema-decay", "0.9"]])
def test_the_probe_trains_real_steps_and_prints_nothing(options, capsys):
    components = components_of(parse([*TINY_RUN, *options], load_recipe(*TINY_RUN)).config)
    before = copy.deepcopy(components.networks.state_dict())
    found = measure(components)
    assert 2 <= len(found.steps.seconds) <= 20
    assert found.steps.mean > 0
    assert found.evaluation > 0
    assert not same(dict(components.networks.state_dict()), dict(before))
    assert capsys.readouterr().out == ""


class Events:
    """Makes stand-ins for CUDA events with given times."""

    def __init__(self, times):
        self.times, self.synchronized = iter(times), []

    def make(self, enable_timing):
        assert enable_timing
        return _Event(self)


class _Event:
    def __init__(self, events) -> None:
        self.events, self.at = events, None

    def record(self, stream) -> None:
        self.at = next(self.events.times)

    def synchronize(self) -> None:
        self.events.synchronized.append(self.at)

    def elapsed_time(self, other) -> float:
        return other.at - self.at


def test_a_gpu_is_timed_by_its_events_and_runs_one_step_behind_the_host(monkeypatch):
    """Times of events are in milliseconds. The host waits for the step before the latest one."""
    events = Events([7.0, 100.0, 130.0, 150.0])
    monkeypatch.setattr(torch.cuda, "Event", events.make)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = throughput.StepClock(torch.device("cuda", 0))
    clock.restart()
    for _ in range(3):
        clock.mark()
    assert clock.seconds() == pytest.approx((0.093, 0.030, 0.020))
    assert events.synchronized == [7.0, 100.0, 130.0]
