"""Test the file of predictions of a run: the images with features, and the checks of its
content."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdkd.evaluation.predictions import (
    NetworkPredictions,
    Predictions,
    featured_images,
    read_predictions,
    to_bytes,
)


@given(st.integers(0, 2**32 - 1), st.integers(1, 25), st.integers(0, 2000))
def test_features_of_fifty_images_of_each_of_the_first_ten_classes_are_saved(seed, classes, count):
    """Labels are in any order. Classes without images are skipped."""
    rng = np.random.default_rng(seed)
    target = rng.choice(rng.permutation(100)[:classes], count)
    seen = sorted(set(target.tolist()))[:10]
    expected = [
        i for i, label in enumerate(target)
        if label in seen and (target[:i] == label).sum() < 50
    ]  # fmt: skip
    assert featured_images(target).tolist() == expected


def some(count: int = 12, kept: tuple[int, ...] = (0, 3, 11)) -> Predictions:
    """Return two networks that are not in alphabetical order. One of them has features."""
    rng = np.random.default_rng(0)

    def network(features) -> NetworkPredictions:
        return NetworkPredictions(
            rng.random(count), rng.random(count).astype(np.float32), rng.integers(0, 3, count),
            features,
        )  # fmt: skip

    features = rng.normal(size=(len(kept), 4)).astype(np.float16)
    networks = {"student": network(None), "a": network(features)}
    classes = ("z", "ä", "m")
    return Predictions(classes, rng.integers(0, 3, count), np.array(kept, np.int64), networks)


def test_a_file_contains_the_predictions_of_every_network(tmp_path):
    given, path = some(), tmp_path / "predictions.safetensors"
    path.write_bytes(to_bytes(given))
    read = read_predictions(path)
    assert (read.classes, list(read.networks)) == (("z", "ä", "m"), ["student", "a"])
    np.testing.assert_array_equal(read.target, given.target)
    np.testing.assert_array_equal(read.featured, given.featured)
    for name, network in given.networks.items():
        for field in dataclasses.fields(network):
            came, was = (getattr(n, field.name) for n in (read.networks[name], network))
            np.testing.assert_array_equal(came, was)
            assert getattr(came, "dtype", None) == getattr(was, "dtype", None)
        np.testing.assert_array_equal(read.correct(name), network.predicted == given.target)


def test_inconsistent_arrays_are_refused(tmp_path):
    path, good = tmp_path / "predictions.safetensors", some()
    for index in (-1, 12):
        path.write_bytes(to_bytes(dataclasses.replace(good, featured=np.array([0, 3, index]))))
        with pytest.raises(ValueError, match="featured images are out of range"):
            read_predictions(path)
    path.write_bytes(to_bytes(some(kept=(11,))))  # the last image may be one of them
    read_predictions(path)
    network = good.networks["a"]
    for field in ("confidence", "entropy", "predicted", "features"):
        values = getattr(network, field)
        for wrong in (values[:-1], np.concatenate((values, values[:1])), values[..., None]):
            broken = dataclasses.replace(network, **{field: wrong})
            networks = good.networks | {"a": broken}
            path.write_bytes(to_bytes(dataclasses.replace(good, networks=networks)))
            with pytest.raises(ValueError, match="'a' has"):
                read_predictions(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, "cut"])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "predictions.safetensors"
    path.write_bytes(to_bytes(some())[:-5] if content == "cut" else content)
    with pytest.raises(ValueError, match="contains no predictions of a run"):
        read_predictions(path)
