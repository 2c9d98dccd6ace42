"""Settings of the whole suite."""

import pytest
from hypothesis import settings

# Shared machines are slow at random moments: a deadline would fail for the neighbour's work.
settings.register_profile("bdkd", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("bdkd")


def pytest_collection_modifyitems(config, items):
    """Long soaks run where they are asked for by name (``-m soak``) and not otherwise."""
    if "soak" in config.option.markexpr:
        return
    chosen = [item for item in items if item.get_closest_marker("soak") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="module")
def without_figures():
    """Runs in this process draw no figures, which takes longer than training the tiny recipe."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("reliability_diagram", "training_curves"):
            patch.setattr(f"bdkd.runs.summary.{name}", lambda *_: None)
        yield
