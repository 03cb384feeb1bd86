"""What the torture tests counted, in one of the last lines of a session."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line of all counts; from the reports, which come back from pytest-xdist's workers too."""
    reports = terminalreporter.getreports("passed")
    counts = [value for report in reports for name, value in report.user_properties if name == "torture"]
    if counts:
        terminalreporter.write_line("torture: " + "; ".join(counts))
