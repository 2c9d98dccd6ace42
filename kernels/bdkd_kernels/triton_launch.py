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
def choose(classes: int, itemsize: int, aligned: bool, tile_classes: int = TILE_CLASSES):
    """The launch for rows of ``classes``; ``itemsize`` is the larger of both networks', in bytes,
    and ``aligned`` says that every row begins at 16 bytes."""
    if classes == 1:
        return Tile(128, 1, 4)
    block = max(16, block_of(classes))
    if classes <= tile_classes:
        if block <= 256:
            # Several rows, 4 pairs a thread: with 8, a thread of 10 classes holds the values of 8
            # rows, and spills.
            return Tile(512 // block, block, 4)
        # 32 pairs a thread: a thread's instructions for its row count half as much a pair as with
        # 16, and at 1024 classes no value crosses a warp.
        return Tile(1, block, max(1, block // 1024))
    # A row of both networks waits in L2 for its second sweep: few rows at a time where they are
    # long. 132 multiprocessors with one row each of 65536 bf16 classes hold 35 MB. Copies of single
    # logits, as in rows that are not aligned, cost more slots than their latency.
    warps = 8 if classes <= 16384 else 16
    if aligned:
        return Loop(32 * warps, 16 // itemsize, False, 3, warps)
    return Loop(32 * warps, 8, True, 1, warps)
