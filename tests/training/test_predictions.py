"""The predictions that a run saves for its test images agree with its metrics."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from small_runs import Tiny
from torch import nn

from bdkd.config import load_recipe
from bdkd.data import WHOLE, Batch, DataInfo, create_source
from bdkd.evaluation.predict import Evaluator
from bdkd.models import create_model


class Unpooled(nn.Module):
    """A network whose features are maps, and whose logits are NaN for dark images."""

    def forward_features(self, x):
        return torch.cat((x, 1e6 * x), 1)  # (B, 2, H, W), beyond float16

    def forward(self, x):
        logits = x.flatten(1)[:, 20:30]
        return torch.where(x.mean((1, 2, 3), keepdim=False)[:, None] < x.mean(), torch.nan, logits)


@pytest.fixture(scope="module")
def source():
    recipe = load_recipe("digits")
    data = dataclasses.replace(recipe.data, source="digits")
    return create_source(data, 0, torch.device("cpu"), torch.contiguous_format)


@pytest.mark.parametrize("batch_size", [17, 64])
def test_predictions_agree_with_the_metrics(source, batch_size):
    torch.manual_seed(0)
    networks = {"net": create_model("resnet8", 10, 1), "plain": Tiny(), "maps": Unpooled()}
    networks["net"].train()
    networks["plain"].eval()
    before = torch.get_rng_state()
    kept = predict(networks, source, "test", batch_size, "fp32")
    assert torch.equal(torch.get_rng_state(), before)
    assert networks["net"].training
    assert not networks["plain"].training
    results = Evaluator(
        {name: networks[name] for name in ("net", "plain")}, source, batch_size, "fp32"
    ).evaluate("test")
    count = source.info.counts["test"]
    assert kept.target.shape == (count,)
    assert len(kept.classes) == 10
    for name, result in results.items():
        network = kept.networks[name]
        assert kept.correct(name).mean() == pytest.approx(result.top1)
        assert network.entropy.mean() == pytest.approx(result.entropy, rel=1e-5)
        edges = [k / 15 for k in range(1, 15)]
        counted = np.bincount(np.searchsorted(edges, network.confidence), minlength=15)
        assert counted.tolist() == list(result.bin_count)
    assert kept.networks["plain"].features is None
    features = kept.networks["net"].features
    images = torch.cat([b.views[0] for b in source.eval_batches("test", 64)])[kept.featured]
    with torch.inference_mode():
        expected = networks["net"].eval().forward_features(images)
    np.testing.assert_allclose(features, expected, rtol=2e-3, atol=2e-3)
    assert features.dtype == np.float16
    # NaN logits have no class. Features beyond the range of float16 are saved as finite numbers.
    broken = kept.networks["maps"]
    assert np.isnan(broken.confidence).any()
    assert (broken.predicted[np.isnan(broken.confidence)] == -1).all()
    assert broken.features.shape == (len(kept.featured), 2)
    assert np.isfinite(broken.features).all()


def predict(networks, source, split, batch_size, precision):
    evaluator = Evaluator(networks, source, batch_size, precision)
    return evaluator.run(split, keep_predictions=True).predictions()


class Points:
    """A data source of images of one pixel, which belong to the first two classes."""

    def __init__(self, values: torch.Tensor, target: torch.Tensor, classes: str = "abc") -> None:
        self.values, self.target = values, target
        fields = dict.fromkeys(DataInfo.__dataclass_fields__)
        counts = {"train": 0, "val": 0, "test": len(values)}
        self.info = DataInfo(**{**fields, "classes": tuple(classes), "counts": counts})

    def eval_batches(self, split, batch_size, shard=WHOLE):
        assert split == "test"
        for start in range(0, len(self.values), batch_size):
            part = slice(start, start + batch_size)
            yield Batch((self.values[part],), self.target[part])


class Line(nn.Module):
    """A network whose features are three multiples of the pixel, as the means of 1x2 maps."""

    def forward_features(self, x):
        x = torch.outer(x, torch.tensor([1.0, 2.0, -3.0]))[:, :, None, None]
        return torch.cat((x - 1, x + 1), -1)

    def forward(self, x):
        return torch.outer(x, torch.tensor([1.0, -1.0, 0.5]))


@pytest.mark.parametrize("batch_size", range(1, 13))
def test_predictions_and_features_do_not_depend_on_the_batch_size(batch_size, monkeypatch):
    """Features are kept for four images per class, here the first eight images. The last of these
    is the first image of a batch if batches have 7 images or 1."""
    generator = torch.Generator().manual_seed(0)
    source = Points(
        torch.randn(11, generator=generator),
        torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1]),
    )  # fmt: skip
    monkeypatch.setattr("bdkd.evaluation.predictions.FEATURES_PER_CLASS", 4)
    kept = predict({"line": Line()}, source, "test", batch_size, "fp32")
    featured = [0, 1, 2, 3, 4, 5, 6, 7]
    assert kept.featured.tolist() == featured
    assert kept.target.tolist() == source.target.tolist()
    line, logits = kept.networks["line"], Line()(source.values).double().numpy()
    p = softmax(logits, axis=1)
    assert line.predicted.tolist() == logits.argmax(1).tolist()
    np.testing.assert_allclose(line.confidence, p.max(1), rtol=1e-14)
    np.testing.assert_allclose(line.entropy, entropy(p, axis=1), rtol=1e-6)
    expected = np.outer(source.values.numpy(), [1, 2, -3])[featured]
    np.testing.assert_allclose(line.features, expected, rtol=2e-3, atol=2e-3)


def test_the_class_comes_from_the_logits_if_probabilities_are_equal():
    """The two logits differ, but their probabilities are equal in float64."""

    class Close(nn.Module):
        def forward(self, x):
            return torch.stack((0 * x, 0 * x + 1e-30), 1)

    source = Points(torch.zeros(3), torch.tensor([0, 1, 1]), "ab")
    kept = predict({"close": Close()}, source, "test", 2, "fp32").networks["close"]
    assert kept.predicted.tolist() == [1, 1, 1]
    assert kept.confidence.tolist() == [0.5] * 3


def test_bf16_predictions_and_features_use_the_precision_of_training():
    torch.manual_seed(0)
    network = nn.Linear(4, 3)
    network.forward_features = lambda x: network(x)
    values, target = torch.randn(9, 4), torch.tensor([0, 1, 0] * 3)
    kept = predict({"a": network}, Points(values, target), "test", 4, "bf16").networks["a"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = network(values).double()
    assert not torch.equal(logits, network(values).double())
    np.testing.assert_allclose(kept.confidence, logits.softmax(-1).amax(-1), rtol=1e-12)
    np.testing.assert_array_equal(kept.features, logits.half())
