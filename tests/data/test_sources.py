"""Order, augmentation and splits of the in-memory sources."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdkd.data import Batch, Shard, create_source
from bdkd.data.base import epoch_order, mix_seed, stratified_split
from bdkd.registry import SOURCES

CPU = torch.device("cpu")


def digits(seed: int = 0, **options):
    return create_source(SOURCES.configure("digits", **options), seed, CPU, torch.channels_last)


def test_digits_are_split_by_class_without_overlap_for_every_seed():
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
    assert [len(batch.target) for batch in batches] == [100] * 12  # without the incomplete batch
    labels = torch.cat([batch.target for batch in batches])
    assert torch.equal(labels, source.splits["train"].labels[orders[1]][:1200])


@pytest.mark.parametrize("views", [1, 2])
def test_an_epoch_resumed_in_the_middle_continues_exactly(views):
    """The augmentation is the same too. It depends on the position, and not on earlier draws."""
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


def test_evaluation_shows_every_image_once_in_order():
    source = digits(crop=2)
    batches = list(source.eval_batches("test", 100))
    assert [len(batch.target) for batch in batches] == [100, 100, 100, 59]
    assert torch.equal(torch.cat([b.target for b in batches]), source.splits["test"].labels)


def test_images_are_normalised_by_the_training_images_alone():
    source = digits()
    images = torch.cat([batch.views[0] for batch in source.eval_batches("train", 500)])
    assert images.mean().abs() < 1e-5
    assert images.std().item() == pytest.approx(1.0, abs=1e-4)
    known = source.info.normalisation
    pixels = source.splits["train"].pixels.double()
    assert known.largest == pixels.max() == 16
    assert known.mean == pytest.approx([pixels.mean().item()])
    assert known.std == pytest.approx([pixels.std().item()], rel=1e-3)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("options", [{}, {"crop": 2, "flip": True}, {"cutout": 3}])
def test_images_have_the_memory_format_of_the_training(memory_format, options):
    """The images have three channels, because one channel is contiguous in both formats."""
    config = SOURCES.configure("synthetic", images=40, classes=2, **options)
    source = create_source(config, 0, CPU, memory_format)
    batches = [next(source.train_batches(0, 0, 8, 2)), next(source.eval_batches("test", 8))]
    for view in (view for batch in batches for view in batch.views):
        assert view.dtype == torch.float32
        assert view.shape == (8, 3, 32, 32)
        assert view.is_contiguous(memory_format=memory_format)


def test_a_batch_splits_into_equal_batches_of_all_its_views():
    one, other, target = torch.arange(12).view(12, 1, 1, 1), torch.rand(12, 1, 1, 1), torch.rand(12)
    parts = [part for part, _ in Batch((one, other), target).micro_batches(3)]
    assert [len(part.target) for part in parts] == [4, 4, 4]
    assert torch.equal(torch.cat([part.views[0] for part in parts]), one)
    assert torch.equal(torch.cat([part.views[1] for part in parts]), other)
    assert torch.equal(torch.cat([part.target for part in parts]), target)


@given(st.integers(1, 300), st.integers(1, 9))
def test_ranks_divide_a_batch_without_gap_or_overlap(size, world):
    """The parts are as equal as possible and in the order of the ranks. Splits are divided too."""
    batch, split = range(size), range(size)
    parts = [batch[Shard(rank, world).of_batch(size)] for rank in range(world)]
    assert [i for part in parts for i in part] == list(batch)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    parts = [split[Shard(rank, world).of_split(size)] for rank in range(world)]
    assert sorted(i for part in parts for i in part) == list(split)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(
    st.lists(st.integers(0, 4), min_size=10, max_size=80),
    st.floats(0.05, 0.9),
    st.integers(0, 100),
)
def test_stratified_split_parts_every_class(labels, share, seed):
    labels = np.array(labels + [0, 1, 2, 3, 4] * 2)  # at least two of each
    rest, held_out = stratified_split(labels, share, seed)
    assert sorted([*rest, *held_out]) == list(range(len(labels)))
    for label in range(5):
        of_class = (labels == label).sum()
        held = (labels[held_out] == label).sum()
        assert 1 <= held <= of_class - 1
        # The share is rounded to the nearest integer, but each part keeps at least one image.
        assert abs(held - share * of_class) <= 0.5 or held in (1, of_class - 1)
    rest, held_out = stratified_split(labels, 0.0, seed)
    assert (len(rest), len(held_out)) == (len(labels), 0)


def test_a_class_of_two_images_keeps_one_on_either_side():
    """Rounding alone would hold out both images for a share of 0.9, and none for a share of 0.1."""
    labels = np.array([0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    for share, of_larger in ((0.9, 9), (0.1, 1)):
        rest, held_out = stratified_split(labels, share, 0)
        assert np.bincount(labels[held_out]).tolist() == [1, of_larger]
        assert np.bincount(labels[rest]).tolist() == [1, 10 - of_larger]


def test_mixed_seeds_do_not_collide():
    """The lower 31 bits do not collide either, because some generators use only these."""
    seeds = {mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == len({seed % 2**31 for seed in seeds}) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed >> 32 for seed in seeds}) > 7990
