"""Training steps against their equations, written out in float64 for each parameter.

The equations are those of torch.optim.SGD and AdamW, timm's parameter groups and ModelEmaV3,
torch.nn.utils.clip_grad_norm_, and a linear warm-up with a cosine. Only the gradient of a plain
cross entropy comes from autograd.
"""

import copy
import dataclasses
import math

import pytest
import torch
from small_runs import state_of, trainer_of
from torch import Tensor, nn

from bdkd.config import NetworkConfig, ScheduleConfig, load_recipe
from bdkd.data import Batch
from bdkd.engine.networks import Networks
from bdkd.engine.optim import AdamConfig, SGDConfig
from bdkd.engine.state import TrainingState
from bdkd.objectives import create_objective
from bdkd.registry import OBJECTIVES

CLASSES, SMOOTHING, DECAY = 5, 0.1, 0.05
# An epoch is 3 steps of 8 images and leaves 6 images over. The three epochs are 9 steps.
BATCH_SIZE, IMAGES, EPOCHS, STEPS_PER_EPOCH = 8, 30, 3, 3
WARM_UP, FINAL, PEAK = 2, 0.1, 0.2
OWN_RATES = {"pupil": 0.05}  # the other networks have the optimizer's rate


class Small(nn.Module):
    """Parameters of 0, 1, 2 and 4 dimensions, and a batch norm, whose statistics are averaged."""

    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        # No bias before the batch norm: its gradient is only rounding, which AdamW would normalise.
        self.conv = nn.Conv2d(2, width, 2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Linear(4 * width, CLASSES)
        self.scale = nn.Parameter(torch.tensor(gain))

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).tanh()
        return self.scale * self.linear(x.flatten(1))


# A large gain makes large gradients: of the three networks that train, some are clipped.
GAINS = {"teacher": 1.5, "student": 0.3, "pupil": 4.0, "judge": 1.0}
ROLES = {"teacher": "teacher", "student": "student", "pupil": "student", "judge": "teacher"}


def a_state(
    optimizer: SGDConfig | AdamConfig, last: dict[str, nn.Module] | None = None, **train
) -> TrainingState:
    """Return a state of two students, a teacher and a frozen network.

    Args:
        last: layers to append, by the name of the network.
    """
    recipe = load_recipe("digits")
    recipe = dataclasses.replace(
        recipe,
        networks={
            name: NetworkConfig(
                "small", role, frozen=name == "judge", learning_rate=OWN_RATES.get(name)
            )
            for name, role in ROLES.items()
        },
        objective=OBJECTIVES.configure("independent", label_smoothing=SMOOTHING),
        optimizer=optimizer,
        schedule=ScheduleConfig("cosine", "steps", warmup=WARM_UP, final=FINAL),
        train=dataclasses.replace(recipe.train, batch_size=BATCH_SIZE, epochs=EPOCHS, **train),
    )
    torch.manual_seed(0)
    members: dict[str, nn.Module] = {
        name: Small(3 + i, gain) for i, (name, gain) in enumerate(GAINS.items())
    }
    for name, layer in (last or {}).items():
        members[name] = nn.Sequential(members[name], layer)
    networks = Networks(members, frozenset({"judge"})).double()
    return state_of(recipe, networks, IMAGES)


def a_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH_SIZE, 2, 3, 3, generator=generator, dtype=torch.float64)
    return Batch((images,), torch.randint(CLASSES, (BATCH_SIZE,), generator=generator))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the sum of the losses. A target has 1 - SMOOTHING for the label, plus SMOOTHING / C
    for every class."""
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    of_label = log_p[torch.arange(len(target)), target]
    return -((1 - SMOOTHING) * of_label + SMOOTHING * log_p.mean(-1)).sum()


def rate_factor(step: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    done = (step - WARM_UP) / (EPOCHS * STEPS_PER_EPOCH - WARM_UP)
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2


class Plain:
    """A network that is trained by the equations."""

    def __init__(
        self, network: nn.Module, rate: float, config: SGDConfig | AdamConfig, options
    ) -> None:
        self.network, self.rate, self.config, self.options = network, rate, config, options
        self.weights = list(network.parameters())
        self.moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in self.weights]
        self.average: dict[str, Tensor] = {}
        self.steps = 0
        self.norms: list[float] = []
        self.loss = 0.0

    def step(self, batch: Batch) -> None:
        gradients = [torch.zeros_like(w) for w in self.weights]
        parts = self.options.get("accumulate", 1)
        size = BATCH_SIZE // parts
        for start in range(0, BATCH_SIZE, size):
            images = batch.views[0][start : start + size]
            target = batch.target[start : start + size]
            loss = cross_entropy(self.network(images), target) / BATCH_SIZE
            self.loss += loss.item()
            for total, g in zip(gradients, torch.autograd.grad(loss, self.weights), strict=True):
                total += g
        norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
        self.norms.append(norm)
        limit = self.options.get("clip_norm")
        clip = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        rate = self.rate * rate_factor(self.steps)
        self.steps += 1
        with torch.no_grad():
            for w, g, moments in zip(self.weights, gradients, self.moments, strict=True):
                self.update(w, clip * g, *moments, rate)
        self.update_average()

    def update(self, w: Tensor, g: Tensor, first: Tensor, second: Tensor, rate: float) -> None:
        config = self.config
        decays = config.decay_norms or w.ndim > 1  # timm: norms, biases and scalars do not
        decay = config.weight_decay if decays else 0.0
        if config.name == "adamw":
            (beta1, beta2), n = config.betas, self.steps
            w -= rate * decay * w
            first.copy_(beta1 * first + (1 - beta1) * g)
            second.copy_(beta2 * second + (1 - beta2) * g**2)
            w -= rate * (first / (1 - beta1**n)) / ((second / (1 - beta2**n)).sqrt() + 1e-8)
            return
        g = g + decay * w
        first.copy_(config.momentum * first + g)
        w -= rate * (g + config.momentum * first if config.nesterov else first)

    def update_average(self) -> None:
        limit = self.options.get("ema_decay")
        if limit is None:
            return
        kept = min(limit, 1 - self.steps ** (-2 / 3))
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                old = self.average.get(name, torch.zeros_like(value))  # has weight 0 at first
                self.average[name] = kept * old + (1 - kept) * value
            else:
                self.average[name] = value.clone()


CASES = {
    "nesterov, clipped, averaged": (
        SGDConfig("sgd", learning_rate=PEAK, weight_decay=DECAY),
        {"clip_norm": 0.5, "ema_decay": 0.7},
    ),
    "accumulated, clipped": (
        SGDConfig("sgd", learning_rate=PEAK, weight_decay=DECAY),
        {"clip_norm": 0.5, "accumulate": 2},
    ),
    "plain momentum, decayed norms": (
        SGDConfig(
            "sgd",
            learning_rate=PEAK,
            momentum=0.6,
            nesterov=False,
            weight_decay=DECAY,
            decay_norms=True,
        ),
        {},
    ),
    "without momentum": (
        SGDConfig("sgd", learning_rate=PEAK, momentum=0.0, weight_decay=DECAY),
        {},
    ),
    "adamw": (
        AdamConfig("adamw", learning_rate=PEAK, betas=(0.6, 0.8), weight_decay=DECAY),
        {"clip_norm": 0.5, "ema_decay": 0.7},
    ),
}


@pytest.mark.parametrize("loss_scale", [None, 2.0**10], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("case", CASES)
def test_training_equals_its_equations(case, loss_scale):
    """Compare every parameter of every network, and the logged losses, over a whole run.

    The loss scale is a power of two, so it must not change any result.
    """
    optimizer, options = CASES[case]
    state = a_state(optimizer, **options)
    if loss_scale is not None:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    objective = create_objective(state.recipe.objective, state.recipe.networks)
    untouched = copy.deepcopy(state.networks.members["judge"].state_dict())
    plain_optimizer = optimizer
    if isinstance(optimizer, SGDConfig) and optimizer.momentum == 0:
        plain_optimizer = dataclasses.replace(optimizer, nesterov=False)
    plain = {
        name: Plain(
            copy.deepcopy(state.networks.members[name]), OWN_RATES.get(name, PEAK),
            plain_optimizer, options,
        )
        for name in ("teacher", "student", "pupil")
    }  # fmt: skip
    state.networks.train()
    steps = EPOCHS * STEPS_PER_EPOCH
    assert state.remaining_steps() == steps
    for number in range(steps):
        trainer_of(state, objective).train_step(a_batch(number))
        for network in plain.values():
            network.step(a_batch(number))
        assert state.remaining_steps() == steps - number - 1
        assert (state.progress.epoch, state.progress.seen) == (
            (number + 1) // STEPS_PER_EPOCH, (number + 1) % STEPS_PER_EPOCH * BATCH_SIZE,
        )  # fmt: skip
    for name, network in plain.items():
        came = state.networks.members[name].state_dict()
        for key, value in network.network.state_dict().items():
            torch.testing.assert_close(came[key], value, rtol=1e-9, atol=1e-11, msg=f"{name} {key}")
    for key, value in state.networks.members["judge"].state_dict().items():
        assert torch.equal(value, untouched[key]), key
    if "clip_norm" in options:  # some gradients are above the limit and some are not
        norms = [norm for network in plain.values() for norm in network.norms]
        assert min(norms) < options["clip_norm"] < max(norms)
    averaged = {"student", "pupil"} if "ema_decay" in options else set()
    assert state.ema.keys() == {f"{name}_ema" for name in averaged}
    for name in averaged:  # the weight of an update is a float32
        came = state.ema[f"{name}_ema"].state_dict()
        for key, value in plain[name].average.items():
            torch.testing.assert_close(came[key], value, rtol=1e-5, atol=1e-6, msg=f"{name} {key}")
    means = state.meter.read()
    for name, network in plain.items():
        assert means[name]["loss"] == pytest.approx(network.loss / steps, rel=1e-9)
    assert means["judge"]["loss"] is None


class RulesOut(nn.Module):
    """Excludes the first class: its logit is always -inf."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits + torch.tensor([-torch.inf, 0, 0, 0, 0], dtype=logits.dtype)


@pytest.mark.parametrize("method", ["independent", "bdkd"])
@pytest.mark.parametrize("broken", ["teacher", "pupil"])
def test_an_infinite_loss_skips_the_step_although_every_gradient_is_finite(broken, method):
    """The cross entropy of an excluded label is infinite. Its gradient, softmax minus label, is
    finite."""
    state = a_state(SGDConfig("sgd"), {broken: RulesOut()})
    objective = create_objective(OBJECTIVES.configure(method), state.recipe.networks)
    batch = a_batch(0)
    before = copy.deepcopy(state.networks.state_dict())
    state.networks.train()
    batch = Batch(batch.views, torch.zeros_like(batch.target))
    trainer_of(state, objective).train_step(batch)
    assert state.skipped.tolist() == [1, 1, 1]
    for key, value in state.networks.state_dict().items():
        assert torch.equal(value, before[key]), key


class RootOfZero(nn.Module):
    """Adds the square root of a parameter that is 0: the loss is finite, the gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64))

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.zero.sqrt()


@pytest.mark.parametrize("broken", ["teacher", "student", "pupil"])
def test_a_gradient_that_is_not_finite_skips_the_step_of_every_network(broken):
    """It may be a gradient of the first network, the last one, or one between them."""
    state = a_state(SGDConfig("sgd"), {broken: RootOfZero()})
    objective = create_objective(OBJECTIVES.configure("independent"), state.recipe.networks)
    before = copy.deepcopy(state.networks.state_dict())
    state.networks.train()
    trainer_of(state, objective).train_step(a_batch(0))
    assert state.skipped.tolist() == [1, 1, 1]
    means = state.meter.read()
    assert all(math.isfinite(means[name]["loss"]) for name in ("teacher", "student", "pupil"))
    for key, value in state.networks.state_dict().items():
        assert torch.equal(value, before[key]), key
