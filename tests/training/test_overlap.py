"""``train.overlap``: the networks of a step run on separate streams.

A fake device records which work waits for which. Overlapped training must equal sequential
training on a CPU, whose streams do nothing, and on the streams of a GPU.
"""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from small_runs import Tiny, check_step, objective_of, tiny_recipe, tiny_state, trainer_of
from test_step import a_batch, everything

from bdkd.engine.step import Streams, overlapped
from bdkd.errors import UsageError

CPU = torch.device("cpu")


class Device:
    """A fake device that records for each piece of work which work is done before it."""

    def __init__(self) -> None:
        self.after: dict[str, set[str]] = {}
        self.current = self.Stream()

    class Stream:
        def __init__(self, device=None) -> None:
            self.done: set[str] = set()

        def wait_stream(self, other) -> None:
            self.done |= other.done

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def work(self, name: str) -> torch.Tensor:
        self.after[name] = set(self.current.done)
        self.current.done.add(name)
        return torch.zeros(1)


def test_networks_wait_for_the_batch_and_the_loss_waits_for_all_networks(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    streams = Streams(CPU, 3)
    steps = [[f"{name} {step}" for name in ("batch", "a", "b", "c", "loss")] for step in (0, 1)]
    for batch, *networks, loss in steps:
        device.work(batch)
        assert len(streams.run_all([partial(device.work, name) for name in networks])) == 3
        device.work(loss)
    for batch, *networks, loss in steps:
        for name in networks:
            assert batch in device.after[name]
            assert not device.after[name] & (set(networks) - {name}), (
                "networks do not wait for each other"
            )
        assert device.after[loss] >= {batch, *networks}
    assert "loss 0" in device.after["c 1"], "a step may reuse memory of the previous one"


def a_run():
    state = tiny_state(ema_decay=0.9)
    state.networks.train()
    return state, trainer_of(state)


def test_overlapped_training_equals_sequential_training():
    plain, one_by_one = a_run()
    other, trainer = a_run()
    trainer.forward_backward = overlapped(other, objective_of(other))
    for seed in range(4):
        one_by_one.train_step(a_batch(seed=seed))
        trainer.train_step(a_batch(seed=seed))
    expected = everything(plain)
    for key, value in everything(other).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: the fake device above tests the waits"
)
def test_real_streams_give_the_same_logits_and_gradients():
    device = torch.device("cuda", torch.cuda.current_device())
    networks = [Tiny(width).to(device).train() for width in (64, 256)]
    streams = Streams(device, 2)
    for seed in range(50):  # a missing wait gives wrong results only sometimes
        images = a_batch(4096, seed=seed).views[0].to(device)
        results = []
        for run in (streams.run_all, lambda calls: [call() for call in calls]):
            logits = run([partial(network, images * 2) for network in networks])
            (logits[0] * logits[1].detach()).sum().add((logits[1] ** 2).sum()).backward()
            gradients = [p.grad.clone() for network in networks for p in network.parameters()]
            for network in networks:
                network.zero_grad()
            results.append([*logits, *gradients])
        # cuDNN adds the gradients of 4096 images in a different order each time.
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("device", "world_size", "compiles", "message"),
    [
        ("cpu", 1, False, r"on a GPU \(device is cpu\)"),
        ("cuda", 2, False, "with one rank"),
        ("cuda", 1, True, r"without train\.compile"),
        ("cuda", 1, False, None),
    ],
)
def test_overlap_is_refused_on_cpus_several_ranks_and_compiled_steps(
    device, world_size, compiles, message
):
    recipe = tiny_recipe(train={"overlap": True, "compile": compiles})
    if message is None:
        check_step(recipe, device, world_size)
        return
    with pytest.raises(UsageError, match=f"train.overlap can be true only {message}"):
        check_step(recipe, device, world_size)
