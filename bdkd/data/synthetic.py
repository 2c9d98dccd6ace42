"""Generated images, for measuring or testing training without a data set.

Each class has a coarse random pattern. An image is the weak pattern of its class plus strong noise.
"""

import torch
from torch import Tensor, nn

from bdkd.config import DataConfig
from bdkd.data.digest import digest_text
from bdkd.data.in_memory import Images, InMemory
from bdkd.data.splits import SPLIT_SEED, make_splits

SIDE, CHANNELS = 32, 3
COARSE = 4  # cells per side of a pattern
PATTERN, NOISE = 24.0, 48.0  # standard deviations, of 255


def load(
    config: DataConfig, seed: int, device: torch.device, memory_format: torch.memory_format
) -> InMemory:
    """Generate ``data.synthetic.images`` training images and a fifth as many test images.

    The images do not depend on the seed. Processors without AVX2 round a few pixels differently.
    """
    options, side = config.synthetic, config.image_size or SIDE
    # On the CPU, because generators of other devices draw other numbers.
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    coarse = torch.randn(options.classes, CHANNELS, COARSE, COARSE, generator=generator)
    patterns = 128 + PATTERN * nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    training = _images(patterns, options.images, generator)
    test = _images(patterns, options.images // 5, generator)
    definition = f"synthetic {options.classes} {side}"
    return InMemory(
        "synthetic", make_splits(config, training, test, 255),
        tuple(map(str, range(options.classes))), config, scale=255, seed=seed, device=device,
        memory_format=memory_format,
        # Digests of pixels would differ between processors (see above).
        digests={"train": digest_text(definition, options.images),
                 "test": digest_text(definition, options.images // 5)},
    )  # fmt: skip


def _images(patterns: Tensor, count: int, generator: torch.Generator) -> Images:
    """Draw images of the classes in turn; the patterns are ``(classes, C, H, W)``."""
    labels = torch.arange(count) % len(patterns)
    pixels = torch.empty(count, *patterns.shape[1:], dtype=torch.uint8)
    for place, part in zip(pixels.split(1000), labels.split(1000), strict=True):
        noise = torch.randn(place.shape, generator=generator)
        place.copy_((patterns[part] + NOISE * noise).clamp(0, 255))
    return Images(pixels, labels)
