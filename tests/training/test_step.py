"""One training step: its changes of weights, averages and statistics, and its skipped updates."""

import pytest
import torch
from bdkd_kernels import native
from small_runs import objective_of, tiny_state, trainer_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bdkd.data import Batch
from bdkd.engine.optim import AdamConfig, SGDConfig


def a_batch(size: int = 16, seed: int = 0, *, poisoned: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 8, 8, generator=generator)
    if poisoned:
        images[3, 0, 2, 2] = torch.nan
    return Batch((images,), torch.randint(10, (size,), generator=generator))


def run_steps(state, batches, **options) -> None:
    trainer = trainer_of(state, objective_of(state, **options))
    state.networks.train()
    for batch in batches:
        trainer.train_step(batch)


def everything(state) -> dict[str, torch.Tensor]:
    """Return copies of weights, buffers, averages and moments by name."""
    tensors = dict(state.networks.state_dict())
    for name, average in state.ema.items():
        tensors |= {f"{name}.{key}": value for key, value in average.state_dict().items()}
    for index, moments in enumerate(state.optimizer.state.values()):
        tensors |= {f"moment.{index}.{key}": value for key, value in moments.items()}
    return {key: value.clone() for key, value in tensors.items()}


OPTIMIZERS = {"sgd": SGDConfig("sgd"), "adamw": AdamConfig("adamw", learning_rate=1e-3)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["bdkd", "independent"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "third step"])
def test_a_step_with_a_nan_changes_nothing_of_any_network(optimizer, name, first):
    state = tiny_state(ema_decay=0.9, optimizer=OPTIMIZERS[optimizer])
    run_steps(state, [] if first else [a_batch(seed=1), a_batch(seed=2)], name=name)
    before = everything(state)
    run_steps(state, [a_batch(poisoned=True)], name=name)
    after = everything(state)
    for key, value in after.items():
        # AdamW creates its moments in its first step. In a skipped step they must be zeros.
        assert torch.equal(value, before.get(key, torch.zeros_like(value))), key
    assert state.skipped.tolist() == [1, 1, 1]
    assert state.progress.step == (1 if first else 3)

    # The run continues as if the batch had not existed.
    run_steps(state, [a_batch(seed=3)], name=name)
    assert state.skipped.tolist() == [1, 0, 1]
    state.networks.eval()
    for logits in state.networks(a_batch(seed=4).views).values():
        assert logits.isfinite().all()
    moved = everything(state)
    assert all(value.isfinite().all() for value in moved.values())
    assert not torch.equal(moved["members.student.0.weight"], before["members.student.0.weight"])


def test_a_nan_in_one_network_skips_the_step_of_the_other():
    state = tiny_state()
    with torch.no_grad():
        state.networks.members["teacher"][4].weight[0, 0] = torch.inf
    before = everything(state)
    run_steps(state, [a_batch()], name="independent")  # no term of the student sees the teacher
    after = everything(state)
    assert all(torch.equal(after[key], before[key]) for key in before if "student" in key)
    assert state.skipped.tolist() == [1, 1, 1]


def test_a_micro_batch_with_a_nan_skips_the_whole_step():
    state = tiny_state(accumulate=4)
    before = everything(state)
    run_steps(state, [a_batch(poisoned=True)])
    after = everything(state)
    assert all(torch.equal(after[key], before[key]) for key in before)


class NoNorm(nn.Sequential):
    """A network without batch norm, so that the micro-batches of a batch are independent."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def test_accumulated_micro_batches_train_like_the_batch():
    """The loss couples the networks; test_step_equations has a loss that does not."""
    whole, parts = tiny_state(NoNorm), tiny_state(NoNorm, accumulate=4)
    batches = [a_batch(seed=i) for i in range(3)]
    run_steps(whole, batches)
    run_steps(parts, batches)
    for key, value in everything(whole).items():
        torch.testing.assert_close(everything(parts)[key], value, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_does_not_count_as_an_update_of_the_average():
    state = tiny_state(ema_decay=0.9)
    run_steps(state, [a_batch(seed=0), a_batch(seed=1)])
    before = {k: v.clone() for k, v in state.ema["student_ema"].state_dict().items()}
    batch = a_batch(seed=2)
    batch.views[0].fill_(torch.nan)
    run_steps(state, [batch])
    assert int(state.ema_updates) == 2
    for key, value in state.ema["student_ema"].state_dict().items():
        assert torch.equal(value, before[key]), key


# lift_fresh copies a Python number from the host to the device
HOST_READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero",
    "aten::lift_fresh",
}  # fmt: skip


class Reads(TorchDispatchMode):
    """Records operators that copy a value between the device and the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in HOST_READS:
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_read_from_the_device_between_logs(precision):
    state = tiny_state(ema_decay=0.9, clip_norm=1.0, accumulate=2, precision=precision)
    objective = objective_of(state, "independent")  # not bdkd, which checks labels on a CPU
    state.networks.train()
    with Reads() as reads:
        trainer_of(state, objective).train_step(a_batch())
    assert reads.found == []
    with reads:
        state.meter.read()
    assert reads.found, "the check must be able to see a read"


class LossOperators(TorchDispatchMode):
    """Records the operators of the fused loss."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "bdkd":
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(
    not native.AVAILABILITY,
    reason=f"{native.AVAILABILITY}; test_closed_forms.py compares the gradients without it",
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_is_one_operator_for_each_micro_batch(accumulate):
    """The operator returns the gradients too, so no second operator checks that they still fit."""
    state = tiny_state(accumulate=accumulate)
    state.networks.train()
    trainer = trainer_of(state, objective_of(state, backend="native"))
    with LossOperators() as operators:
        trainer.train_step(a_batch())
    assert operators.found == ["bdkd::native_forward"] * accumulate


def test_bf16_and_channels_last_train():
    state = tiny_state(precision="bf16")
    state.networks.to(memory_format=torch.channels_last)
    before = everything(state)
    run_steps(state, [a_batch(seed=i) for i in range(3)])
    after = everything(state)
    weight = state.networks.members["student"][0].weight
    assert weight.dtype == torch.float32
    assert state.skipped[0] == 0
    assert not torch.equal(after["members.student.0.weight"], before["members.student.0.weight"])


def test_fp16_scales_skips_and_recovers():
    """fp16 is slow on a CPU, so there are only three steps. The first loss scale is too high."""
    state = tiny_state(precision="fp16")
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = everything(state)
    run_steps(state, [a_batch(seed=0)])
    assert all(torch.equal(v, before[k]) for k, v in everything(state).items())
    assert state.skipped[0] == 1
    assert state.loss_scale().item() == 2.0**39
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run_steps(state, [a_batch(seed=1), a_batch(seed=2)])
    assert state.skipped[0] == 1
    changed = everything(state)["members.student.0.weight"]
    assert not torch.equal(changed, before["members.student.0.weight"])


def test_a_batch_splits_into_micro_batches_in_order():
    parts, last = zip(*a_batch(16).micro_batches(4), strict=True)
    assert last == (False, False, False, True)
    assert [len(part.target) for part in parts] == [4] * 4
    assert torch.equal(torch.cat([part.views[0] for part in parts]), a_batch(16).views[0])
