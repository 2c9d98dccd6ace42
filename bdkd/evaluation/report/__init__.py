"""One self-contained HTML page of finished or running runs: no script, nothing from outside."""

from bdkd.extras import missing_packages

if message := missing_packages(("numpy",)):
    raise ImportError(message)

from .write import write_report

__all__ = ["write_report"]
