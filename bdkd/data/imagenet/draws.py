"""Random numbers of an image's augmentation: a pure function of (seed, epoch, purpose, place in the
epoch). So they are the same on any number of ranks and workers, and in a resumed epoch."""

import numpy as np

from bdkd.data.base import mix_seed


def draws(
    seed: int, epoch: int, purpose: tuple[int, ...], places: np.ndarray, count: int
) -> np.ndarray:
    """Uniform numbers in [0, 1), ``(B, count)`` float64, of the images at ``places`` (B,).

    By the counter-based generator SplitMix64 (Steele, Lea and Flood, 2014): the numbers of any
    place without those before it, and of all images at once.
    """
    key = np.uint64(mix_seed(seed, epoch, 3, *purpose))
    counters: np.ndarray = places.astype(np.uint64)[:, None] * np.uint64(count)
    counters = counters + np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # modulo 2**64
        z = key + counters * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return np.ldexp((z >> np.uint64(11)).astype(np.float64), -53)
