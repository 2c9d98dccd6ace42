"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images, ten classes, no download.

Source: E. Alpaydin and C. Kaynak, UCI Optical Recognition of Handwritten Digits, its test part.
"""

import torch

from bdkd.config import DataConfig
from bdkd.data.base import Split, stratified_split
from bdkd.data.in_memory import Images, InMemory
from bdkd.errors import RunError

# Which images are test and validation images never changes with the run's seed: runs of several
# seeds are compared on the same images.
SPLIT_SEED = 0
TEST_SHARE = 0.2
LARGEST_PIXEL = 16.0


def load(
    config: DataConfig, seed: int, device: torch.device, memory_format: torch.memory_format
) -> InMemory:
    """The digits, a fixed fifth of them the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RunError(
            "the data source 'digits' needs scikit-learn: pip install 'bdkd[train]'"
        ) from error
    data = load_digits()
    training, test = stratified_split(data.target, TEST_SHARE, SPLIT_SEED)
    inner, validation = stratified_split(data.target[training], config.validation, SPLIT_SEED)
    indices: dict[Split, object] = {
        "train": training[inner],
        "val": training[validation],
        "test": test,
    }
    splits = {
        split: Images(
            torch.from_numpy(data.images[index]).to(torch.uint8)[:, None],
            torch.from_numpy(data.target[index]).to(torch.int64),
        )
        for split, index in indices.items()
    }
    return InMemory(
        "digits", splits, tuple(str(name) for name in data.target_names),
        scale=LARGEST_PIXEL, shift=config.shift, flip=config.flip, seed=seed, device=device,
        memory_format=memory_format,
    )  # fmt: skip
