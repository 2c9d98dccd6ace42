"""Settings of the whole suite."""

from hypothesis import settings

# Shared machines are slow at random moments: a deadline would fail for the neighbour's work.
settings.register_profile("bdkd", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("bdkd")
