"""Compare the fitted temperature with two other implementations, and test cases without a
minimum."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from bdkd.evaluation.temperature import HIGHEST, LOWEST, fit_temperature


def some_logits(count: int, classes: int, sharpness: float, seed: int):
    """Return the calibrated logits of a network, multiplied by ``sharpness``, and labels."""
    generator = torch.Generator().manual_seed(seed)
    honest = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial(honest.softmax(-1), 1, generator=generator).squeeze(-1)
    return sharpness * honest, target


@pytest.mark.parametrize("sharpness", [0.2, 0.7, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_the_temperature_agrees_with_a_minimum_by_scipy(sharpness, classes):
    x, y = some_logits(500, classes, sharpness, seed=classes)

    def nll(log_t: float) -> float:
        log_p = log_softmax(x.numpy() / math.exp(log_t), axis=1)
        return -log_p[np.arange(len(y)), y.numpy()].mean()

    found = minimize_scalar(
        nll, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    came = fit_temperature(x, y)
    # The error of Brent's method is about the square root of the rounding error.
    assert came == pytest.approx(math.exp(found.x), rel=1e-6)
    assert nll(math.log(came)) <= found.fun + 1e-15


def test_the_temperature_agrees_with_netcal():
    from netcal.scaling import TemperatureScaling

    x, y = some_logits(2000, 10, 3.0, seed=1)
    netcal = TemperatureScaling()
    netcal.fit(x.softmax(-1).numpy(), y.numpy())
    # netcal maximizes the likelihood times a broad prior, and it clips probabilities.
    assert fit_temperature(x, y) == pytest.approx(float(1 / netcal.weights[0]), rel=1e-2)


@pytest.mark.parametrize("sharpness", [1.0, 2.5])
def test_the_temperature_is_the_factor_by_which_logits_are_too_sharp(sharpness):
    x, y = some_logits(20_000, 10, sharpness, seed=3)
    assert fit_temperature(x, y) == pytest.approx(sharpness, rel=0.05)


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.floats(-2.5, 2.5))
def test_the_derivative_is_zero_at_the_temperature_unless_it_is_a_bound(seed, count, log_sharpness):
    generator = torch.Generator().manual_seed(seed)
    x = 10**log_sharpness * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (count,), generator=generator)
    came = fit_temperature(x, y)
    assert came is not None
    inverse = torch.tensor(1 / came, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.cross_entropy(inverse * x, y), inverse)
    if came == LOWEST:
        assert slope <= 1e-12  # a lower temperature would be better, or the NLL is flat
    elif came == HIGHEST:
        assert slope >= -1e-12
    else:
        assert abs(slope) <= 1e-7 * x.abs().max()


def test_all_correct_and_all_wrong_predictions_give_the_bounds():
    eye = torch.eye(3)
    assert fit_temperature(4 * eye, torch.arange(3)) == LOWEST  # all correct
    assert fit_temperature(4 * eye, torch.tensor([1, 2, 0])) == HIGHEST  # all wrong


def test_the_temperature_is_one_if_it_does_not_change_the_nll():
    labels = torch.zeros(5, dtype=torch.int64)
    assert fit_temperature(torch.randn(5, 1), labels) == 1.0
    assert fit_temperature(torch.full((5, 4), 7.3), labels) == 1.0


def test_the_temperature_is_none_if_the_nll_is_not_finite():
    labels = torch.zeros(5, dtype=torch.int64)
    assert fit_temperature(torch.zeros(0, 3), labels[:0]) is None
    for bad in (math.nan, math.inf):
        x = torch.randn(5, 3)
        x[2, 1] = bad
        assert fit_temperature(x, labels) is None
    x = torch.randn(5, 3)
    x[2, 0] = -math.inf  # the label is masked
    assert fit_temperature(x, labels) is None


def test_a_masked_class_does_not_change_the_temperature():
    x, y = some_logits(200, 4, 2.0, seed=5)
    masked = torch.cat((x, torch.full((200, 1), -math.inf)), dim=1)
    assert fit_temperature(masked, y) == pytest.approx(fit_temperature(x, y), rel=1e-9)


def test_ranks_with_summed_derivatives_find_the_temperature_of_all_samples():
    """Two threads stand for ranks with different samples. They exchange only four sums."""
    import threading

    x, y = some_logits(101, 5, 2.0, seed=6)
    barrier, sums, came = threading.Barrier(2), [None, None], [None, None]

    def rank(k: int) -> None:
        def total(own):
            sums[k] = own
            barrier.wait()
            both = sums[0] + sums[1]
            barrier.wait()
            return both

        came[k] = fit_temperature(x[k::2], y[k::2], total)

    threads = [threading.Thread(target=rank, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert came[0] == came[1] == pytest.approx(fit_temperature(x, y), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_converted_to_float64(dtype):
    x, y = some_logits(500, 10, 3.0, seed=7)
    low = x.to(dtype)
    assert fit_temperature(low, y) == fit_temperature(low.double(), y)


def test_huge_logits_give_a_finite_temperature():
    x, y = some_logits(300, 10, 1.0, seed=8)
    assert fit_temperature(30 * x, y) == pytest.approx(30 * fit_temperature(x, y), rel=1e-8)
    assert fit_temperature(1e4 * x, y) == HIGHEST


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(4,\)"):
        fit_temperature(torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64))


def test_the_chunks_of_a_large_set_have_equal_weight(monkeypatch):
    """Logits are converted to float64 in chunks to save memory. Here a chunk has three rows of
    five."""
    rng = torch.Generator().manual_seed(5)
    logits = 6 * torch.randn(100, 5, generator=rng)
    target = torch.where(
        torch.rand(100, generator=rng) < 0.6, logits.argmax(-1), torch.arange(100) % 5
    )
    at_once = fit_temperature(logits, target)
    monkeypatch.setattr("bdkd.evaluation.temperature._ROWS", 15)
    assert fit_temperature(logits, target) == pytest.approx(at_once, rel=1e-9)
