"""The logged means of an interval, compared with a plain computation in NumPy."""

import itertools

import numpy as np
import pytest
import torch

from bdkd.engine.meter import StepOutput, TrainingMeter
from bdkd.errors import UsageError

# The networks differ strongly, so that mixed-up networks change every metric: the first is right
# and confident, the second is not confident, and the third is wrong and confident.
SHARPNESS = {"right": 4.0, "unsure": 0.4, "wrong": -8.0}
NETWORKS = (*SHARPNESS, "odd")
STEP_SAMPLES = 240.0


def alternating(target: torch.Tensor, classes: int, generator) -> torch.Tensor:
    """Return logits of random confidence that are right in every second bin, so that merging two
    bins changes the ECE."""
    low = 1 / classes + 0.05
    confidence = low + (1 - low) * torch.rand(len(target), generator=generator)
    right = (15 * confidence).long() % 2 == 0
    predicted = torch.where(right, target, (target + 1) % classes)[:, None]
    others = 1 + 0.1 * torch.rand(len(target), classes, generator=generator)  # no ties
    others = others.scatter(1, predicted, 0)
    p = others / others.sum(1, keepdim=True) * (1 - confidence)[:, None]
    return p.scatter(1, predicted, confidence[:, None]).log()


def interval(classes: int, soft: bool, seed: int = 0):
    """Yield two steps of 240 images in micro-batches of 140 and 100, so that every confidence bin
    has images. The unsure network does not train in the second step."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(2):
        for size in (140, 100):
            target = torch.randint(classes, (size,), generator=generator)
            one_hot = torch.nn.functional.one_hot(target, classes)
            logits = {
                name: sharpness * one_hot + torch.randn(size, classes, generator=generator)
                for name, sharpness in SHARPNESS.items()
            }
            logits["odd"] = alternating(target, classes, generator)
            trains = [name for name in NETWORKS if (name, step) != ("unsure", 1)]
            losses = {name: torch.rand((), generator=generator) for name in trains}
            statistics = {"forward_kl": torch.rand(size, generator=generator)}
            mixed = 0.7 * one_hot + 0.3 / classes  # as in mixup; the label stays the largest
            yield logits, mixed if soft else target, target, losses, statistics


def expected(parts: list, classes: int) -> dict:
    values: dict = {}
    labels = np.concatenate([label.numpy() for _, _, label, _, _ in parts])
    rows = np.arange(len(labels))
    for name in NETWORKS:
        logits = np.concatenate([logits[name].double().numpy() for logits, *_ in parts])
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        rank = (logits > logits[rows, labels][:, None]).sum(-1)
        confidence, correct = p.max(-1), logits.argmax(-1) == labels
        ece = 0.0
        for k in range(15):
            inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
            if inside.any():
                gap = abs(correct[inside].mean() - confidence[inside].mean())
                ece += inside.mean() * gap
        trained = sum(len(label) for _, _, label, losses, _ in parts if name in losses)
        loss = sum(losses[name].item() for *_, losses, _ in parts if name in losses)
        values[name] = {
            "loss": STEP_SAMPLES * loss / trained,
            "top1": (rank == 0).mean(),
            "top5": (rank < 5).mean(),
            "nll": -np.log(p[rows, labels]).mean(),
            "entropy": -(p * np.log(p)).sum(-1).mean(),
            "ece": ece,
        }
    sums = sum(s["forward_kl"].sum().item() for *_, s in parts)
    return {**values, "forward_kl": sums / len(labels)}


def fill(meter: TrainingMeter, parts: list) -> None:
    for logits, target, _, losses, statistics in parts:
        meter.update(StepOutput(target, logits, losses, statistics), STEP_SAMPLES)


def assert_close(came: dict, plain: dict) -> None:
    assert came.keys() == plain.keys()
    for key, value in plain.items():
        assert came[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft labels"])
@pytest.mark.parametrize("classes", [3, 9])
def test_the_means_equal_a_plain_computation(classes, soft):
    """With 3 classes the label is always among the first five; with 9 it is not."""
    parts = list(interval(classes, soft))
    meter = TrainingMeter(list(NETWORKS), torch.device("cpu"))
    fill(meter, parts)
    plain = expected(parts, classes)
    assert_close(meter.read(), plain)
    eces = sorted(plain[name]["ece"] for name in NETWORKS)
    assert min(b - a for a, b in itertools.pairwise(eces)) > 0.02
    assert plain["wrong"]["top5"] == 1.0 if classes == 3 else plain["wrong"]["top5"] < 0.9


def test_reading_the_meter_starts_a_new_interval():
    meter = TrainingMeter(list(NETWORKS), torch.device("cpu"))
    fill(meter, list(interval(9, False, seed=1)))
    meter.read()
    for values in (meter.read()[name] for name in NETWORKS):  # without a division by zero
        assert values.pop("loss") is None
        assert set(values.values()) == {0.0}
    parts = list(interval(9, False, seed=2))
    fill(meter, parts)
    assert_close(meter.read(), expected(parts, 9))


def test_loaded_sums_continue_an_interval_and_sums_of_ranks_are_added():
    first, second = list(interval(9, False, seed=1)), list(interval(9, False, seed=2))
    meters = [TrainingMeter(list(NETWORKS), torch.device("cpu")) for _ in range(3)]
    fill(meters[0], first)
    fill(meters[1], second)
    fill(meters[2], second)  # load_state_dict replaces these sums
    meters[2].load_state_dict(meters[0].state_dict())
    fill(meters[2], second)
    assert_close(meters[2].read(), expected(first + second, 9))
    meters[2].load_state_dict(*(meter.state_dict() for meter in meters[:2]))
    assert_close(meters[2].read(), expected(first + second, 9))


@pytest.mark.parametrize("name", ["student", "step", "learning_rate"])
def test_a_statistic_cannot_replace_another_value_of_the_metrics(name):
    """The objective of a plugin chooses the names of its statistics."""
    meter = TrainingMeter(["teacher", "student"], torch.device("cpu"))
    logits = dict.fromkeys(meter.networks, torch.zeros(4, 3))
    output = StepOutput(torch.zeros(4, dtype=torch.int64), logits, {}, {name: torch.ones(4)})
    with pytest.raises(UsageError, match=f"statistic '{name}', which is the name of a network or"):
        meter.update(output, 4)
