"""Data sets for the tests of this folder. A test that changes files uses a copy."""

import shutil
from pathlib import Path

import pytest
from imagenet_trees import make_tars, make_tfrecords, make_tree


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Use an empty cache, and return the folder of bdkd in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bdkd"


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """5 classes of 24 training and 5 validation images."""
    return make_tree(tmp_path_factory.mktemp("imagenet") / "tree", 5, 24, 5)


@pytest.fixture(scope="session")
def tars(tree) -> Path:
    return make_tars(tree, tree.parent / "tars", 3)


@pytest.fixture(scope="session")
def tfrecords(tree) -> Path:
    return make_tfrecords(tree, tree.parent / "tfrecords", 3)


@pytest.fixture
def copy(tree, tmp_path) -> Path:
    """A copy of the tree that a test may change."""
    return shutil.copytree(tree, tmp_path / "copy")
