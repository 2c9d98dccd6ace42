"""Counter-based random numbers for augmentation.

They are a pure function of (seed, epoch, purpose, position in the epoch), so they do not depend on
the number of ranks or workers, and a resumed epoch draws the same numbers.
"""

import numpy as np

from bdkd.data.base import mix_seed


def uniform_draws(
    seed: int, epoch: int, purpose: tuple[int, ...], positions: np.ndarray, count: int
) -> np.ndarray:
    """Return ``count`` uniform numbers in [0, 1) for each image, ``(B, count)`` float64.

    The generator is SplitMix64 (Steele, Lea and Flood, 2014). It computes the numbers of any
    position without those of earlier positions.

    Args:
        purpose: distinguishes independent streams of numbers.
        positions: ``(B,)`` positions of the images in the epoch.
    """
    key = np.uint64(mix_seed(seed, epoch, 3, *purpose))
    counters: np.ndarray = positions.astype(np.uint64)[:, None] * np.uint64(count)
    counters = counters + np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # modulo 2**64
        z = key + counters * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return np.ldexp((z >> np.uint64(11)).astype(np.float64), -53)
