"""The tables of the evidence pages are what ``bdkd compare`` wrote. None is typed in."""

import csv
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text("utf-8") for name in ("evidence", "evidence-digits")}
KEPT = sorted(path.parent for path in (DOCS / "evidence").glob("*/comparison.md"))


@pytest.mark.parametrize("page", PAGES)
def test_every_table_row_was_written_by_compare(page):
    written = {line for kept in KEPT for line in (kept / "comparison.md").read_text().splitlines()}
    rows = [line for line in PAGES[page].splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert [row for row in rows if row not in written] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_the_one_that_wrote_a_table(page):
    commands = re.findall(r"^bdkd compare .*$", PAGES[page], re.M)
    assert len(commands) >= 4
    written = " ".join((kept / "comparison.md").read_text() for kept in KEPT)
    for command in commands:
        assert f"`{command}`" in written


def test_every_comparison_that_is_kept_is_on_a_page():
    shown = "".join(PAGES.values())
    for kept in KEPT:
        results = [
            line for line in (kept / "comparison.md").read_text().splitlines() if " ± " in line
        ]
        assert any(line in shown for line in results), kept.name


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.name)
def test_every_method_ran_with_every_seed(kept):
    with open(kept / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (command,) = re.findall(r"^`(bdkd compare .*)`$", (kept / "comparison.md").read_text(), re.M)
    methods = re.search(r"--methods (.*?) --", command)[1].split()
    seeds = re.search(r"--seeds (\d+)", command)[1]
    assert int(seeds) >= 10
    assert [
        row["method"] for row in rows if (row["network"], row["metric"]) == ("student", "top1")
    ] == (methods)
    assert {row["seeds"] for row in rows if row["metric"] == "top1"} == {seeds}


def test_pictures_are_there():
    for page in PAGES.values():
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
            assert (DOCS / picture).exists()
