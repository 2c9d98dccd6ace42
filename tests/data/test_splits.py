"""Held-out images, subsets, wrong labels and pixel noise belong to the data set, not to the run."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdkd.config import load_recipe
from bdkd.data import create_source
from bdkd.data.base import stratified_split, stratified_subset
from bdkd.data.splits import with_label_noise, with_pixel_noise
from bdkd.errors import UsageError
from bdkd.registry import SOURCES

CPU = torch.device("cpu")


def digits(seed: int = 0, **options):
    return create_source(
        SOURCES.configure("digits", **options), seed, CPU, torch.channels_last
    ).splits


def same(a, b) -> bool:
    return torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)


HARD = {"validation": 0.15, "train_images": 320, "label_noise": 0.2, "pixel_noise": 0.1}


def test_the_hard_digits_do_not_depend_on_the_seed():
    first, second = digits(0, **HARD), digits(1, **HARD)
    assert all(same(first[split], second[split]) for split in first)
    assert {split: len(images.labels) for split, images in first.items()} == {
        "train": 320, "val": 216, "test": 359,
    }  # fmt: skip


def test_only_training_labels_are_wrong_and_exactly_their_share():
    clean = digits(**HARD | {"label_noise": 0.0})
    noisy = digits(**HARD)
    assert torch.equal(clean["train"].pixels, noisy["train"].pixels)
    assert (clean["train"].labels != noisy["train"].labels).sum() == 64
    assert same(clean["val"], noisy["val"])
    assert same(clean["test"], noisy["test"])


def test_wrong_labels_are_any_other_class_with_equal_chance():
    labels = torch.arange(20_000) % 5
    noisy = with_label_noise(labels, 1.0, 5)
    moved = (noisy - labels) % 5
    assert (moved != 0).all()
    assert (moved.bincount(minlength=5)[1:] / 20_000 - 0.25).abs().max() < 0.02
    assert torch.equal(labels, torch.arange(20_000) % 5)  # the input is unchanged
    assert torch.equal(with_label_noise(labels, 0.0, 5), labels)
    half = with_label_noise(labels, 0.5, 5) != labels
    assert half.sum() == 10_000
    assert 0.48 < half[:10_000].double().mean() < 0.52  # everywhere: files may be sorted by class
    assert (with_label_noise(labels[:9], 0.3, 5) != labels[:9]).sum() == 3  # 2.7, rounded


def test_wrong_labels_do_not_depend_on_the_global_random_state():
    labels, found = torch.arange(100) % 5, []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(with_label_noise(labels, 0.5, 5))
    assert torch.equal(*found)


def test_training_subsets_are_nested_and_do_not_change_held_out_images():
    whole, few, fewer = digits(), digits(train_images=200), digits(train_images=100)
    assert same(whole["val"], few["val"])
    assert same(whole["test"], few["test"])
    rows = [{bytes(p.numpy()) for p in part["train"].pixels} for part in (whole, few, fewer)]
    assert rows[2] < rows[1] < rows[0]
    assert few["train"].labels.bincount().min() >= 18


def test_pixel_noise_has_its_deviation_and_differs_between_the_splits():
    grey = torch.full((2_500, 1, 8, 8), 128, dtype=torch.uint8)
    noisy = with_pixel_noise(grey, 10.0, 255, 0)
    assert noisy.float().mean().item() == pytest.approx(128, abs=0.2)
    assert noisy.float().std().item() == pytest.approx(10, abs=0.1)
    assert not torch.equal(noisy[:1000], noisy[1000:2000])
    assert not torch.equal(noisy, with_pixel_noise(grey, 10.0, 255, 1))
    assert with_pixel_noise(grey, 500.0, 255, 0).float().std() > 80  # clipped, not wrapped around
    clean, dirty = digits(), digits(pixel_noise=0.1)
    noise, grey = {}, {}
    for split in clean:
        assert dirty[split].pixels.max() == 16
        assert torch.equal(clean[split].labels, dirty[split].labels)
        noise[split] = dirty[split].pixels.double() - clean[split].pixels.double()
        grey[split] = (clean[split].pixels - 8).abs().lt(2) | (clean[split].pixels == 7)
        # A tenth of the largest pixel value, 16. Pixels from 7 to 9 are five deviations from it;
        # rounding adds 1/12 to the variance.
        deviation = noise[split][grey[split]].std().item()
        assert deviation == pytest.approx((1.6**2 + 1 / 12) ** 0.5, rel=0.1)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        count = min(len(noise[one]), len(noise[other]))
        both = grey[one][:count] & grey[other][:count]
        equal = (noise[one][:count] == noise[other][:count])[both].double().mean()
        assert equal < 0.3  # a sixth is expected by chance


@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.integers(0, 60), st.integers(0, 9))
def test_a_stratified_subset_keeps_the_proportions(labels, count, seed):
    labels = np.array(labels)
    count = min(count, len(labels))
    chosen = stratified_subset(labels, count, seed)
    assert len(set(chosen)) == count
    for label in set(labels):
        exact = (labels == label).sum() * count / len(labels)
        assert abs((labels[chosen] == label).sum() - exact) <= 3


def test_a_small_subset_may_lack_rare_classes():
    """One class has 100 images, and four classes have one image each. Four images are all of the
    first class."""
    labels = np.repeat(np.arange(5), [1, 1, 100, 1, 1])
    assert labels[stratified_subset(labels, 4, 0)].tolist() == [2] * 4


def test_subsets_and_held_out_images_depend_on_their_seed_and_are_sorted():
    """They are drawn from the whole class, because files of a class are often sorted by the time or
    the place of the photo."""
    labels = np.repeat(np.arange(2), 1000)
    for draw in (
        lambda seed: stratified_subset(labels, 400, seed),
        lambda seed: stratified_split(labels, 0.2, seed)[1],
    ):
        one, again, other = draw(0), draw(0), draw(1)
        assert np.array_equal(one, again)
        assert len(one) == 400
        assert (np.diff(one) > 0).all()
        assert (one % 1000).mean() == pytest.approx(500, abs=45)  # three deviations
        assert 40 < len(np.intersect1d(one, other)) < 120  # 80 are expected by chance
    rest, _ = stratified_split(labels, 0.2, 0)
    assert (np.diff(rest) > 0).all()


@pytest.mark.parametrize("count", [10, 1295])
def test_a_subset_may_have_one_image_per_class_or_all_training_images(count):
    labels = digits(train_images=count)["train"].labels
    assert len(labels) == count
    assert labels.bincount(minlength=10).min() > 0.09 * count


@pytest.mark.parametrize("count", [9, 1296])
def test_a_subset_that_does_not_fit_is_refused(count):
    with pytest.raises(UsageError, match=r"data.train_images must be between 10 .* and 1295"):
        digits(train_images=count)


def test_the_shipped_hard_recipe_is_in_range():
    recipe = load_recipe("digits-hard")
    assert recipe.data.label_noise > 0
