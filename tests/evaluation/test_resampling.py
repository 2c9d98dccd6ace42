"""Compare bootstrap intervals and the expected ECE with resampling in NumPy and closed forms, also
for data that are processed in several chunks."""

import numpy as np
import pytest
import torch
from scipy import stats

from bdkd.evaluation import temperature
from bdkd.evaluation.calibration import bootstrap, expected_ece
from bdkd.evaluation.temperature import fit_temperature


def overconfident(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, count)
    return confidence, rng.random(count) < 0.85 * confidence


def ece_of(confidence: np.ndarray, correct: np.ndarray) -> float:
    bins = np.ceil(confidence * 15)
    return sum(abs((correct - confidence)[bins == b].sum()) for b in range(16)) / len(confidence)


@pytest.mark.parametrize("options", [{}, {"level": 0.6}])  # 95% by default
def test_bootstrap_intervals_agree_with_numpy(options):
    """The accuracies of resamples are binomial. Intervals of 2,000 draws vary by 0.003. A coverage
    of 90% instead of 95% would change them by 0.01."""
    confidence, correct = overconfident(150)
    came = bootstrap(torch.tensor(confidence), torch.tensor(correct), draws=2000, **options)
    level = options.get("level", 0.95)
    tails = [(1 - level) / 2, (1 + level) / 2]
    accuracies = stats.binom.ppf(tails, 150, correct.mean()) / 150
    assert came.top1 == pytest.approx(tuple(accuracies), abs=0.0071)  # one image is 1/150
    rng = np.random.default_rng(1)
    eces = []
    for _ in range(2000):
        pick = rng.integers(150, size=150)
        eces.append(ece_of(confidence[pick], correct[pick]))
    low, high = np.quantile(eces, tails)
    observed = ece_of(confidence, correct)
    pivotal = (2 * observed - high, 2 * observed - low)
    assert pivotal[0] > 0
    assert came.ece == pytest.approx(pivotal, abs=0.006)


def test_the_interval_of_the_ece_is_clamped_at_zero():
    """For a calibrated network, the lower end of the pivotal interval would be negative."""
    confidence = torch.full((100,), 0.7, dtype=torch.float64)
    correct = torch.arange(100) < 70
    low, high = bootstrap(confidence, correct, draws=300).ece
    assert low == 0
    assert high == pytest.approx(0, abs=1e-12)  # the ECE is 0, and the ECE of a resample is larger
    correct = torch.arange(100) < 72
    low, high = bootstrap(confidence, correct, draws=300).ece
    assert low == 0 < high < 0.05


def test_different_seeds_give_different_simulations():
    confidence, correct = map(torch.tensor, overconfident(150))
    one, again, other = (bootstrap(confidence, correct, draws=50, seed=s) for s in (1, 1, 2))
    assert one == again != other
    one, again, other = (expected_ece(confidence, draws=50, seed=s) for s in (1, 1, 2))
    assert one == again != other


def test_expected_ece_of_many_samples_agrees_with_the_exact_value():
    """6 million numbers need several chunks. All confidences are 0.9, so that the number of correct
    samples is binomial and the ECE has a closed form."""
    count, draws = 6000, 1000
    k = np.arange(count + 1)
    exact = (stats.binom.pmf(k, count, 0.9) * np.abs(k / count - 0.9)).sum()
    confidences = torch.full((count,), 0.9, dtype=torch.float64)
    came = expected_ece(confidences, draws=draws)
    assert came == pytest.approx(exact, rel=0.08)  # three standard errors


@pytest.mark.parametrize("piece", [8, 70, 10**6])  # numbers that are converted to float64 at a time
def test_a_temperature_is_fitted_on_all_pieces_of_the_logits(piece, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(100, 4, generator=generator, dtype=torch.float64)
    target = torch.multinomial((logits / 3).softmax(-1), 1, generator=generator)[:, 0]
    logits[60:] *= 5  # the last chunks have higher confidences
    expected = fit_temperature(logits, target)
    monkeypatch.setattr(temperature, "_ROWS", piece)
    assert fit_temperature(logits, target) == pytest.approx(expected, rel=1e-9)
    assert abs(fit_temperature(logits[:60], target[:60]) / expected - 1) > 0.3
