"""Run the suites with the statistics and comparison of pytest-benchmark::

    pytest bench --benchmark-only [-k loss_cpu] [--benchmark-json FILE] [--benchmark-autosave]
    pytest-benchmark compare

Each kind of case runs once, at its quick size. ``python bench`` measures the real sizes.
"""

from collections.abc import Callable

import machine
import pytest
import torch
from suites import SUITES, Settings, cannot_run, device_of


def _pairs(name: str):
    """Yield each case of a suite with each of its contenders."""
    device = device_of(name)
    settings = Settings(device, machine.last_level_cache(device), quick=True)
    for make in SUITES[name][1](settings):
        case = make()
        for contender in case.contenders:
            yield case, contender


def _turning(call: Callable[[int], object], sets: int) -> Callable[[], object]:
    turn = iter(range(10**12))
    on_gpu = torch.cuda.is_available()

    def once() -> object:
        result = call(next(turn) % sets)
        if on_gpu:
            torch.cuda.synchronize()
        return result

    return once


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "suite_case" not in metafunc.fixturenames:
        return
    found = []
    for name in SUITES:
        if reason := cannot_run(name):
            found.append(pytest.param(None, None, id=name, marks=pytest.mark.skip(reason=reason)))
            continue
        for case, contender in _pairs(name):
            found.append(pytest.param(case, contender, id=f"{name}-{case.name}-{contender.name}"))
    metafunc.parametrize(("suite_case", "contender"), found)


def test_contender(benchmark, suite_case, contender):
    benchmark.group = suite_case.name
    benchmark.extra_info.update(
        note=contender.note, bytes=contender.bytes,
        error=dict(contender.error()) if contender.error else None,
    )  # fmt: skip
    benchmark(_turning(contender.call, suite_case.sets))
