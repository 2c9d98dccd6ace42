"""A pytest plugin: tell coverage which test runs, and write down how long each one took."""

import json
import os
from collections import defaultdict

import pytest

_seconds: dict[str, float] = defaultdict(float)
_not_passed: set[str] = set()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    import coverage

    measuring = coverage.Coverage.current()
    if measuring:
        measuring.switch_context(item.nodeid)
    yield
    if measuring:
        measuring.switch_context("")


def pytest_runtest_logreport(report):
    _seconds[report.nodeid] += report.duration
    if report.outcome != "passed":
        _not_passed.add(report.nodeid)


def pytest_sessionfinish():
    passed = {test: round(t, 3) for test, t in _seconds.items() if test not in _not_passed}
    with open(os.environ["MUTATION_TIMES"], "w", encoding="utf-8") as file:
        json.dump(passed, file)
