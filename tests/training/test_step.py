"""One step: what it does to weights, averages and statistics, and what it leaves alone."""

import copy
import math

import pytest
import torch
from small_runs import tiny_state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bdkd.config import ObjectiveConfig, OptimizerConfig
from bdkd.data import Batch
from bdkd.objectives import create_objective
from bdkd.training.distributed import ALONE
from bdkd.training.step import forward_and_loss, train_step


def a_batch(size: int = 16, seed: int = 0, *, poisoned: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 8, 8, generator=generator)
    if poisoned:
        images[3, 0, 2, 2] = torch.nan
    return Batch((images,), torch.randint(10, (size,), generator=generator))


def objective_of(state, name: str = "bdkd", **options):
    return create_objective(ObjectiveConfig(name, **options), state.recipe.networks)


def run_steps(state, batches, **options) -> None:
    objective = objective_of(state, **options)
    state.networks.train()
    for batch in batches:
        train_step(state, objective, batch, state.recipe.train)


def everything(state) -> dict[str, torch.Tensor]:
    """Weights, buffers, averages and momentum by name."""
    tensors = dict(state.networks.state_dict())
    for name, average in state.ema.items():
        tensors |= {f"{name}.{key}": value for key, value in average.state_dict().items()}
    for index, moments in enumerate(state.optimizer.state.values()):
        tensors |= {f"moment.{index}.{key}": value for key, value in moments.items()}
    return {key: value.clone() for key, value in tensors.items()}


OPTIMIZERS = {"sgd": OptimizerConfig(), "adamw": OptimizerConfig("adamw", learning_rate=1e-3)}


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
        # AdamW makes its moments in its first step; they must then be zeros
        assert torch.equal(value, before.get(key, torch.zeros_like(value))), key
    assert state.skipped.tolist() == [1, 1, 1]
    assert state.position.step == (1 if first else 3)

    # and the run goes on as if the batch had not been there
    run_steps(state, [a_batch(seed=3)], name=name)
    assert state.skipped.tolist() == [1, 0, 1]
    state.networks.eval()
    for logits in state.networks(a_batch(seed=4).views).values():
        assert logits.isfinite().all()
    moved = everything(state)
    assert all(value.isfinite().all() for value in moved.values())
    assert not torch.equal(moved["members.student.0.weight"], before["members.student.0.weight"])


def test_one_networks_nan_stops_the_other_network_too():
    state = tiny_state()
    with torch.no_grad():
        state.networks.members["teacher"][4].weight[0, 0] = torch.inf
    before = everything(state)
    run_steps(state, [a_batch()], name="independent")  # no term of the student sees the teacher
    after = everything(state)
    assert all(torch.equal(after[key], before[key]) for key in before if "student" in key)
    assert state.skipped.tolist() == [1, 1, 1]


def test_a_part_with_a_nan_skips_the_whole_accumulated_step():
    state = tiny_state(accumulate=4)
    before = everything(state)
    run_steps(state, [a_batch(poisoned=True)])
    after = everything(state)
    assert all(torch.equal(after[key], before[key]) for key in before)


class NoNorm(nn.Sequential):
    """Without batch norm the parts of a batch do not see one another."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


@pytest.mark.parametrize("name", ["bdkd", "independent"])
def test_accumulated_parts_add_up_to_the_batch(name):
    whole, parts = tiny_state(NoNorm), tiny_state(NoNorm, accumulate=4)
    batches = [a_batch(seed=i) for i in range(3)]
    run_steps(whole, batches, name=name)
    run_steps(parts, batches, name=name)
    for key, value in everything(whole).items():
        torch.testing.assert_close(everything(parts)[key], value, rtol=1e-5, atol=1e-6)


def test_sgd_is_what_its_equations_say():
    """Two steps written out: momentum, Nesterov, decay on matrices alone."""
    state = tiny_state(NoNorm)
    config, network = state.recipe.optimizer, state.networks.members["student"]
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in weights.items()}
    for seed in range(2):
        batch = a_batch(seed=seed)
        shadow = copy.deepcopy(network)
        shadow.load_state_dict(weights)
        loss = nn.functional.cross_entropy(shadow(batch.views[0]), batch.target)
        gradients = torch.autograd.grad(loss, list(shadow.parameters()))
        rate = config.learning_rate * (seed + 1) / (2 * state.steps_per_epoch)  # two warm-up epochs
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            if weight.ndim > 1:
                gradient = gradient + config.weight_decay * weight
            momentum[name] = config.momentum * momentum[name] + gradient
            weights[name] = weight - rate * (gradient + config.momentum * momentum[name])
        run_steps(state, [batch], name="independent")
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-5, atol=1e-6)


def test_clipping_is_by_network():
    state = tiny_state(NoNorm)
    objective = objective_of(state)
    _, output = forward_and_loss(
        state.networks, objective, a_batch(), state.recipe.train, 16.0, torch.ones(()), ALONE
    )
    torch.stack(list(output.losses.values())).sum().backward()
    norm = {
        name: torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]).item()
        for name, network in state.networks.members.items()
    }
    limit = sum(norm.values()) / 2  # one network is above it, the other below
    assert state.check_and_clip(limit)
    for name, network in state.networks.members.items():
        clipped = torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]).item()
        assert clipped == pytest.approx(min(norm[name], limit), rel=1e-4)


def test_ema_averages_weights_and_batch_norm_statistics():
    """timm's ModelEmaV3 with warm-up: decay 0 in the first update, then 1 - (1 + n)^(-2/3)."""
    state = tiny_state(ema_decay=0.6)
    student, average = state.networks.members["student"], state.ema["student_ema"]
    keys = ("4.weight", "1.weight", "1.running_mean", "1.running_var")
    expected = {}
    for update in range(6):
        run_steps(state, [a_batch(seed=update)])
        decay = min(0.6, 1 - (1 + update) ** (-2 / 3))
        now = student.state_dict()
        expected = {k: decay * expected.get(k, 0.0) + (1 - decay) * now[k].clone() for k in keys}
        for key in keys:
            torch.testing.assert_close(average.state_dict()[key], expected[key], msg=key)
    assert torch.equal(average[1].num_batches_tracked, student[1].num_batches_tracked)
    assert not torch.equal(average[1].running_mean, student[1].running_mean)
    assert list(state.ema) == ["student_ema"]


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


# lift_fresh brings a Python number to the device through a copy from the host
HOST_READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero",
    "aten::lift_fresh",
}  # fmt: skip


class Reads(TorchDispatchMode):
    """Records operators that bring a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::equal",
            "aten::is_nonzero",
        ):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_read_from_the_device_between_logs(precision):
    state = tiny_state(ema_decay=0.9, clip_norm=1.0, accumulate=2, precision=precision)
    objective = objective_of(state, "independent")  # bdkd on the CPU checks its labels there
    state.networks.train()
    with Reads() as reads:
        train_step(state, objective, a_batch(), state.recipe.train)
    assert reads.found == []
    with reads:
        state.meter.read()
    assert reads.found, "the check must be able to see a read"


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
    """fp16 on a CPU is slow: three steps. The loss scale is too high at first on purpose."""
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


def test_meter_is_exact_over_an_interval():
    state = tiny_state()
    batches = [a_batch(seed=i) for i in range(3)]
    for group in state.optimizer.param_groups:
        group["peak_rate"] = 0.0  # the weights stand still
    run_steps(state, batches)
    values = state.meter.read()
    state.networks.train()
    logits = torch.cat([state.networks(b.views)["student"] for b in batches]).double()
    target = torch.cat([b.target for b in batches])
    assert values["student"]["top1"] == (logits.argmax(-1) == target).double().mean().item()
    nll = nn.functional.cross_entropy(logits, target).item()
    assert values["student"]["nll"] == pytest.approx(nll, rel=1e-5)
    assert 1.0 <= values["forward_weight"] <= 2.0
    # an empty interval: nothing trained, no division by zero
    empty = state.meter.read()["student"]
    assert math.isnan(empty["loss"])
    assert empty["top1"] == 0.0


def test_a_batch_splits_into_its_parts_in_order():
    parts = a_batch(16).split(4)
    assert [len(part.target) for part in parts] == [4] * 4
    assert torch.equal(torch.cat([part.views[0] for part in parts]), a_batch(16).views[0])
