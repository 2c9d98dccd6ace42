"""The source imagenet as the tests of this folder create it."""

import torch

from bdkd.data import create_source
from bdkd.registry import SOURCES


def imagenet(root, seed=0, dtype=torch.float32, **options):
    # Pillow decodes in this process, but where its workers are the point: they take a while to come
    options = {"image_size": 64, "workers": 0, "flip": True, "loader": "pillow"} | options
    config = SOURCES.configure("imagenet", root=str(root), **options)
    return create_source(config, seed, torch.device("cpu"), torch.channels_last, dtype)
