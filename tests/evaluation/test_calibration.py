"""Compare calibration metrics with float64 NumPy and two libraries, and test their
documentation."""

import math
from dataclasses import astuple, fields, replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdkd.evaluation.calibration import (
    BINS,
    Calibration,
    CalibrationResult,
    bootstrap,
    expected_ece,
)

COUNTED = ("count", "top1", "top5", "bin_count", "bin_accuracy")
SUMMED = ("nll", "brier", "ece", "mce", "classwise_ece", "entropy", "bin_confidence")


def calibrate(logits: torch.Tensor, target: torch.Tensor, cuts: tuple[int, ...] = ()):
    calibration = Calibration(logits.shape[1])
    bounds = [0, *sorted(cuts), len(logits)]
    for start, end in pairwise(bounds):
        calibration.update(logits[start:end], target[start:end])
    return calibration


def random_case(samples: int, classes: int, seed: int, scale: float = 2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(samples, classes, generator=generator) * scale).to(dtype)
    target = torch.randint(classes, (samples,), generator=generator)
    likely = torch.rand(samples, generator=generator) < 0.6
    return logits, torch.where(likely, logits.float().argmax(-1), target)


def numpy_softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def binned_gaps(value: np.ndarray, outcome: np.ndarray) -> list[tuple[int, float, float]]:
    """Return (samples, mean outcome, mean value) of each bin (k/15, (k+1)/15]. Bin 0 includes 0."""
    bins = []
    for k in range(15):
        inside = (value > k / 15) & (value <= (k + 1) / 15)
        if k == 0:
            inside |= value == 0
        n = int(inside.sum())
        bins.append((n, outcome[inside].mean(), value[inside].mean()) if n else (0, 0.0, 0.0))
    return bins


def numpy_metrics(logits: torch.Tensor, target: torch.Tensor) -> dict:
    x, y = logits.double().numpy(), target.numpy()
    n, c = x.shape
    p = numpy_softmax(x)
    ahead = [
        sorted(range(c), key=lambda j: (-row[j], j)).index(label)
        for row, label in zip(x, y, strict=True)
    ]
    correct = np.array(ahead) == 0
    bins = binned_gaps(p.max(1), correct)
    onehot = np.eye(c)[y]
    with np.errstate(divide="ignore"):
        nll = -np.log(p[np.arange(n), y])
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1)
    classwise = [
        sum(m / n * abs(a - b) for m, a, b in binned_gaps(p[:, k], onehot[:, k])) for k in range(c)
    ]
    return {
        "count": n,
        "top1": correct.mean(),
        "top5": np.mean(np.array(ahead) < 5),
        "nll": nll.mean(),
        "brier": ((p - onehot) ** 2).sum(1).mean(),
        "entropy": entropy.mean(),
        "ece": sum(m / n * abs(a - b) for m, a, b in bins),
        "mce": max(abs(a - b) for _, a, b in bins),
        "classwise_ece": np.mean(classwise),
        "bin_count": [m for m, _, _ in bins],
        "bin_accuracy": [a for _, a, _ in bins],
        "bin_confidence": [b for _, _, b in bins],
    }


def numpy_adaptive_ece(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Compute the ECE from cuts: bin k ends with the confidence of the ceil(k N / 15)-th sample."""
    n = len(confidence)
    ordered = np.sort(confidence)
    cuts = [ordered[math.ceil(k * n / 15) - 1] for k in range(1, 15)]
    bins = np.array([sum(cut < c for cut in cuts) for c in confidence])
    gap = correct.astype(float) - confidence
    return sum(abs(gap[bins == b].sum()) for b in range(15)) / n


def assert_as_derived(result: CalibrationResult, logits: torch.Tensor, target: torch.Tensor):
    expected = numpy_metrics(logits, target)
    for name in COUNTED + SUMMED:
        np.testing.assert_allclose(
            getattr(result, name), expected[name], rtol=1e-12, atol=1e-13, err_msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("samples", "classes"),
    [(1, 1), (1, 10), (7, 3), (14, 5), (360, 10), (500, 100)],  # 14: fewer samples than bins
)
def test_agrees_with_numpy(samples, classes, dtype):
    logits, target = random_case(samples, classes, seed=samples + classes, dtype=dtype)
    calibration = calibrate(logits, target)
    result = calibration.compute(draws=10)
    assert_as_derived(result, logits, target)
    confidence, correct = (tensor.numpy() for tensor in calibration.samples())
    np.testing.assert_allclose(
        confidence, numpy_softmax(logits.double().numpy()).max(1), rtol=1e-14
    )
    assert result.adaptive_ece == pytest.approx(numpy_adaptive_ece(confidence, correct), abs=1e-13)
    *values, registered = astuple(result)
    assert all(isinstance(value, int | float | tuple) for value in values)
    assert registered == {}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_cases_in_batches_of_any_size_agree_with_numpy(data):
    """Small integer logits are often equal. With -inf for all but m equal logits, the confidence is
    exactly 1/m, which is a bin edge for 1, 3, 5 and 15."""
    classes = data.draw(st.integers(1, 16), label="classes")
    value = st.sampled_from([-math.inf, -math.inf, 0.0, 0.0, 1.0, 2.0])
    row = st.lists(value, min_size=classes, max_size=classes).filter(lambda r: max(r) > -math.inf)
    logits = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=30), label="logits"))
    n = len(logits)
    target = torch.tensor(
        data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n), label="target")
    )
    cuts = data.draw(st.lists(st.integers(0, n), max_size=4), label="cuts")
    whole, ragged = calibrate(logits, target), calibrate(logits, target, tuple(cuts))
    result = whole.compute(draws=5)
    assert result == ragged.compute(draws=5)  # bit for bit
    assert_as_derived(result, logits, target)
    confidence, correct = (tensor.numpy() for tensor in whole.samples())
    assert result.adaptive_ece == pytest.approx(numpy_adaptive_ece(confidence, correct), abs=1e-13)


def test_ragged_batches_equal_one_batch_to_the_last_bit():
    logits, target = random_case(2000, 50, seed=3)
    whole = calibrate(logits, target)
    ragged = calibrate(logits, target, cuts=(1, 1, 130, 777, 1999))
    for name in ("counts", "sums", "class_gaps"):
        assert torch.equal(getattr(whole, name), getattr(ragged, name)), name
    assert whole.compute() == ragged.compute()


def test_a_new_calibration_has_no_samples():
    confidence, correct = Calibration(10).samples()
    assert confidence.shape == correct.shape == (0,)
    assert (confidence.dtype, correct.dtype) == (torch.float64, torch.bool)


@pytest.mark.parametrize("m", [1, 3, 5, 15])
def test_a_confidence_on_an_edge_is_in_the_lower_bin(m):
    logits = torch.full((1, 16), -math.inf)
    logits[0, :m] = 0.0
    result = calibrate(logits, torch.tensor([0])).compute()
    assert result.bin_count.index(1) == 15 // m - 1
    assert result.bin_confidence[15 // m - 1] == 1 / m


def test_a_class_probability_on_an_edge_is_in_the_lower_bin():
    """Class 0 has the probability 1/3 in the sample of this class, and a little more in the other
    sample. The samples are in two bins. In a single bin, their gaps would cancel."""
    logits = torch.tensor([[0.0, 0.0, 0.0, -math.inf], [0.05, 0.0, 0.0, -math.inf]])
    target = torch.tensor([0, 1])
    p = logits.double().softmax(-1)[:, 0]
    assert p[0] == 5 / 15 < p[1] < 6 / 15
    result = calibrate(logits, target).compute()
    assert_as_derived(result, logits, target)
    assert result.classwise_ece > (2 / 3 + 1 / 3) / (2 * 4)  # the part of class 0


def test_bin_edges_are_k_over_15_in_float64():
    edges = Calibration(2)._edges
    on = torch.tensor([k / 15 for k in range(1, 16)], dtype=torch.float64)
    assert torch.bucketize(on, edges).tolist() == list(range(15))
    above = torch.nextafter(on[:-1], torch.ones(()).double())
    assert torch.bucketize(above, edges).tolist() == list(range(1, 15))


def test_saturated_confidences_stay_in_the_last_of_fifteen_bins():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1e4, 0.0], [1e4, 0.0]])
    result = calibrate(logits, torch.tensor([0, 1, 0, 1])).compute()
    assert result.bin_count == (0,) * 14 + (4,)
    assert result.bin_confidence[-1] == 1.0
    assert result.ece == result.mce == 0.25
    assert result.nll == pytest.approx(1e4 / 4)
    assert result.ece_if_calibrated == 0.0


def test_ece_and_mce_agree_with_netcal():
    from netcal.metrics import ECE, MCE

    # This case has no confidence on a bin edge, where netcal differs.
    logits, target = random_case(2000, 10, seed=6)
    result = calibrate(logits, target).compute(draws=1)
    probabilities = logits.double().softmax(-1).numpy()
    assert ECE(bins=15).measure(probabilities, target.numpy()) == pytest.approx(result.ece)
    assert MCE(bins=15).measure(probabilities, target.numpy()) == pytest.approx(result.mce)


def test_nll_and_accuracies_agree_with_scikit_learn():
    from sklearn.metrics import log_loss, top_k_accuracy_score

    logits, target = random_case(2000, 10, seed=7)
    result = calibrate(logits, target).compute(draws=1)
    p, y, labels = logits.double().softmax(-1).numpy(), target.numpy(), range(10)
    assert result.nll == pytest.approx(log_loss(y, p, labels=labels))
    assert result.top1 == pytest.approx(top_k_accuracy_score(y, p, k=1, labels=labels))
    assert result.top5 == pytest.approx(top_k_accuracy_score(y, p, k=5, labels=labels))


def test_top5_with_fewer_than_five_classes_and_with_equal_logits():
    assert calibrate(*random_case(50, 4, seed=0)).compute().top5 == 1.0
    # Of equal logits, the lower class is ranked first.
    equal = calibrate(torch.zeros(10, 10), torch.arange(10)).compute()
    assert (equal.top1, equal.top5) == (0.1, 0.5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_without_a_softmax_counts_as_wrong(poison):
    logits, target = random_case(20, 6, seed=1)
    sound = calibrate(logits, target).compute()
    poisoned = torch.cat((logits, torch.zeros(1, 6)))
    poisoned[20, 2] = poison
    result = calibrate(poisoned, torch.cat((target, torch.tensor([2])))).compute()
    assert result.count == 21
    assert result.top1 == pytest.approx(sound.top1 * 20 / 21)
    assert result.top5 == pytest.approx(sound.top5 * 20 / 21)
    for name in ("nll", "brier", "entropy", "ece", "mce", "adaptive_ece", "classwise_ece"):
        assert math.isnan(getattr(result, name)), name
    assert math.isnan(result.ece_if_calibrated)
    assert result.bin_count[-1] == sound.bin_count[-1] + 1
    assert math.isnan(result.bin_confidence[-1])
    assert result.bin_confidence[:-1] == sound.bin_confidence[:-1]


def test_empty_batches_count_nothing_and_compute_needs_samples():
    calibration = Calibration(3)
    calibration.update(torch.empty(0, 3), torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match="no samples to measure"):
        calibration.compute()
    with pytest.raises(ValueError, match="no samples to measure"):
        Calibration(3).compute()
    logits, target = random_case(5, 3, seed=0)
    calibration.update(logits, target)
    assert calibration.compute() == calibrate(logits, target).compute()


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(4).long(), ValueError, r"\(B, 3\).*got \(4, 2\)"),
        (torch.zeros(3), torch.zeros(()).long(), ValueError, r"\(B, 3\).*got \(3,\)"),
        (torch.zeros(4, 3), torch.zeros(5).long(), ValueError, r"\(4,\).*got \(5,\)"),
        (torch.zeros(4, 3), torch.zeros(4, 3).long(), ValueError, r"\(4,\).*got \(4, 3\)"),
        (torch.zeros(4, 3), torch.zeros(4), TypeError, "integer labels, got torch.float32"),
        (torch.zeros(4, 3).long(), torch.zeros(4).long(), TypeError, "logits must be floating"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"target\[1\] is 3: .* in \[0, 3\)"),
        (torch.zeros(2, 3), torch.tensor([-100, 0]), ValueError, r"target\[0\] is -100"),
        (torch.zeros(1, 3, device="meta"), torch.tensor([0]), ValueError, "device cpu, got meta"),
    ],
)
def test_a_bad_batch_raises_a_clear_error_and_changes_nothing(logits, target, error, message):
    calibration = Calibration(3)
    with pytest.raises(error, match=message):
        calibration.update(logits, target)
    assert calibration.counts.sum() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_may_have_any_integer_type(dtype):
    logits, target = random_case(40, 300, seed=2)
    target = target % 100
    assert calibrate(logits, target.to(dtype)).compute() == calibrate(logits, target).compute()


def test_a_bad_label_on_a_gpu_makes_the_nll_nan(monkeypatch):
    """On a GPU, labels are not checked. This test removes the check on the CPU."""
    monkeypatch.setattr(Calibration, "_check", lambda *_: None)
    result = calibrate(torch.eye(4), torch.tensor([0, 1, 7, -100])).compute()
    assert (result.top1, result.top5) == (0.5, 0.5)
    assert math.isnan(result.nll)


def test_update_does_not_synchronize_with_the_device():
    """Meta tensors have no values, so that reading one on the host raises an error."""
    calibration = Calibration(10, "meta")
    logits = torch.empty(32, 10, dtype=torch.bfloat16, device="meta")
    calibration.update(logits, torch.empty(32, dtype=torch.long, device="meta"))
    other = Calibration(10, "meta")
    calibration.merge(other)
    assert calibration.samples()[0].shape == (32,)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        calibration.compute()


def test_autocast_and_inference_mode_do_not_change_the_result():
    logits, target = random_case(100, 10, seed=8)
    expected = calibrate(logits, target).compute()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inner = calibrate(logits, target)
        assert inner.compute() == expected
    assert inner.compute() == expected
    assert not Calibration(10).sums.requires_grad
    leaf = logits.clone().requires_grad_()
    assert calibrate(leaf, target).compute() == expected


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_merged_shards_equal_the_whole(shards):
    logits, target = random_case(501, 12, seed=9)
    whole = calibrate(logits, target).compute()
    merged = Calibration(12)
    for rank in range(shards):
        merged.merge(calibrate(logits[rank::shards], target[rank::shards]))
    merged.merge(Calibration(12))  # a rank without samples
    result = merged.compute()
    for field in fields(result):
        ours, theirs = getattr(result, field.name), getattr(whole, field.name)
        # The simulation uses the samples in another order.
        loose = 0.05 if field.name == "ece_if_calibrated" else 1e-12
        assert ours == pytest.approx(theirs, rel=loose, abs=1e-14), field.name
    with pytest.raises(ValueError, match="of 3 classes into one of 12"):
        merged.merge(Calibration(3))


def test_the_mean_ece_of_shards_is_larger_than_the_ece():
    logits, target = random_case(400, 10, seed=10)
    parts = [calibrate(logits[k::8], target[k::8]).compute().ece for k in range(8)]
    assert np.mean(parts) > 1.2 * calibrate(logits, target).compute().ece


def test_a_calibrated_network_has_the_expected_ece():
    torch.manual_seed(0)
    logits = 2 * torch.randn(1000, 10)
    probabilities = logits.double().softmax(-1)
    results = []
    for _ in range(20):  # one set of confidences, twenty random sets of labels
        target = torch.multinomial(probabilities, 1).squeeze(1)
        results.append(calibrate(logits, target).compute(draws=200))
    eces, chance = [r.ece for r in results], results[0].ece_if_calibrated
    assert np.mean(eces) == pytest.approx(chance, abs=4 * np.std(eces) / math.sqrt(len(eces)))
    sharpened = calibrate(2 * logits, target).compute(draws=200)
    assert sharpened.ece > 3 * sharpened.ece_if_calibrated


@pytest.mark.parametrize(
    "confidences", [[0.3], [1.0, 1.0], [0.61, 0.62, 0.64, 0.9], [0.2, 0.21, 0.22, 0.23, 0.24]]
)
def test_expected_ece_agrees_with_the_sum_over_all_outcomes(confidences):
    c = np.array(confidences)
    bins = np.ceil(c * 15).astype(int)
    exact = 0.0
    for outcome in product((0, 1), repeat=len(c)):
        y = np.array(outcome)
        ece = sum(abs((y - c)[bins == b].sum()) for b in set(bins)) / len(c)
        exact += np.prod(np.where(y, c, 1 - c)) * ece
    simulated = expected_ece(torch.tensor(confidences, dtype=torch.float64), draws=20_000)
    assert simulated == pytest.approx(exact, abs=0.01)


def test_expected_ece_decreases_with_samples_and_depends_on_the_seed():
    c = torch.rand(5000, generator=torch.Generator().manual_seed(0)).double()
    few, many = expected_ece(c[:50], draws=200), expected_ece(c, draws=200)
    assert few == pytest.approx(10 * many, rel=0.2)  # proportional to 1 / sqrt(N)
    assert expected_ece(c, draws=200) == many != expected_ece(c, draws=200, seed=1)
    assert expected_ece(c, bins=5, draws=200) < many
    logits = (20 * c[:50]).float().log().unsqueeze(1) * torch.tensor([[1.0, 0.0]])
    calibration = Calibration(2)
    calibration.update(logits, torch.zeros(50, dtype=torch.int64))
    confidences, _ = calibration.samples()
    found = calibration.compute(draws=7, seed=3).ece_if_calibrated
    assert found == expected_ece(confidences, draws=7, seed=3)
    with pytest.raises(ValueError, match=r"\(N,\) with N >= 1, got \(0,\)"):
        expected_ece(torch.empty(0))
    with pytest.raises(ValueError, match="draws must be >= 1, got 0"):
        expected_ece(c, draws=0)


def test_bootstrap_intervals_contain_the_true_values():
    """The network is overconfident by 5%, with 1,000 samples. A percentile interval of the ECE
    would contain the true value in about half of the trials."""
    generator = torch.Generator().manual_seed(0)

    def confidences(n: int) -> torch.Tensor:
        return (torch.rand(n, generator=generator) ** 0.3).double().clamp(min=0.1)

    population = confidences(400_000)
    gaps = torch.zeros(BINS).double()
    gaps.index_add_(0, (population * 15).ceil().long() - 1, 0.05 * population)
    true_ece, true_top1 = gaps.sum().item() / 400_000, 0.95 * population.mean().item()
    trials, ece_held, top1_held = 200, 0, 0
    for trial in range(trials):
        c = confidences(1000)
        correct = torch.rand(1000, generator=generator) < 0.95 * c
        ece, top1 = bootstrap(c, correct, draws=200, seed=trial)
        ece_held += ece.low <= true_ece <= ece.high
        top1_held += top1.low <= true_top1 <= top1.high
    assert ece_held >= 0.8 * trials
    assert top1_held >= 0.85 * trials


def test_bootstrap_is_deterministic_and_checks_its_arguments():
    logits, target = random_case(300, 10, seed=11)
    calibration = calibrate(logits, target)
    confidence, correct = calibration.samples()
    intervals = bootstrap(confidence, correct, draws=300)
    assert intervals == bootstrap(confidence, correct, draws=300)
    narrow = bootstrap(confidence, correct, draws=300, level=0.5)
    assert narrow.top1.high - narrow.top1.low < intervals.top1.high - intervals.top1.low
    assert intervals.top1.low < calibration.compute().top1 < intervals.top1.high
    broken = confidence.clone()
    broken[3] = math.nan
    assert all(map(math.isnan, bootstrap(broken, correct, draws=50).ece))
    with pytest.raises(ValueError, match=r"shape \(300,\), got \(299,\)"):
        bootstrap(confidence, correct[1:])
    with pytest.raises(ValueError, match="level must be in"):
        bootstrap(confidence, correct, level=1.0)


def test_results_are_frozen():
    result = calibrate(*random_case(5, 3, seed=0)).compute()
    with pytest.raises(AttributeError):
        result.ece = 0.0  # type: ignore[misc]
    assert replace(result, ece=0.0).ece == 0.0
