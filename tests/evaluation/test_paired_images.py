"""Compare the changes between two networks on the same images with NumPy and SciPy, with full
refits, and with known true values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from bdkd.evaluation import paired_images
from bdkd.evaluation.calibration import Calibration
from bdkd.evaluation.paired_images import Logits, compare_on_images
from bdkd.evaluation.temperature import HIGHEST, LOWEST, fit_temperature

SPLIT_METRICS = ("top1", "nll", "ece", "brier")
SCALED = ("ece_scaled", "nll_scaled", "brier_scaled")


def some_networks(count: int, seed: int, classes: int = 10, noise: float = 0.3, sharp: float = 1.5):
    """Return the logits of a network, and the same logits with noise, multiplied by ``sharp``."""
    generator = torch.Generator().manual_seed(seed)
    honest = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial(honest.softmax(-1), 1, generator=generator).squeeze(-1)
    noisy = honest + noise * torch.randn(honest.shape, generator=generator, dtype=torch.float64)
    return Logits(honest.float(), (sharp * noisy).float(), target)


def metrics_by_numpy(logits, target) -> np.ndarray:
    """Return (N, 3) correct, NLL and Brier score of each image, and the confidences (N,)."""
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    p = np.exp(log_p)
    rows = np.arange(len(target))
    onehot = np.eye(p.shape[1])[target]
    correct = p.argmax(1) == target
    return np.stack((correct, -log_p[rows, target], ((p - onehot) ** 2).sum(1)), 1), p.max(1)


def ece_by_numpy(correct, confidence) -> float:
    bins = np.ceil(confidence * 15)
    gaps = [abs((correct - confidence)[bins == k].sum()) for k in range(1, 16)]
    return sum(gaps) / len(correct)


def test_metrics_of_both_networks_agree_with_numpy():
    split, validation = some_networks(400, 0), some_networks(150, 1)
    came = compare_on_images(split, validation)
    assert (came.images, came.validation_images, came.draws) == (400, 150, 1000)
    for k, side in enumerate(("before", "after")):
        temperature = fit_temperature(validation[k], validation.target)
        assert getattr(came.changes["temperature"], side) == temperature
        for t, end in ((1.0, ""), (temperature, "_scaled")):
            columns, confidence = metrics_by_numpy(split[k] / t, split.target.numpy())
            expected = dict(zip(("top1", "nll", "brier"), columns.mean(0), strict=True))
            expected["ece"] = ece_by_numpy(columns[:, 0], confidence)
            for metric, value in expected.items():
                if (change := came.changes.get(f"{metric}{end}")) is not None:
                    assert getattr(change, side) == pytest.approx(value, rel=1e-6), metric
    for metric, change in came.changes.items():
        assert change.difference == change.after - change.before, metric
        assert change.low < change.high, metric
    equal = (split.before.argmax(1) == split.after.argmax(1)).double().mean().item()
    assert came.agreement.value == equal
    assert list(came.changes) == [*SPLIT_METRICS, "temperature", *SCALED]


def test_metrics_of_both_networks_equal_those_of_calibration():
    split = some_networks(300, 5)
    changes = compare_on_images(split).changes
    for k, side in enumerate(("before", "after")):
        meter = Calibration(10)
        meter.update(split[k], split.target)
        result = meter.compute()
        for metric in SPLIT_METRICS:
            assert getattr(changes[metric], side) == getattr(result, metric)


def test_intervals_agree_with_numpy():
    """NumPy draws other resamples of the same pairs. The ends of an interval of 2,000 draws vary by
    3% of its width. Resampling the networks separately would make it 3 times wider here."""
    split = some_networks(400, 2, noise=0.1, sharp=1.1)
    came = compare_on_images(split, draws=2000).changes
    target = split.target.numpy()
    (before, sure_before), (after, sure_after) = (metrics_by_numpy(x, target) for x in split[:2])
    rng = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {metric: [] for metric in SPLIT_METRICS}
    for _ in range(2000):
        pick = rng.integers(400, size=400)
        means = (after - before)[pick].mean(0)
        for metric, value in zip(("top1", "nll", "brier"), means, strict=True):
            drawn[metric].append(value)
        drawn["ece"].append(
            ece_by_numpy(after[pick, 0], sure_after[pick])
            - ece_by_numpy(before[pick, 0], sure_before[pick])
        )
    for metric, values in drawn.items():
        low, high = np.quantile(values, (0.025, 0.975))
        if metric == "ece":  # pivotal
            observed = came["ece"].difference
            low, high = 2 * observed - high, 2 * observed - low
        width = high - low
        assert came[metric].low == pytest.approx(low, abs=0.1 * width), metric
        assert came[metric].high == pytest.approx(high, abs=0.1 * width), metric


@pytest.mark.parametrize("sharp", [0.7, 1.5, 3.0])
def test_the_interval_of_the_temperature_agrees_with_full_refits(sharp):
    validation = some_networks(216, 3, noise=0.5, sharp=sharp)
    change = compare_on_images(validation, validation, draws=2000).changes["temperature"]
    generator = torch.Generator().manual_seed(9)
    differences = []
    for _ in range(400):
        pick = torch.randint(216, (216,), generator=generator)
        before, after = (fit_temperature(x[pick], validation.target[pick]) for x in validation[:2])
        differences.append(after - before)
    low, high = np.quantile(differences, (0.025, 0.975))
    # The quantiles of 400 draws vary by 7% of the width.
    assert change.low == pytest.approx(low, abs=0.2 * (high - low))
    assert change.high == pytest.approx(high, abs=0.2 * (high - low))
    assert change.low < change.difference < change.high


@pytest.mark.parametrize("classes", [2, 7])
def test_newton_terms_agree_with_finite_differences(classes):
    logits, _, target = some_networks(50, 4, classes)
    terms = paired_images.newton_terms(logits, target, 1.7)

    def nll(log_t: float) -> np.ndarray:
        log_p = log_softmax(logits.double().numpy() / math.exp(log_t), axis=1)
        return -log_p[np.arange(50), target.numpy()]

    at, step = math.log(1.7), 1e-4
    first = (nll(at + step) - nll(at - step)) / (2 * step)
    second = (nll(at + step) - 2 * nll(at) + nll(at - step)) / step**2
    np.testing.assert_allclose(terms[:, 0], first, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(terms[:, 1], second, rtol=1e-4, atol=1e-6)


NETWORKS = st.builds(
    some_networks, count=st.integers(2, 40), seed=st.integers(0, 2**31), classes=st.integers(2, 5),
    noise=st.floats(0, 3), sharp=st.floats(0.1, 5),
)  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(NETWORKS, NETWORKS)
def test_swapping_the_networks_negates_the_differences(split, validation):
    if split.before.shape[1] != validation.before.shape[1]:
        validation = split
    swapped = [Logits(x.after, x.before, x.target) for x in (split, validation)]
    came = compare_on_images(split, validation, draws=50)
    back = compare_on_images(*swapped, draws=50)
    assert back.agreement == came.agreement
    for metric, change in came.changes.items():
        other = back.changes[metric]
        assert (other.before, other.after) == (change.after, change.before)
        if change.low is not None:
            expected = (-change.difference, -change.high, -change.low)
            assert other[2:] == pytest.approx(expected, rel=1e-9, abs=1e-12), metric


@settings(deadline=None, max_examples=30)
@given(NETWORKS)
def test_equal_networks_do_not_differ(networks):
    """The difference is exactly 0, so that no interval excludes 0 because of rounding errors."""
    logits, _, target = networks
    same = Logits(logits, logits.clone(), target)
    came = compare_on_images(same, same, draws=50)
    for metric, change in came.changes.items():
        if change.low is None:  # a temperature at a bound has no interval
            assert metric == "temperature"
            assert change.before in (LOWEST, HIGHEST)
            assert change.difference == 0
        elif metric == "top1":  # with more images, some predictions might differ
            assert change.difference == 0
            assert change.low == -change.high < 0
        else:
            assert change[2:] == (0, 0, 0), metric
    assert came.agreement.value == came.agreement.high == 1


@settings(deadline=None, max_examples=30)
@given(NETWORKS, st.randoms(use_true_random=False))
def test_metrics_do_not_depend_on_the_order_of_the_images(split, random):
    order = list(range(len(split.target)))
    random.shuffle(order)
    permuted = Logits(*(x[order] for x in split))
    came = compare_on_images(split, split, draws=20)
    other = compare_on_images(permuted, permuted, draws=20)
    assert other.agreement == came.agreement
    for metric, change in came.changes.items():
        assert other.changes[metric][:3] == pytest.approx(change[:3], rel=1e-9, abs=1e-9)


def test_results_do_not_depend_on_the_chunk_size(monkeypatch):
    split, validation = some_networks(120, 6), some_networks(70, 7)
    whole = compare_on_images(split, validation, draws=60)
    monkeypatch.setattr(paired_images, "_NUMBERS", 500)  # 50 images or 4 resamples at a time
    pieces = compare_on_images(split, validation, draws=60)
    assert pieces.agreement == whole.agreement
    for metric, change in whole.changes.items():
        assert pieces.changes[metric] == pytest.approx(change, rel=1e-12, abs=1e-15)


def test_the_result_is_deterministic_and_depends_on_the_seed():
    split = some_networks(100, 8)
    one, again, other = (compare_on_images(split, split, 50, seed) for seed in (0, 0, 1))
    assert one == again != other
    assert [x[:3] for x in one.changes.values()] == [x[:3] for x in other.changes.values()]


# --- known true values ---------------------------------------------------------------------------


def population(sharp: tuple[float, float], noise: float) -> tuple[Logits, float]:
    """Return 200,000 images, and the true change of the ECE."""
    honest, noisy, target = some_networks(200_000, 11, noise=noise, sharp=1.0)
    networks = Logits(sharp[0] * honest, sharp[1] * noisy, target)
    errors = []
    for logits in networks[:2]:
        columns, confidence = metrics_by_numpy(logits, target.numpy())
        errors.append(ece_by_numpy(columns[:, 0], confidence))
    return networks, errors[1] - errors[0]


def coverage(sharp: tuple[float, float], noise: float, images: int) -> tuple[int, int]:
    """Return how many of 60 intervals, and of 60 percentile intervals, contain the true change."""
    everything, truth = population(sharp, noise)
    generator = torch.Generator().manual_seed(0)
    pivotal = percentile = 0
    for _ in range(60):
        pick = torch.randint(200_000, (images,), generator=generator)
        change = compare_on_images(Logits(*(x[pick] for x in everything)), draws=200).changes["ece"]
        pivotal += change.low <= truth <= change.high
        mirrored = (2 * change.difference - change.high, 2 * change.difference - change.low)
        percentile += mirrored[0] <= truth <= mirrored[1]
    return pivotal, percentile


@pytest.mark.parametrize("sharp", [(1.5, 1.5), (1.2, 1.2), (1.5, 1.6)])
def test_the_interval_of_the_ece_contains_a_small_true_change(sharp):
    """57 of 60 are 95%. If the coverage is 93%, fewer than 51 have a probability of 1%."""
    assert coverage(sharp, 0.1, 359)[0] >= 51


def test_for_a_large_change_of_the_ece_the_pivotal_interval_is_better():
    """A calibrated network becomes overconfident. This case is the reason for the pivotal
    interval."""
    pivotal, percentile = coverage((1.0, 1.3), 0.1, 2000)
    assert pivotal >= 40
    assert percentile <= 20


def networks_with(gained: int, lost: int, count: int) -> Logits:
    """Return two networks of two classes. The second one is right for some images for which the
    first one is wrong, and the other way round."""
    before, after = torch.zeros(count, 2), torch.zeros(count, 2)
    right = torch.arange(count) >= gained
    before[right, 0], before[~right, 1] = 1.0, 1.0
    right = torch.arange(count) < count - lost
    after[right, 0], after[~right, 1] = 1.0, 1.0
    return Logits(before, after, torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize(("gained", "lost", "count"), [(0, 0, 359), (3, 1, 359), (40, 90, 2000)])
def test_the_interval_of_top1_agrees_with_bonett_and_price(gained, lost, count):
    change = compare_on_images(networks_with(gained, lost, count), draws=1).changes["top1"]
    assert change.difference == pytest.approx((gained - lost) / count)
    more = np.array([1] * (gained + 1) + [-1] * (lost + 1) + [0] * (count - gained - lost))
    half = 1.959964 * more.std() / math.sqrt(count + 2)
    assert (change.low, change.high) == pytest.approx((more.mean() - half, more.mean() + half))


@pytest.mark.parametrize(("gained", "lost"), [(0.0, 1.0), (2.5, 2.5), (0.5, 8.0)])
def test_the_interval_of_top1_contains_the_true_change_of_few_images(gained, lost):
    """The parameters are expected numbers of 359 images. Bootstrap intervals contained the true
    change in 63% of the trials of the first case."""
    generator = np.random.default_rng(0)
    share = np.array([gained, lost, 359 - gained - lost]) / 359
    covered = 0
    for _ in range(200):
        up, down, _same = generator.multinomial(359, share)
        change = compare_on_images(networks_with(up, down, 359), draws=1).changes["top1"]
        covered += change.low <= share[0] - share[1] <= change.high
    assert covered >= 183  # if the coverage is 95%, fewer have a probability of 1%


# --- values that cannot be computed --------------------------------------------------------------


def test_without_validation_images_there_is_no_temperature():
    came = compare_on_images(some_networks(50, 12), draws=20)
    assert came.validation_images == 0
    for metric, change in came.changes.items():
        assert (None in change) == (metric == "temperature" or metric in SCALED)
    assert came.changes["temperature"] == (None,) * 5


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_with_logits_without_a_softmax_only_top1_is_computed(bad, side):
    split = some_networks(60, 13)
    split[side][5, 3] = bad
    came = compare_on_images(split, split, draws=20)
    assert came.agreement == (None, None, None)
    assert None not in came.changes["top1"]  # the image counts as wrong
    for metric in ("nll", "ece", "brier"):
        change = came.changes[metric]
        assert [x is None for x in change] == [side == 0, side == 1, True, True, True], metric
    assert came.changes["temperature"][side] is None
    assert came.changes["temperature"][2:] == (None, None, None)
    for metric in SCALED:
        assert came.changes[metric] == (None,) * 5


def test_a_masked_label_has_an_infinite_nll():
    split = some_networks(60, 14)
    split.after[0, split.target[0]] = -math.inf
    changes = compare_on_images(split, draws=20).changes
    assert changes["nll"].before is not None
    assert changes["nll"][1:] == (None,) * 4
    assert None not in changes["brier"]


def test_a_temperature_at_a_bound_has_no_interval():
    """The second network classifies all validation images correctly."""
    validation = some_networks(40, 15)
    validation.after[:] = torch.nn.functional.one_hot(validation.target, 10).float()
    came = compare_on_images(validation, validation, draws=20).changes
    assert came["temperature"].after == LOWEST
    assert came["temperature"][3:] == (None, None)
    assert None not in came["nll_scaled"]


@pytest.mark.parametrize("images", [1, 50, 10_000])
def test_full_agreement_has_an_interval_below_one(images):
    """If all n images agree, the lower end of the Clopper-Pearson interval is the n-th root of
    2.5%."""
    logits = torch.eye(2)[torch.arange(images) % 2]
    agreement = compare_on_images(Logits(logits, logits, torch.zeros(images)), draws=1).agreement
    assert agreement == pytest.approx((1, 0.025 ** (1 / images), 1))


@pytest.mark.parametrize(("change", "message"), [
    ({"after": torch.zeros(4, 2)}, "same shape"),
    ({"target": torch.zeros(3)}, "same shape"),
    ({"before": torch.zeros(4), "after": torch.zeros(4)}, "same shape"),
    ({"before": torch.zeros(0, 3), "after": torch.zeros(0, 3), "target": torch.zeros(0)},
     "no images"),
    ({"target": torch.tensor([0, 1, 2, 3])}, "must be in"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message):
    good = Logits(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    compare_on_images(good, draws=1)
    with pytest.raises(ValueError, match=message):
        compare_on_images(good._replace(**change), draws=1)
    with pytest.raises(ValueError, match=message):
        compare_on_images(good, good._replace(**change), draws=1)
    with pytest.raises(ValueError, match="draws"):
        compare_on_images(good, draws=0)
