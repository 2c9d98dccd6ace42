"""Create the source ``imagenet`` with small images."""

import torch

from bdkd.data import create_source
from bdkd.registry import SOURCES


def imagenet(root, seed=0, dtype=torch.float32, **options):
    # By default, Pillow decodes in this process, because workers are slow to start.
    options = {"image_size": 64, "workers": 0, "flip": True, "loader": "pillow"} | options
    config = SOURCES.configure("imagenet", root=str(root), **options)
    return create_source(config, seed, torch.device("cpu"), torch.channels_last, dtype)
