"""The tables of the evidence pages are what commands wrote. None is typed in."""

import csv
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text("utf-8") for name in ("evidence", "evidence-digits")}
KEPT = sorted(path.parent for path in (DOCS / "evidence").glob("*/comparison.md"))


@pytest.mark.parametrize("page", PAGES)
def test_every_table_row_was_written_by_a_command(page):
    written = {
        line
        for path in (DOCS / "evidence").glob("*/*.md")
        for line in path.read_text("utf-8").splitlines()
    }
    rows = [line for line in PAGES[page].splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert [row for row in rows if row not in written] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_the_one_that_wrote_a_table(page):
    commands = re.findall(r"^bdkd compare .*$", PAGES[page], re.M)
    assert len(commands) >= {"evidence": 2, "evidence-digits": 4}[page]
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


def test_statistics_are_means_over_the_lines_and_seeds(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import evidence_statistics

    for seed, shift in ((0, 0.0), (1, 0.2)):
        run = tmp_path / "c" / f"bdkd-seed{seed}"
        run.mkdir(parents=True)
        (run / "summary.json").write_text("{}")
        lines = [
            {"split": "val", "epoch": 1},
            *(
                {
                    "split": "train", "epoch": epoch,
                    "student": {"top1": 0.1 * epoch + shift, "entropy": 2.0 - shift + k},
                    "teacher": {"top1": 0.5, "entropy": None},
                    "forward_weight": 1.5, "reverse_weight": 1.25, "forward_kl": 0.25 + shift,
                    "reverse_kl": 0.0,
                }
                for epoch in (1, 2)
                for k in (0.0, 0.5)
            ),
        ]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "c" / "bdkd-seed2").mkdir()  # it has not finished
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "c"), "--epochs", "1", "2", "3"])
    evidence_statistics.main()
    text = (tmp_path / "c" / "statistics.md").read_text()
    assert capsys.readouterr().out == text
    assert "Seeds: bdkd 2." in text
    assert "| bdkd | 20.0% / 2.15 | 30.0% / 2.15 | nan% / nan |" in text
    assert "| bdkd | 50.0% / nan | 50.0% / nan | nan% / nan |" in text
    assert "| bdkd: forward_kl | 0.350 | 0.350 | nan |" in text
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path)])
    with pytest.raises(SystemExit):
        evidence_statistics.main()
    assert "contains no finished run" in capsys.readouterr().err
