"""Generated images, for measuring or testing training without a data set.

Each class has a coarse random pattern. An image is the weak pattern of its class plus strong noise.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from bdkd.config import Bounds
from bdkd.data.base import SourceContext, register_source
from bdkd.data.digest import digest_text
from bdkd.data.in_memory import Images, InMemory, InMemoryConfig
from bdkd.data.splits import SPLIT_SEED, in_memory_source
from bdkd.errors import UsageError

SIDE, CHANNELS = 32, 3
COARSE = 4  # cells per side of a pattern
PATTERN, NOISE = 24.0, 48.0  # standard deviations, of 255


@dataclass(frozen=True)
class SyntheticConfig(InMemoryConfig):
    """Options of the source synthetic."""

    images: int = 10_000
    """Number of training images, including validation images. The test set has a fifth as many."""
    classes: Annotated[int, Bounds(ge=2)] = 10
    """Number of classes."""

    def check(self) -> None:
        if self.images < 10 * self.classes:
            raise UsageError(
                f"data.images must be at least 10 times data.classes ({self.classes}), got "
                f"{self.images}"
            )


@register_source("synthetic", SyntheticConfig, reads="nothing: random images, to time training")
def load(config: SyntheticConfig, context: SourceContext) -> InMemory:
    """Generate ``data.images`` training images and a fifth as many test images.

    The images do not depend on the seed. Processors without AVX2 round a few pixels differently.
    """
    side = config.image_size or SIDE
    # On the CPU, because generators of other devices draw other numbers.
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    coarse = torch.randn(config.classes, CHANNELS, COARSE, COARSE, generator=generator)
    patterns = 128 + PATTERN * nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    training = _images(patterns, config.images, generator)
    test = _images(patterns, config.images // 5, generator)
    definition = f"synthetic {config.classes} {side}"
    return in_memory_source(
        training, test, tuple(map(str, range(config.classes))), config, context,
        # Digests of pixels would differ between processors (see above).
        digests={"train": digest_text(definition, config.images),
                 "test": digest_text(definition, config.images // 5)},
    )  # fmt: skip


def _images(patterns: Tensor, count: int, generator: torch.Generator) -> Images:
    """Generate images of the classes in turn, given the patterns ``(classes, C, H, W)``."""
    labels = torch.arange(count) % len(patterns)
    pixels = torch.empty(count, *patterns.shape[1:], dtype=torch.uint8)
    for place, part in zip(pixels.split(1000), labels.split(1000), strict=True):
        noise = torch.randn(place.shape, generator=generator)
        place.copy_((patterns[part] + NOISE * noise).clamp(0, 255))
    return Images(pixels, labels)
