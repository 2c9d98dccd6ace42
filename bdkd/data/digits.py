"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images in ten classes, without a download.

Source: E. Alpaydin and C. Kaynak, UCI Optical Recognition of Handwritten Digits, test set.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

from bdkd.data.base import SourceContext, register_source, stratified_split
from bdkd.data.in_memory import Images, InMemory, InMemoryConfig
from bdkd.data.splits import SPLIT_SEED, in_memory_source
from bdkd.errors import RunError

TEST_SHARE = 0.2
LARGEST_PIXEL = 16
INSTALL = "pip install 'bdkd[train]'"


def _missing(root: Path) -> str:
    return "" if find_spec("sklearn") else f"scikit-learn is not installed: {INSTALL}"


@register_source(
    "digits", InMemoryConfig, reads="scikit-learn's 1,797 handwritten digits of 8x8 pixels",
    missing=_missing,
)  # fmt: skip
def load(config: InMemoryConfig, context: SourceContext) -> InMemory:
    """Load the digits. A fixed fifth of the images is the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RunError(f"the data source 'digits' needs scikit-learn: {INSTALL}") from error
    data = load_digits()
    pixels = torch.from_numpy(data.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target).to(torch.int64)
    halves = stratified_split(data.target, TEST_SHARE, SPLIT_SEED)
    training, test = (Images(pixels[indices], labels[indices]) for indices in halves)
    classes = [str(name) for name in data.target_names]
    return in_memory_source(training, test, classes, config, context, largest_pixel=LARGEST_PIXEL)
