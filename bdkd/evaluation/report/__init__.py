"""One self-contained HTML page of finished or running runs: no script, nothing from outside."""

from .write import write_report

__all__ = ["write_report"]
