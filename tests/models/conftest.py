"""timm and torchvision for the tests, also where torchvision was built for another torch."""

import importlib

import pytest
import torch


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, or a skip that says why.

    Beside a torch it was not built for, its operators are missing and its import fails at the
    first. Its networks need none of them: declaring two is enough. Users get a clear line instead.
    """
    return _library("torchvision")


@pytest.fixture(scope="session")
def timm(torchvision):  # which timm imports
    return _library("timm")


def _library(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} is not installed: {error}")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", signature)
    return importlib.import_module(name)
