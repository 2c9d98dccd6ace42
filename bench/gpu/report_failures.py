"""A pytest plugin that prints each failure when it happens, so that a killed run shows them.

pytest -p report_failures ...
"""


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        lines = [line for line in report.longreprtext.splitlines() if line.strip()]
        reason = [line for line in lines if line.startswith("E ")][:4] or lines[-3:]
        print(f"\nFAILED {report.nodeid}", *(line[:400] for line in reason), sep="\n  ", flush=True)
