"""What a run keeps of its test images is what its metrics were made of."""

import dataclasses

import numpy as np
import pytest
import torch
from small_runs import Tiny
from torch import nn

from bdkd.config import load_recipe
from bdkd.data import create_source
from bdkd.models import create_model
from bdkd.training.evaluate import evaluate
from bdkd.training.predictions import predict


class Unpooled(nn.Module):
    """A network whose features are maps, and whose logits have a NaN for dark images."""

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
def test_answers_are_those_of_the_metrics(source, batch_size):
    torch.manual_seed(0)
    networks = {"net": create_model("resnet8", 10, 1), "plain": Tiny(), "maps": Unpooled()}
    networks["net"].train()
    networks["plain"].eval()
    before = torch.get_rng_state()
    kept = predict(networks, source, "test", batch_size, "fp32")
    assert torch.equal(torch.get_rng_state(), before)
    assert networks["net"].training
    assert not networks["plain"].training
    results = evaluate(
        {name: networks[name] for name in ("net", "plain")}, source, "test", batch_size, "fp32"
    )
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
    # A NaN is no class, and what float16 cannot hold stays finite.
    broken = kept.networks["maps"]
    assert np.isnan(broken.confidence).any()
    assert (broken.predicted[np.isnan(broken.confidence)] == -1).all()
    assert broken.features.shape == (len(kept.featured), 2)
    assert np.isfinite(broken.features).all()
