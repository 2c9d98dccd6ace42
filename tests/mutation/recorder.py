"""A pytest plugin that tells coverage which test runs, and records the duration of each test.

Fixtures of classes, modules and sessions are measured under their own names, because the lines that
they run belong to all tests that use them, not only to the first.
"""

import json
import os
from collections import defaultdict

import pytest

_seconds: dict[str, float] = defaultdict(float)
_not_passed: set[str] = set()
_fixtures: dict[str, list[str]] = {}


def _switch(name: str) -> None:
    import coverage

    if measuring := coverage.Coverage.current():
        measuring.switch_context(name)


def _name(fixture) -> str:
    return f"fixture {fixture.baseid}::{fixture.argname}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    known = getattr(item, "_fixtureinfo", None)
    _fixtures[item.nodeid] = [
        _name(fixture)
        for fixtures in (known.name2fixturedefs.values() if known else ())
        for fixture in fixtures
        if fixture.scope != "function"
    ]
    _switch(item.nodeid)
    yield
    _switch("")


@pytest.hookimpl(hookwrapper=True)
def pytest_fixture_setup(fixturedef, request):
    if fixturedef.scope == "function":
        yield
        return
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    os.environ["PYTEST_CURRENT_TEST"] = _name(fixturedef)  # for processes that the fixture starts
    _switch(_name(fixturedef))
    yield
    os.environ["PYTEST_CURRENT_TEST"] = test
    _switch(test.rsplit(" (", 1)[0])


def pytest_runtest_logreport(report):
    _seconds[report.nodeid] += report.duration
    if report.outcome != "passed":
        _not_passed.add(report.nodeid)


def pytest_sessionfinish():
    passed = {test: round(t, 3) for test, t in _seconds.items() if test not in _not_passed}
    written = {"seconds": passed, "fixtures": {test: _fixtures.get(test, []) for test in passed}}
    with open(os.environ["MUTATION_TIMES"], "w", encoding="utf-8") as file:
        json.dump(written, file)
