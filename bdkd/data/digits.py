"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images in ten classes, without a download.

Source: E. Alpaydin and C. Kaynak, UCI Optical Recognition of Handwritten Digits, test set.
"""

import torch

from bdkd.config import DataConfig
from bdkd.data.base import stratified_split
from bdkd.data.digest import digest_pixels
from bdkd.data.in_memory import Images, InMemory
from bdkd.data.splits import SPLIT_SEED, make_splits, refuse_image_size
from bdkd.errors import RunError

TEST_SHARE = 0.2
LARGEST_PIXEL = 16


def load(
    config: DataConfig, seed: int, device: torch.device, memory_format: torch.memory_format
) -> InMemory:
    """Load the digits. A fixed fifth of the images is the test set."""
    refuse_image_size(config, "digits", 8)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RunError(
            "the data source 'digits' needs scikit-learn: pip install 'bdkd[train]'"
        ) from error
    data = load_digits()
    pixels = torch.from_numpy(data.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target).to(torch.int64)
    halves = stratified_split(data.target, TEST_SHARE, SPLIT_SEED)
    training, test = (Images(pixels[indices], labels[indices]) for indices in halves)
    return InMemory(
        "digits", make_splits(config, training, test, LARGEST_PIXEL),
        tuple(str(name) for name in data.target_names), config, scale=LARGEST_PIXEL, seed=seed,
        device=device, memory_format=memory_format,
        digests={"train": digest_pixels(*training), "test": digest_pixels(*test)},
    )  # fmt: skip
