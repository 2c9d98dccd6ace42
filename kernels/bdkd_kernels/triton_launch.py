"""Which kernel, and in what shape, serves a number of classes.

Chosen from the compiled code, for sm_90, bf16, temperature 4 (``bench/compiled.py`` prints it):
registers decide how many programs a multiprocessor holds, issue slots a class pair whether it can
keep up with its memory (docs/triton-kernel.md). ``bench/autotune.py`` prints this table anew from
measurements on a GPU.
"""

from dataclasses import dataclass
from functools import lru_cache

# Up to this many classes both rows stay in registers; beyond, a row is read in blocks, twice.
# 32 class pairs a thread take up to 254 registers: at 4096 classes two programs fit on a
# multiprocessor and hide each other's loads, at 8192 one.
TILE_CLASSES = 4096


@dataclass(frozen=True)
class Tile:
    """Rows in registers: (rows, block) class pairs a program."""

    rows: int
    block: int  # classes, padded to a power of two
    beside: int  # neighbouring classes that the threads of a row take at a time
    warps: int

    @property
    def chunk(self) -> int:
        """Classes a block where a row is read again (masked classes, tied maxima)."""
        return min(self.block, 32 * self.warps)


@dataclass(frozen=True)
class Loop:
    """One row a program, in blocks of lanes * each class pairs."""

    lanes: int
    each: int  # classes a lane takes of a block
    apart: bool  # its classes are `lanes` apart, not beside each other
    stages: int  # 3: two blocks are on their way while one is worked on
    warps: int

    @property
    def block(self) -> int:
        return self.lanes * self.each


def block_of(classes: int) -> int:
    """The next power of two."""
    return 1 << (classes - 1).bit_length()


@lru_cache(maxsize=256)
def choose(classes: int, itemsize: int, vector: int, tile_classes: int = TILE_CLASSES):
    """The launch for rows of ``classes``; ``itemsize`` is the larger of both networks', in bytes,
    and ``vector`` how many neighbouring logits one access may take."""
    if classes == 1:
        return Tile(128, 1, 1, 4)
    block = max(16, block_of(classes))
    if classes <= tile_classes:
        # Every thread of a row computes the row's own values: so they are few, with 32 pairs each,
        # and less where these would spill. To 1024 classes a program is one warp, and no value
        # crosses it.
        pairs = 32 if block > 128 or (block == 128 and vector > 2) else 16
        if block <= 32 and vector == 1:
            pairs = 8
        threads = block // pairs  # of a row
        if threads < 32:
            return Tile(32 // threads, block, threads * vector, 1)
        return Tile(1, block, block, threads // 32)
    # A row of both networks waits in L2 for its second sweep: few rows at a time where they are
    # long. 132 multiprocessors with one row each of 65536 bf16 classes hold 35 MB. Copies of single
    # logits, as in rows that are not aligned, cost more slots than their latency.
    warps = 8 if classes <= 16384 else 16
    if vector * itemsize == 16:
        return Loop(32 * warps, 16 // itemsize, False, 3, warps)
    return Loop(32 * warps, 8, True, 1, warps)
