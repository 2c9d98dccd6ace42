"""Fixtures with timm and torchvision, also if torchvision was built for another torch."""

import importlib

import pytest
from vision import mended_torchvision


@pytest.fixture(scope="session")
def torchvision():
    """Return the module torchvision, or skip the test if it is not installed."""
    return _library("torchvision")


@pytest.fixture(scope="session")
def timm(torchvision):  # timm imports torchvision
    return _library("timm")


def _library(name):
    mended_torchvision()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} is not installed: {error}")
