"""The launch table: the kernel and its shape for each number of classes.

It follows from measurements on an H200. Those for 513 classes and more are in
``bench/results/2026-11-26-gpu-h200`` (``stage1-run3.jsonl``). Those for fewer classes are in
``bench/results/2026-11-27-gpu-h200`` (``autotune.txt``): 10, 100 and 500 classes were measured, and
the other shapes were chosen by analogy. The number of warps that fit on a multiprocessor matters
more than issue slots. ``bench/autotune.py`` measures again and prints a new table.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

# Up to this many classes, both rows stay in registers. Longer rows are read twice, in blocks.
TILE_CLASSES = 4096


@dataclass(frozen=True)
class Loop:
    """One row per program, in blocks of (outer, lanes, inner) class pairs.

    A lane loads ``inner`` neighbouring classes in one access, ``outer`` times per block.
    """

    warps: int
    inner: int
    outer: int = 1
    prefetch: int = 0  # blocks that are loaded into registers ahead of their arithmetic
    shifted: bool = False  # align the accesses of rows that are not aligned; see `choose`
    lanes: int = 0  # 0: one per thread
    registers: int = 0  # at most, per thread, on NVIDIA; 0: the compiler's choice

    def __post_init__(self) -> None:
        if not self.lanes:
            object.__setattr__(self, "lanes", 32 * self.warps)

    @property
    def block(self) -> int:
        return self.outer * self.lanes * self.inner

    def of_row(self, classes: int) -> "Loop":
        """Return this launch, without prefetching if rows are too short for it."""
        return self if classes >= self.block + 2 * self.inner else replace(self, prefetch=0)


@dataclass(frozen=True)
class Tile:
    """Rows that stay in registers: (rows, block) class pairs per program."""

    rows: int
    block: int  # classes, padded to a power of two
    inner: int  # neighbouring classes that the threads of a row take at a time
    warps: int
    registers: int = 255  # at most, per thread, on NVIDIA

    @property
    def outer(self) -> int:
        return self.block // self.inner

    @property
    def chunk(self) -> int:
        """Classes per block when a row is read again (masked classes, tied maxima)."""
        return min(self.block, 32 * self.warps)

    @property
    def retry(self) -> Loop:
        """The shape in which a program recomputes a row with masked classes."""
        return Loop(self.warps, inner=1, lanes=self.chunk)


def block_of(classes: int) -> int:
    """Return the next power of two."""
    return 1 << (classes - 1).bit_length()


@lru_cache(maxsize=256)
def choose(
    classes: int,
    itemsize: int,
    vector: int,
    shifted: bool = False,
    tile_classes: int = TILE_CLASSES,
) -> Tile | Loop:
    """Return the launch for rows of ``classes``.

    Args:
        itemsize: Bytes of a logit, the larger of both networks'.
        vector: How many neighbouring logits one access may load.
        shifted: Whether each row has the same offset from a 16-byte aligned address in all tensors,
            so that the same classes can be loaded and stored 16 bytes at a time.
    """
    if classes == 1:
        return Tile(128, 1, 1, 4)
    block = max(16, block_of(classes))
    if classes <= tile_classes:
        if block > 512:
            # Each warp waits for its own logits, so many warps must be resident: 16 fit on a
            # multiprocessor with 128 registers, 24 with 80.
            warps = block // (512 if itemsize == 2 else 256)
            registers = 255 if itemsize == 8 else 80 if itemsize == 4 and warps < 16 else 128
            return Tile(1, block, block, warps, registers)
        # One warp per program. Few pairs per thread leave room for many warps per multiprocessor.
        if block <= 64:
            threads = block // 4  # of a row
            return Tile(32 // threads, block, min(block, threads * vector), 1)
        if itemsize == 8:
            return Tile(1, block, block, 2 if block == 512 else 1)
        return Tile(1, block, block, 1, 80 if block == 128 else 128)
    if vector * itemsize < 16 and not shifted:
        return Loop(8, 1, outer=8)
    # Both networks' rows stay in L2 for the second sweep, so few long rows may be in progress at
    # once. With 64 registers, 32 warps fit on a multiprocessor. With 80 registers, 24 warps fit.
    warps, registers = (8, 80) if 2 * classes * itemsize <= 96 * 1024 else (16, 64)
    return Loop(warps, 16 // itemsize, prefetch=1, shifted=vector * itemsize < 16,
                registers=0 if itemsize == 8 else registers)  # fmt: skip
