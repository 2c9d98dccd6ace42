"""The tables of docs/evidence.md are what ``bdkd compare`` wrote, none typed in or dropped."""

import csv
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "evidence.md").read_text("utf-8")
KEPT = sorted(path.parent for path in (DOCS / "evidence").glob("*/comparison.md"))


def test_every_table_row_was_written_by_compare():
    written = {line for kept in KEPT for line in (kept / "comparison.md").read_text().splitlines()}
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert [row for row in rows if row not in written] == []


def test_every_command_is_the_one_that_wrote_a_table():
    commands = re.findall(r"^bdkd compare .*$", PAGE, re.M)
    assert len(commands) == 4
    written = " ".join((kept / "comparison.md").read_text() for kept in KEPT)
    for command in commands:
        assert f"`{command}`" in written


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
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", PAGE):
        assert (DOCS / picture).exists()
