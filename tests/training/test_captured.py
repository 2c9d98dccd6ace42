"""The captured step on a CPU, with a stand-in for CUDA graphs.

The stand-in records operators and their tensors once, and replays the operators on the same tensors
without running Python code of the step, as a CUDA graph does. Streams, the memory pool of the graph
and its speed can be tested on a GPU only.
"""

from collections.abc import Callable

import pytest
import torch
from small_runs import check_step, objective_of, tiny_recipe, tiny_state, trainer_of
from test_step import OPTIMIZERS as OPTIMIZER_OPTIONS
from test_step import a_batch, everything
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bdkd.data import Batch
from bdkd.engine.cuda_graph import WARM_UP, CapturedStep
from bdkd.errors import UsageError
from bdkd.registry import OBJECTIVES, OPTIMIZERS


@pytest.fixture(autouse=True)
def labels_as_on_a_gpu(monkeypatch):
    """Turn off the check of labels on the host, which happens on a CPU and not on a GPU."""
    monkeypatch.setattr("bdkd_kernels.reference.labels_can_be_read", lambda _: False)


class Recorder(TorchDispatchMode):
    """Records operators and their tensors in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name() != "aten::_local_scalar_dense", "the host reads a tensor"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, out in self.calls:
            fresh = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # the tensors of a graph have fixed addresses


def tensors_of(state) -> list[Tensor]:
    """Return all tensors that outlive a step."""
    moments = [x for own in state.optimizer.state.values() for x in own.values()]
    meter = state.meter
    return [
        *state.networks.state_dict(keep_vars=True).values(), *moments, state.skipped,
        state.ema_updates,
        *(x for average in state.ema.values() for x in average.state_dict().values()),
        meter.samples, meter.trained, meter.sums, meter.gaps, *meter.statistics.values(),
    ]  # fmt: skip


class Captures:
    """Records a function and undoes its effects, because a capture only records."""

    def __init__(self, state) -> None:
        self.state, self.count = state, 0

    def __call__(self, function):
        self.count += 1
        live = tensors_of(self.state)
        before = [tensor.detach().clone() for tensor in live]
        with Recorder() as recorder:
            function()
        with torch.no_grad():
            for tensor, old in zip(live, before, strict=True):
                tensor.copy_(old)
        return recorder.replay


def a_captured(state) -> tuple[Callable[[Batch], None], Captures]:
    captures = Captures(state)
    # Not the native kernel: it takes pointers, so the dispatcher and the recorder do not see it.
    trainer = trainer_of(state, objective_of(state, backend="reference"))
    state.networks.train()
    trainer.compute_step = CapturedStep(
        trainer.compute_step, state.optimizer, torch.device("cpu"), captures
    )
    return trainer.train_step, captures


@pytest.mark.parametrize("optimizer", OPTIMIZER_OPTIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_captured_run_is_the_same_run_bit_for_bit(optimizer, accumulate):
    """The steps include a warm-up of the learning rate, a NaN after the capture, a smaller batch
    that is captured separately, and a meter that is read in between."""
    plain, other = (
        tiny_state(optimizer=OPTIMIZER_OPTIONS[optimizer], ema_decay=0.9, clip_norm=1.0,
                   accumulate=accumulate)
        for _ in range(2)
    )  # fmt: skip
    objective = objective_of(plain, backend="reference")
    step, captures = a_captured(other)
    plain.networks.train()
    for group in plain.optimizer.param_groups:  # AdamW divides a float rate in double precision
        group["lr"] = torch.tensor(group["lr"])
    sizes = [16] * (WARM_UP + 4) + [8] * (WARM_UP + 2) + [16]
    for number, size in enumerate(sizes):
        batch = a_batch(size, seed=number, poisoned=number == WARM_UP + 1)
        trainer_of(plain, objective).train_step(batch)
        step(batch)
        if number == WARM_UP + 2:
            assert str(other.meter.read()) == str(plain.meter.read())  # as text, NaN equals NaN
    assert captures.count == 2  # one for each size of a batch, as documented
    expected = everything(plain)
    for key, value in everything(other).items():
        assert torch.equal(value, expected[key]), key
    assert other.skipped.tolist() == plain.skipped.tolist() == [1, 0, 1]
    assert vars(other.progress) == vars(plain.progress)
    assert str(other.meter.read()) == str(plain.meter.read())
    rates = [float(group["lr"]) for group in other.optimizer.param_groups]
    assert rates == [float(group["lr"]) for group in plain.optimizer.param_groups]
    assert rates[0] != tiny_state().optimizer.param_groups[0]["lr"]


def test_tensors_that_outlive_a_step_keep_their_addresses():
    state = tiny_state(ema_decay=0.9)
    objective = objective_of(state)
    state.networks.train()
    trainer_of(state, objective).train_step(a_batch(seed=0))
    places = [tensor.data_ptr() for tensor in tensors_of(state)]
    for seed in range(1, 4):
        trainer_of(state, objective).train_step(a_batch(seed=seed))
        state.meter.read()
    assert [tensor.data_ptr() for tensor in tensors_of(state)] == places
    state.load_state_dict(tiny_state(ema_decay=0.9).state_dict())
    kept = {id(x) for own in state.optimizer.state.values() for x in own.values()}
    moved = [t for t, place in zip(tensors_of(state), places, strict=True)
             if t.data_ptr() != place and id(t) not in kept]  # fmt: skip
    assert moved == []  # without the moments: the optimizer replaces them, before any capture


def test_a_checkpoint_of_a_captured_run_resumes_with_and_without_capture(tmp_path):
    whole, first = tiny_state(), tiny_state()
    step, _ = a_captured(first)
    objective = objective_of(whole, backend="reference")
    whole.networks.train()
    for seed in range(8):
        trainer_of(whole, objective).train_step(a_batch(seed=seed))
    for seed in range(5):
        step(a_batch(seed=seed))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    for captured in (False, True):
        state = tiny_state()
        state.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        again = a_captured(state)[0]
        if not captured:
            state = tiny_state()
            state.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            assert all(isinstance(g["lr"], float) for g in state.optimizer.param_groups)
        state.networks.train()
        for seed in range(5, 8):
            batch = a_batch(seed=seed)
            again(batch) if captured else trainer_of(state, objective).train_step(batch)
        expected = everything(whole)
        for key, value in everything(state).items():
            assert torch.equal(value, expected[key]), (captured, key)


@pytest.mark.parametrize(
    ("device", "world_size", "objective", "optimizer", "message"),
    [
        ("cpu", 1, "bdkd", "sgd", r"on a GPU \(device is cpu\)"),
        ("cuda", 2, "bdkd", "sgd", "with one rank"),
        ("cuda", 1, "switokd", "sgd", "if all steps .* the objective 'switokd' pauses networks"),
        ("cuda", 1, "bdkd", "lamb", "with optimizer.name sgd or adamw, and not with lamb"),
        ("cuda", 1, "bdkd", "adamw", None),
    ],
)
def test_a_step_that_cannot_be_captured_is_refused(
    device, world_size, objective, optimizer, message
):
    objective = OBJECTIVES.configure(objective)
    recipe = tiny_recipe(
        optimizer=OPTIMIZERS.configure(optimizer), objective=objective, train={"cuda_graph": True}
    )
    if message is None:
        check_step(recipe, device, world_size)
        return
    with pytest.raises(UsageError, match=f"train.cuda_graph can be true only {message}"):
        check_step(recipe, device, world_size)
