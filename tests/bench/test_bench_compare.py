"""`python bench compare A B` prints the largest gain and loss first, or one line with an error."""

import copy
import json
import runpy
from pathlib import Path

import pytest
import results
from comparison import compare

ROOT = Path(__file__).parents[2]
STORED = ROOT / "bench" / "results"
main = runpy.run_path(str(ROOT / "bench" / "__main__.py"), run_name="bench_main")["main"]


def row(name="bdkd_loss", seconds=1e-3, kind="ours", hot=None, of_copy=0.5) -> dict:
    def spreads(median):
        return {"median": median, "p20": 0.95 * median, "p80": 1.05 * median}

    found = {"name": name, "kind": kind, "note": "", "bytes": 8, "by": "wall", "trials": 5,
             "calls": 1, "seconds": spreads(seconds), "ratio": spreads(1.0), "of_copy": of_copy,
             "peak_bytes": 3, "error": None}  # fmt: skip
    if hot is not None:
        found["hot"] = {"seconds": spreads(hot), "ratio": spreads(1.0), "of_copy": of_copy}
    return found


def result(rows, suite="loss_cpu", case="both: 8 x 10", share=0.0, commit="abc", **machine) -> dict:
    described = {"cpu": "a", "threads": 1, "gpu": None, "python": "3.11",
                 "versions": {"torch": "2.13"}, **machine}  # fmt: skip
    cases = [{"case": case, "parameters": {}, "sets": 2, "base": "bdkd_loss", "rows": rows,
              "caches": {"cold": "inputs from memory", "hot": "inputs in cache"}}]  # fmt: skip
    return {"schema": 1, "suite": suite, "date": "2026-01-01", "cases": cases,
            "commit": {"id": commit, "date": "2026-01-01", "dirty": False}, "machine": described,
            "others_share": share}  # fmt: skip


def named(*found: dict) -> dict:
    return {x["suite"]: x for x in found}


def test_the_largest_gain_and_loss_come_first_with_their_names():
    a = named(result([row(), row("bdkd_loss_and_grad"), row("eager", kind="peer"), row("small")]))
    b = named(result([row(seconds=3e-3), row("bdkd_loss_and_grad", 0.25e-3),
                      row("eager", 9e-3, "peer"), row("small", 2e-3)], commit="def"))  # fmt: skip
    lines = compare(a, b).splitlines()
    assert lines[0] == (
        "largest gain: loss_cpu, both: 8 x 10, bdkd_loss_and_grad (cold): "
        "0.25 times the time of A (1.00 ms -> 250.0 us)"
    )
    assert lines[1] == (
        "largest loss: loss_cpu, both: 8 x 10, bdkd_loss (cold): "
        "3.00 times the time of A (1.00 ms -> 3.00 ms)"
    )
    assert "9.00" in compare(a, b)  # the peer is in the table


def test_hot_rows_are_compared_if_both_results_have_them():
    a, b = (named(result([row(hot=hot)])) for hot in (1e-4, 4e-4))
    assert "largest loss: loss_cpu, both: 8 x 10, bdkd_loss (hot): 4.00" in compare(a, b)
    old = copy.deepcopy(b)
    del old["loss_cpu"]["cases"][0]["caches"]
    del old["loss_cpu"]["cases"][0]["rows"][0]["hot"]
    assert "(hot)" not in compare(old, b)
    assert "bdkd_loss (cold)" in compare(old, b)


def test_a_difference_within_the_spreads_is_no_gain_and_no_loss():
    text = compare(named(result([row()])), named(result([row(seconds=1.05e-3)])))
    assert text.splitlines()[:2] == [
        "largest gain: none (no contender of ours is faster by more than its spread)",
        "largest loss: none (no contender of ours is slower by more than its spread)",
    ]
    peers = [named(result([row("eager", seconds, "peer")])) for seconds in (1e-3, 2e-3)]
    assert "largest loss: loss_cpu, both: 8 x 10, eager (cold): 2.00" in compare(*peers)


def test_of_two_machines_only_the_shares_of_the_copy_are_compared():
    a = named(result([row(of_copy=0.4), row("no copy", of_copy=None)]))
    b = named(result([row(seconds=9.0, of_copy=0.8), row("no copy", 9.0, of_copy=None)], cpu="b",
                     share=0.5))  # fmt: skip
    text = compare(a, b)
    assert text.startswith("largest gain: loss_cpu, both: 8 x 10, bdkd_loss (cold): 0.50 times")
    assert "(relative to the copy)" in text
    assert "not the same cpu (A a, B b): times cannot be compared" in text
    assert "OTHER PROCESSES USED 50%" in text


def test_other_versions_are_named_and_compared():
    a, b = (named(result([row()], versions={"torch": v}, commit=v)) for v in ("2.12", "2.13"))
    assert "other versions: torch (A 2.12, B 2.13)" in compare(a, b)


def test_suites_of_only_one_result_are_listed():
    a = named(result([row()]), result([row()], "metrics"), result([row()], "startup", "first"))
    b = named(result([row(seconds=2e-3)]), result([row()], "loader"),
              result([row()], "startup", "second"))  # fmt: skip
    lines = compare(a, b).splitlines()
    assert lines[-3:] == [
        "not compared: startup has no case in common (1 in A, such as 'first'; 1 in B, such as "
        "'second')",
        "only in A: metrics",
        "only in B: loader",
    ]


GPU = {"name": "H200"}
NOTHING = [
    ([result([row()])], [result([row()], "metrics")],
     "no suite in common (A: loss_cpu; B: metrics)"),
    ([result([row()])], [result([row()], case="both: 9 x 10")],
     "loss_cpu has no case in common (1 in A, such as 'both: 8 x 10'; 1 in B, such as "
     "'both: 9 x 10')"),
    ([result([row()])], [result([row("eager", kind="peer")])],
     "loss_cpu has no contender in common"),
    ([result([row(of_copy=None)])], [result([row(of_copy=None)], cpu="b", gpu=GPU)],
     "loss_cpu was measured on two machines, without a share of the copy: not the same cpu (A a, "
     "B b), not the same gpu (A None, B H200)"),
    ([{**result([]), "cases": []}], [result([row()])],
     "loss_cpu has no case in common (0 in A; 1 in B, such as 'both: 8 x 10')"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b", "why"), NOTHING, ids=lambda x: x if isinstance(x, str) else "")
def test_one_line_says_why_nothing_can_be_compared(a, b, why, tmp_path, capsys):
    for folder, found in (("a", a), ("b", b)):
        for each in found:
            results.write(tmp_path / folder / f"{each['suite']}.json", each)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"bench: nothing can be compared: {why}\n"
    assert printed.out == ""


def test_the_command_prints_the_comparison_and_returns_0(tmp_path, capsys):
    for name, seconds in (("a", 1e-3), ("b", 2e-3)):
        results.write(tmp_path / f"{name}.json", result([row(seconds=seconds)], commit=name))
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].startswith("largest loss: loss_cpu, both: 8 x 10, bdkd_loss")
    assert printed.err == ""


def test_bad_files_are_one_line(tmp_path, capsys):
    good = tmp_path / "good.json"
    results.write(good, result([row()]))
    same = tmp_path / "same.json"
    same.write_bytes(good.read_bytes())
    (tmp_path / "text.json").write_text("not JSON")
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    (tmp_path / "other.json").write_text(json.dumps({"schema": "accuracy-1"}))
    (tmp_path / "empty").mkdir()
    for other, words in (
        ("missing.json", "cannot read {}: there is no such file or folder"),
        ("text.json", "cannot read {}: it is not JSON"),
        ("binary.json", "cannot read {}: it is not JSON"),
        ("other.json", "{} is not a result of python bench (JSON of schema 1): pass a SUITE.json"),
        ("empty", "{} contains no results: python bench --out FOLDER writes them"),
        ("same.json", "A and B are the same results (abc, 2026-01-01): pass two different runs"),
        ("good.json", "A and B are the same results (abc, 2026-01-01): pass two different runs"),
    ):
        path = tmp_path / other
        assert main(["compare", str(good), str(path)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"bench: {words.format(path)}")
        assert len(error.splitlines()) == 1


def folders() -> list[Path]:
    return sorted({path.parent for path in STORED.glob("*/*.json")
                   if "suite" in json.loads(path.read_text())})  # fmt: skip


@pytest.mark.parametrize("folder", folders(), ids=lambda path: path.name)
def test_the_stored_results_are_read_and_shown(folder, capsys):
    """All commands still read stored results from before hot caches were measured."""
    for stored in results.read_all(folder).values():
        assert results.head(stored)
        for case in stored["cases"]:
            assert case["case"] in results.case_table(case)
        assert len(results.csv_text(stored).splitlines()) > len(stored["cases"])


def test_the_stored_results_are_compared_and_drawn(tmp_path, capsys):
    older, newer = (str(STORED / f"2026-11-{day}-cpu") for day in (24, 26))
    assert main(["compare", older, newer]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("largest gain: loss_cpu, ")
    assert "only in A: step_cpu" in printed
    assert main(["plot", newer, "--out", str(tmp_path)]) == 0
    assert main(["history", older, newer, "--out", str(tmp_path / "history.png")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"loss_cpu.png", "history.png"}
