"""Settings of the whole suite."""

import copy
import sys

import pytest
from hypothesis import settings

# No deadline, because other work on a shared machine can slow down a test at any time.
settings.register_profile("bdkd", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("bdkd")


def pytest_collection_modifyitems(config, items):
    """Deselect tests with the mark ``soak`` unless ``-m`` names it."""
    if "soak" in config.option.markexpr:
        return
    chosen = [item for item in items if item.get_closest_marker("soak") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="module")
def without_figures():
    """Disable the figures of runs, because drawing takes longer than training a tiny recipe."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("reliability_diagram", "training_curves"):
            patch.setattr(f"bdkd.runs.summary.{name}", lambda *_: None)
        yield


@pytest.fixture
def registries(monkeypatch):
    """Remove everything that a test registers after the test."""
    from bdkd import plugins
    from bdkd.metrics import METRICS
    from bdkd.models.registry import MODELS
    from bdkd.registry import SELECTIONS

    for registry in (MODELS, METRICS, *SELECTIONS):
        registry.load()
        for table in ("_items", "_owners"):
            monkeypatch.setattr(registry, table, copy.copy(getattr(registry, table)))
    monkeypatch.setattr(plugins, "_named", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.split(".")[0] == "my_plugin":
            del sys.modules[name]
