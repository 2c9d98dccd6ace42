"""The native CPU kernel: every case and edge row of the contract, on every instruction set here."""

import pytest
from cases import CASES, judge
from edges import EDGES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case):
    judge(case, "native")


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edge(edge):
    edge("native")
