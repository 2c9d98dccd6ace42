"""Order, augmentation and splits of the in-memory sources."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdkd.config import DataConfig
from bdkd.data import create_source
from bdkd.data.base import epoch_order, mix_seed, stratified_split

CPU = torch.device("cpu")


def digits(seed: int = 0, **options):
    return create_source(DataConfig(**options), seed, CPU, torch.channels_last)


def test_digits_are_split_by_class_without_overlap_and_whatever_the_seed():
    first, second = digits(0), digits(1)
    assert first.info.counts == {"train": 1295, "val": 143, "test": 359}
    pixels = []
    for split in ("train", "val", "test"):
        a, b = first.splits[split], second.splits[split]
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.labels, b.labels)
        share = a.labels.bincount(minlength=10) / len(a.labels)
        assert share.min() > 0.07
        pixels.append(a.pixels)
    assert sum(map(len, pixels)) == 1797
    # scikit-learn's 1,797 images are all different
    assert len(torch.cat(pixels).flatten(1).unique(dim=0)) == 1797


def test_an_epoch_shows_every_image_at_most_once_in_a_new_order():
    source = digits()
    orders = [epoch_order(0, epoch, 1295) for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1295))
    assert not torch.equal(orders[0], orders[1])
    correlation = np.corrcoef(orders[0], orders[1])[0, 1]
    assert abs(correlation) < 0.15
    batches = list(source.train_batches(1, 0, 100, 1))
    assert [len(batch.target) for batch in batches] == [100] * 12  # the ragged rest is left out
    labels = torch.cat([batch.target for batch in batches])
    assert torch.equal(labels, source.splits["train"].labels[orders[1]][:1200])


@pytest.mark.parametrize("views", [1, 2])
def test_an_epoch_resumed_in_the_middle_is_the_epoch(views):
    """Augmentation included: it depends on the position, not on what was drawn before."""
    whole = list(
        digits(crop=2, crop_padding="edge", flip=True, cutout=3).train_batches(3, 0, 64, views)
    )
    rest = list(
        digits(crop=2, crop_padding="edge", flip=True, cutout=3).train_batches(3, 64 * 5, 64, views)
    )
    assert len(rest) == len(whole) - 5
    for a, b in zip(rest, whole[5:], strict=True):
        assert torch.equal(a.target, b.target)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    if views == 2:
        assert not torch.equal(whole[0].views[0], whole[0].views[1])
    other_seed = next(
        digits(1, crop=2, crop_padding="edge", flip=True, cutout=3).train_batches(3, 0, 64, views)
    )
    assert not torch.equal(other_seed.target, whole[0].target)


def test_evaluation_sees_every_image_once_in_order_the_ragged_last_batch_too():
    source = digits(crop=2)
    batches = list(source.eval_batches("test", 100))
    assert [len(batch.target) for batch in batches] == [100, 100, 100, 59]
    assert torch.equal(torch.cat([b.target for b in batches]), source.splits["test"].labels)


def test_images_are_normalised_by_the_training_images_alone():
    source = digits()
    images = torch.cat([batch.views[0] for batch in source.eval_batches("train", 500)])
    assert images.mean().abs() < 1e-5
    assert images.std().item() == pytest.approx(1.0, abs=1e-4)
    assert images.is_contiguous(memory_format=torch.channels_last)


@given(
    st.lists(st.integers(0, 4), min_size=10, max_size=80),
    st.floats(0.05, 0.9),
    st.integers(0, 100),
)
def test_stratified_split_parts_every_class(labels, share, seed):
    labels = np.array(labels + [0, 1, 2, 3, 4] * 2)  # two of each at least
    rest, held_out = stratified_split(labels, share, seed)
    assert sorted([*rest, *held_out]) == list(range(len(labels)))
    for label in range(5):
        of_class = (labels == label).sum()
        held = (labels[held_out] == label).sum()
        assert 1 <= held <= of_class - 1
        # The nearest whole number to the share, but for the image that each part keeps.
        assert abs(held - share * of_class) <= 0.5 or held in (1, of_class - 1)
    rest, held_out = stratified_split(labels, 0.0, seed)
    assert (len(rest), len(held_out)) == (len(labels), 0)


def test_mixed_seeds_do_not_collide():
    seeds = {mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000
