"""Held-out parts, small subsets, wrong labels and noisy pixels: of the data set, not of the run."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdkd.config import DataConfig, check_recipe, load_recipe
from bdkd.data import create_source
from bdkd.data.base import stratified_subset
from bdkd.data.splits import with_label_noise, with_pixel_noise
from bdkd.errors import UsageError

CPU = torch.device("cpu")


def digits(seed: int = 0, **options):
    return create_source(DataConfig(**options), seed, CPU, torch.channels_last).splits


def same(a, b) -> bool:
    return torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)


HARD = {"validation": 0.15, "train_images": 320, "label_noise": 0.2, "pixel_noise": 0.1}


def test_the_hard_digits_are_one_data_set_whatever_the_seed():
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
    assert torch.equal(with_label_noise(labels, 0.0, 5), labels)


def test_fewer_training_images_leave_the_held_out_ones_alone_and_are_nested():
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
    assert with_pixel_noise(grey, 500.0, 255, 0).float().std() > 80  # cut, not wrapped round
    clean, dirty = digits(), digits(pixel_noise=0.2)
    for split in clean:
        assert not torch.equal(clean[split].pixels, dirty[split].pixels)
        assert dirty[split].pixels.max() <= 16


@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.integers(0, 60), st.integers(0, 9))
def test_a_stratified_subset_keeps_the_proportions(labels, count, seed):
    labels = np.array(labels)
    count = min(count, len(labels))
    chosen = stratified_subset(labels, count, seed)
    assert len(set(chosen)) == count
    for label in set(labels):
        exact = (labels == label).sum() * count / len(labels)
        assert abs((labels[chosen] == label).sum() - exact) <= 3


@pytest.mark.parametrize("count", [9, 1296])
def test_a_subset_that_does_not_fit_is_refused(count):
    with pytest.raises(UsageError, match=r"data.train_images must be between 10 .* and 1295"):
        digits(train_images=count)


def test_the_shipped_hard_recipe_is_in_range():
    recipe = load_recipe("digits-hard")
    check_recipe(recipe)
    assert recipe.data.label_noise > 0
