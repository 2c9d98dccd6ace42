"""Write a self-contained HTML report of runs, without scripts or external resources."""

from bdkd.extras import missing_packages

if message := missing_packages(("numpy",)):
    raise ImportError(message)

from .write import write_report

__all__ = ["write_report"]
