"""Temperature scaling at the end of a run: fitted on validation images, measured on test images."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdkd.data import WHOLE, Batch, DataInfo
from bdkd.evaluation.calibration import Calibration
from bdkd.evaluation.predict import Evaluator
from bdkd.evaluation.temperature import fit_temperature


def recalibrate(*arguments) -> dict[str, dict]:
    evaluator = Evaluator(*arguments)
    return evaluator.run("test", evaluator.fit_temperatures()).recalibrated()


class Source:
    """3-D points. The labels of the test and validation splits have different distributions, so a
    temperature that is fitted on the wrong split differs."""

    def __init__(self, val: int = 300) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = {
            split: torch.randn(count, 3, generator=generator)
            for split, count in (("val", val), ("test", 200))
        }
        self.labels = {
            split: torch.multinomial((sharpness * x).softmax(-1), 1, generator=generator)[:, 0]
            for (split, x), sharpness in zip(self.images.items(), (0.5, 3.0), strict=True)
            if len(x)
        }
        counts = {"train": 1, **{split: len(x) for split, x in self.images.items()}}
        fields = dict.fromkeys(DataInfo.__dataclass_fields__)
        self.info = DataInfo(**{**fields, "classes": ("a", "b", "c"), "counts": counts})

    def eval_batches(self, split, batch_size, shard=WHOLE):
        assert shard == WHOLE
        for start in range(0, self.info.counts[split], batch_size):
            part = slice(start, start + batch_size)
            yield Batch((self.images[split][part],), self.labels[split][part])


class Twice(nn.Module):
    """Returns twice the points as logits, and noise in training mode."""

    def forward(self, x):
        return torch.randn_like(x) if self.training else 2 * x


def test_the_temperature_is_fitted_on_validation_images_only():
    source, networks = Source(), {"student": Twice()}
    came = recalibrate(networks, source, 64, "fp32")["student"]
    fitted = fit_temperature(2 * source.images["val"], source.labels["val"])
    assert came["temperature"] == pytest.approx(fitted, rel=1e-9)
    assert fitted > 2  # on the test part it would be below 1
    x, y = 2 * source.images["test"].double() / fitted, source.labels["test"]
    assert came["nll_scaled"] == pytest.approx(F.cross_entropy(x, y).item(), rel=1e-9)
    meter = Calibration(3)
    meter.update(x, y)
    assert came["ece_scaled"] == pytest.approx(meter.compute().ece, rel=1e-9)
    assert came["brier_scaled"] == pytest.approx(meter.compute().brier, rel=1e-9)
    assert networks["student"].training  # the mode is restored


class Times(nn.Module):
    """Returns the points times a factor, so the best temperature is proportional to the factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_each_network_gets_its_own_temperature_and_keeps_its_mode():
    """Scaled by its own temperature, every network here gives the same float64 probabilities."""
    source, factors = Source(), {"b": 1.0, "a": 3.0, "c": 0.5}
    networks = {name: Times(factor) for name, factor in factors.items()}
    networks["a"].eval()
    networks["c"].eval()
    came = recalibrate(networks, source, 50, "fp32")
    assert {name: network.training for name, network in networks.items()} == {
        "b": True, "a": False, "c": False,
    }  # fmt: skip
    assert list(came) == list(factors)
    one = came["b"]["temperature"]
    meter = Calibration(3)
    meter.update(source.images["test"].double() / one, source.labels["test"])
    expected = meter.compute()
    for name, factor in factors.items():
        assert came[name]["temperature"] == pytest.approx(factor * one, rel=1e-5)
        assert came[name]["nll_scaled"] == pytest.approx(expected.nll, rel=1e-5)
        assert came[name]["brier_scaled"] == pytest.approx(expected.brier, rel=1e-5)
        assert came[name]["ece_scaled"] == pytest.approx(expected.ece, rel=1e-4)


def test_no_temperature_without_validation_images_or_finite_logits():
    nothing = {"temperature": None, "ece_scaled": None, "nll_scaled": None, "brier_scaled": None}
    assert recalibrate({"a": Twice()}, Source(val=0), 64, "fp32") == {"a": nothing}

    class Broken(nn.Module):
        def forward(self, x):
            return x + torch.nan

    came = recalibrate({"a": Broken(), "b": Twice()}, Source(), 64, "fp32")
    assert came["a"] == nothing
    assert came["b"]["temperature"] is not None


def test_the_temperature_of_a_bf16_run_is_fitted_on_bf16_logits():
    source, linear = Source(), nn.Linear(3, 3)
    came = recalibrate({"a": linear}, source, 64, "bf16")["a"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = linear(source.images["val"])
    assert logits.dtype is torch.bfloat16
    assert came["temperature"] == pytest.approx(
        fit_temperature(logits.detach(), source.labels["val"]), rel=1e-9
    )
