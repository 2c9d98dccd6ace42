"""Count the issue slots of a compiled kernel's hot path in its SASS.

A multiprocessor of an H200 issues 4 warp instructions per clock, and a class pair in bf16 is 8
bytes of traffic. At 61 slots per pair, the kernel reaches at most 90% of the memory bandwidth, and
at 74 slots 75%. The count is the number of instructions on the shortest path through the control
flow graph that computes exponentials and stores gradients. This path takes no branch for masked or
tied rows.
"""

import heapq
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_JUMP = re.compile(r"\b(BRA|EXIT|RET)\b")
_TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")


class Resources(NamedTuple):
    registers: int
    stack: int  # bytes per thread; above 0 means that registers are spilled
    shared: int  # bytes per program


def resources(cubin: bytes) -> Resources:
    text = _cuobjdump("-res-usage", cubin)
    values = (re.search(rf"{key}:(\d+)", text) for key in ("REG", "STACK", "SHARED"))
    return Resources(*(int(value[1]) for value in values if value))


def disassembly(cubin: bytes) -> list[tuple[int, str]]:
    """Return the address and the text of every instruction."""
    return [(int(at, 16), text) for at, text in _INSTRUCTION.findall(_cuobjdump("-sass", cubin))]


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Graph:
    """Basic blocks of one kernel."""

    def __init__(self, code: list[tuple[int, str]]) -> None:
        at = {address: i for i, (address, _) in enumerate(code)}
        starts = {0}
        # Instruction -> (targets, whether execution may continue with the next instruction).
        jumps: dict[int, tuple[list[int], bool]] = {}
        for i, (_, text) in enumerate(code):
            if not _JUMP.search(text):
                continue
            target = _TARGET.search(text) if " BRA" in f" {text}" else None
            targets = [at[int(target[1], 16)]] if target else []
            conditional = text.startswith("@") or "BRA.DIV" in text or "BRA.CONV" in text
            jumps[i] = targets, conditional
            starts |= {i + 1, *targets}
        order = sorted(start for start in starts if start < len(code))
        ends = [*order[1:], len(code)]
        self.blocks = {
            start: [text for _, text in code[start:end]]
            for start, end in zip(order, ends, strict=True)
        }
        self.next: dict[int, list[int]] = {}
        for start, end in zip(order, ends, strict=True):
            targets, falls_on = jumps.get(end - 1, ([], True))
            self.next[start] = targets + ([end] if falls_on and end < len(code) else [])
        self.exits = {
            start
            for start, texts in self.blocks.items()
            if any(re.search(r"\bEXIT\b", text) for text in texts)
        }

    def holds(self, block: int, pattern: str) -> bool:
        return any(re.search(pattern, text) for text in self.blocks[block])

    def shortest(self, start: int, ends: set[int], through: tuple[str, ...]) -> list[int]:
        """Return the blocks of the path from ``start`` to one of ``ends`` that has the fewest
        instructions and contains every pattern. Return an empty list if there is no such path."""

        def seen(block: int, before: int) -> int:
            return before | sum(1 << i for i, p in enumerate(through) if self.holds(block, p))

        everything = (1 << len(through)) - 1
        first = (start, seen(start, 0))
        queue = [(len(self.blocks[start]), first, [start])]
        done = set()
        while queue:
            cost, state, way = heapq.heappop(queue)
            if state in done:
                continue
            done.add(state)
            block, met = state
            if block in ends and met == everything and (len(way) > 1 or start not in ends):
                return way
            for following in self.next[block]:
                then = (following, seen(following, met))
                cost_then = cost + len(self.blocks[following])
                heapq.heappush(queue, (cost_then, then, [*way, following]))
        return []

    def length(self, way: list[int]) -> int:
        return sum(len(self.blocks[block]) for block in way)

    def loops(self) -> list[list[int]]:
        """Return the shortest path through each loop, from its head to the jump back. Inner loops
        are passed once."""
        ways = []
        for block, following in self.next.items():
            for head in following:
                if head <= block:
                    way = [head] if head == block else self.shortest(head, {block}, ())
                    if way:
                        ways.append(way)
        return ways


_EXP, _STORE = r"MUFU\.EX2", r"STG\.E"
_SPILL = re.compile(r"\b(STL|LDL)\b")


def tile_slots(cubin: bytes) -> int:
    """Return the number of instructions that a thread of the tile kernel issues for the rows of one
    program."""
    graph = Graph(disassembly(cubin))
    way = graph.shortest(0, graph.exits, (_EXP, _STORE))
    return graph.length(way)


def spills_in_loops(cubin: bytes) -> int:
    """Return how many instructions of the loops over classes access spilled registers."""
    graph = Graph(disassembly(cubin))
    loops = {tuple(way) for way in _sweeps(graph)}
    return sum(bool(_SPILL.search(x)) for way in loops for b in way for x in graph.blocks[b])


def _sweeps(graph: Graph) -> list[list[int]]:
    """Return the loops that compute exponentials."""
    return [way for way in graph.loops() if any(graph.holds(block, _EXP) for block in way)]


def loop_slots(cubin: bytes) -> tuple[int, int]:
    """Return the number of instructions that a thread of the loop kernel issues per block, in the
    first and in the second sweep."""
    graph = Graph(disassembly(cubin))
    sweeps = _sweeps(graph)
    stores = [any(graph.holds(b, _STORE) for b in way) for way in sweeps]
    lengths = [graph.length(way) for way in sweeps]
    first = min(n for n, s in zip(lengths, stores, strict=True) if not s)
    second = min(n for n, s in zip(lengths, stores, strict=True) if s)
    return first, second
