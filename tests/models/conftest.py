"""timm and torchvision for the tests, also where torchvision was built for another torch."""

import importlib

import pytest
from vision import mended_torchvision


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, or a skip that says why. Users for whom it does not import get a clear line."""
    return _library("torchvision")


@pytest.fixture(scope="session")
def timm(torchvision):  # which timm imports
    return _library("timm")


def _library(name):
    mended_torchvision()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} is not installed: {error}")
