"""The harness measures a known factor of two, no difference between two copies, and reports it."""

import json
import random
import statistics
import time
from dataclasses import replace

import machine
import pytest
import results
import torch
from harness import Case, Contender, Sampler, WallClock, cpu_peak_bytes, race, spread


class CountedClock:
    """A simulated clock on a machine with drift, spikes and busy periods. The work advances it."""

    def __init__(self, seed: int) -> None:
        self.random, self.now, self.work = random.Random(seed), 0.0, 0.0

    def sampler(self, contender: Contender, sets: int) -> Sampler:
        def sample() -> float:
            self.work = 0.0
            contender.call(0)
            # Slow waves of up to three times the time, 2% jitter, a spike in every tenth sample.
            self.now += self.work
            drift = 1 + (self.now % 60) / 30
            jitter = self.random.gauss(1, 0.02)
            spike = self.random.choice([1] * 9 + [8])
            return self.work * drift * jitter * spike

        return Sampler("counted", 1, sample)

    def does(self, amount: float):
        def call(i: int) -> None:
            self.work += amount

        return call


@pytest.mark.parametrize("seed", range(20))
def test_finds_a_known_factor_of_two_and_none_between_copies_despite_drift_and_spikes(seed):
    clock = CountedClock(seed)
    case = Case("counted", {}, (
        Contender("ours", clock.does(1.0), "ours"),
        Contender("a copy", clock.does(1.0)),
        Contender("twice the work", clock.does(2.0)),
    ), memory=False)  # fmt: skip
    rows = {row["name"]: row for row in race(case, clock, trials=40, seconds=1e9)["rows"]}
    assert rows["twice the work"]["ratio"]["median"] == pytest.approx(2.0, rel=0.1)
    assert rows["a copy"]["ratio"]["median"] == pytest.approx(1.0, rel=0.1)
    copy = rows["a copy"]["ratio"]
    assert copy["p20"] <= 1.0 <= copy["p80"]


def test_finds_a_known_factor_of_two_in_real_work():
    """Measures the processor time of this thread, which other processes affect little. The margins
    are wide, and there are three tries, because the machine may be busy."""
    x = torch.full((64, 64), 0.01)

    def work(times: int):
        def call(i: int) -> None:
            for _ in range(times):
                x @ x

        return call

    case = Case("matrix products", {}, (
        Contender("ours", work(20), "ours"),
        Contender("a copy", work(20)),
        Contender("twice the work", work(40)),
    ), memory=False)  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            measured = race(case, WallClock(time.thread_time, 1e-3), trials=15, seconds=2.0)
            ratio = {row["name"]: row["ratio"]["median"] for row in measured["rows"]}
            if 1.6 < ratio["twice the work"] < 2.5 and 0.8 < ratio["a copy"] < 1.25:
                break
        else:
            pytest.fail(f"ratios of twice the work and of a copy: {ratio}")
    finally:
        torch.set_num_threads(threads)


def test_every_contender_takes_every_buffer_set_in_turn():
    seen: list[int] = []
    case = Case("sets", {}, (Contender("ours", seen.append, "ours"),), sets=7, memory=False)
    race(case, WallClock(shortest=1e-5), trials=5)
    assert seen == [i % 7 for i in range(len(seen))]
    assert len(seen) > 7


def test_contenders_are_interleaved_and_the_order_rotates():
    order: list[str] = []

    class Recorder:
        def sampler(self, contender, sets):
            def sample() -> float:
                order.append(contender.name)
                return 1.0

            return Sampler("recorded", 1, sample)

    names = ("a", "b", "c")
    nothing = [Contender(n, lambda i: None, "ours" if n == "a" else "peer") for n in names]
    race(Case("order", {}, tuple(nothing), memory=False), Recorder(), trials=6)
    rounds = [tuple(order[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {turn[0] for turn in rounds} == {"a", "b", "c"}
    assert len(set(rounds)) >= 4


def test_a_failing_peer_is_a_row_with_its_reason_and_our_failure_is_raised():
    def fail(i: int) -> None:
        raise RuntimeError("no such kernel image\nand much more")

    clock = CountedClock(0)
    good = Contender("ours", clock.does(1.0), "ours")
    case = Case("failing", {}, (good, Contender("peer", fail)), absent={"far": "not installed"})
    measured = race(case, clock, trials=3)
    reasons = {row["name"]: row.get("not_run") for row in measured["rows"]}
    assert reasons == {"ours": None, "peer": "RuntimeError: no such kernel image",
                       "far": "not installed"}  # fmt: skip
    assert "not run: not installed" in results.case_table(measured)
    with pytest.raises(RuntimeError, match="no such kernel image"):
        race(Case("ours fails", {}, (Contender("ours", fail, "ours"),)), clock)


CACHES = {"cold": "inputs from memory", "hot": "inputs in cache"}


def test_cold_takes_the_sets_in_turn_and_hot_takes_the_first_one():
    """The work takes twice as long with any set except the first one."""
    clock = CountedClock(0)
    clock.random.choice = lambda _: 1  # neither spikes nor jitter here
    clock.random.gauss = lambda *_: 1
    seen: list[int] = []

    def call(i: int) -> None:
        seen.append(i)
        clock.work += 1.0 if i == 0 else 2.0

    rotating = WallClock(lambda: clock.work, shortest=100.0)
    case = Case("sets", {}, (
        Contender("copy", call, "limit", bytes=400), Contender("ours", call, "ours", bytes=400),
        Contender("peer", call, bytes=400),
    ), sets=50, memory=False, caches=CACHES)  # fmt: skip
    measured = race(case, rotating, trials=5)
    assert measured["caches"] == CACHES
    for row in measured["rows"]:
        assert row["seconds"]["median"] == pytest.approx(1.98)
        hot = row["hot"]
        assert hot["seconds"]["median"] == 1.0
        assert hot["ratio"]["median"] == 1.0
        assert hot["of_copy"] == 1.0
        assert hot["trials"] >= 5
        assert (hot["calls"], hot["by"]) == (100, "wall")
    assert set(seen) == set(range(50))
    table = results.case_table(measured).splitlines()
    assert table[1].split()[:3] == ["cold", "p20", "p80"]
    assert "hot" in table[1].split()
    assert "  cold: inputs from memory; hot: inputs in cache" in table
    plain = race(replace(case, caches={}), rotating, trials=5)
    assert all("hot" not in row for row in plain["rows"])
    assert "cold" not in results.case_table(plain)


def test_hot_rounds_take_at_most_half_the_time_of_cold_rounds():
    """Neither cold nor hot rounds have time for all trials. The sampler counts the time."""
    rounds = {"cold": 0, "hot": 0}
    now = [0.0]

    class Slow:
        def __init__(self) -> None:
            self.made = 0

        def sampler(self, contender, sets):
            self.made += 1
            cache = "cold" if self.made == 1 else "hot"

            def sample() -> float:
                rounds[cache] += 1
                now[0] += 1.0
                return 1.0

            return Sampler("counted", 1, sample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.time.monotonic", lambda: now[0])
        case = Case("slow", {}, (Contender("ours", lambda i: None, "ours"),), sets=2, memory=False,
                    caches=CACHES)  # fmt: skip
        race(case, Slow(), trials=100, seconds=40.0)
    assert rounds == {"cold": 41, "hot": 21}


def test_a_peer_that_fails_hot_keeps_its_cold_times_and_our_failure_is_raised():
    class Fails(CountedClock):
        made = 0

        def sampler(self, contender, sets):
            self.made += 1
            if self.made > 2 and contender.name == self.failing:
                raise RuntimeError("out of memory")
            return super().sampler(contender, sets)

    clock = Fails(0)
    clock.failing = "peer"
    case = Case("fails", {}, (
        Contender("ours", clock.does(1.0), "ours"), Contender("peer", clock.does(2.0)),
    ), sets=2, memory=False, caches=CACHES)  # fmt: skip
    measured = race(case, clock, trials=3)
    ours, peer = measured["rows"]
    assert peer["seconds"]["median"] > 0
    assert peer["hot"] == {"not_run": "RuntimeError: out of memory"}
    assert "seconds" in ours["hot"]
    assert "not run" in results.case_table(measured)
    clock = Fails(0)
    clock.failing = "ours"
    with pytest.raises(RuntimeError, match="out of memory"):
        race(replace(case, contenders=(
            Contender("ours", clock.does(1.0), "ours"), Contender("peer", clock.does(2.0)),
        )), clock, trials=3)  # fmt: skip


def test_progress_is_reported_between_samples():
    said: list[str] = []
    clock = CountedClock(0)
    case = Case("said", {}, (Contender("ours", clock.does(1.0), "ours"),), sets=2, memory=False,
                caches=CACHES)  # fmt: skip
    race(case, clock, trials=2, say=said.append)
    assert said == [
        "preparing ours (1 of 1)", "cold round 1 of at most 2", "cold round 2 of at most 2",
        "preparing ours, hot (1 of 1)", "hot round 1 of at most 2", "hot round 2 of at most 2",
    ]  # fmt: skip


def test_peak_memory_counts_tensors_that_are_alive_at_once():
    x = torch.ones(1000, 1000)  # 4 MB
    one, chain = cpu_peak_bytes(lambda: x * x), cpu_peak_bytes(lambda: ((x * x) * x) * x)
    assert 4e6 <= one < 4.1e6
    assert 8e6 <= chain < 8.1e6
    kept = cpu_peak_bytes(lambda: [x * x, x * x, x * x])
    assert 12e6 <= kept < 12.1e6


def test_share_of_copy_and_spreads():
    clock = CountedClock(0)
    clock.random.choice = lambda _: 1  # neither spikes nor jitter here
    clock.random.gauss = lambda *_: 1
    case = Case("bytes", {}, (
        Contender("copy", clock.does(1e-6), "limit", bytes=400),
        Contender("ours", clock.does(2e-6), "ours", bytes=400),
        Contender("reads only", clock.does(1e-6), bytes=200),
    ), memory=False)  # fmt: skip
    rows = {row["name"]: row for row in race(case, clock, trials=9)["rows"]}
    assert rows["ours"]["of_copy"] == pytest.approx(0.5, rel=1e-3)
    assert rows["reads only"]["of_copy"] == pytest.approx(0.5, rel=1e-3)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])["median"] == 3.5
    values = [random.Random(1).random() for _ in range(101)]
    found = spread(values)
    assert found["median"] == statistics.median(values)
    assert found["p20"] == sorted(values)[20]
    assert found["p80"] == sorted(values)[80]


def result(suite="loss_cpu", share=0.0, seconds=1.0, **machine_keys) -> dict:
    spreads = {"median": seconds, "p20": 0.9 * seconds, "p80": 1.1 * seconds}
    row = {"name": "ours", "kind": "ours", "note": "", "bytes": 8, "by": "wall", "trials": 5,
           "calls": 1, "seconds": spreads, "ratio": spreads, "of_copy": 0.5, "peak_bytes": 3,
           "error": {"loss": 1e-8}}  # fmt: skip
    case = {"case": "1 x 1", "parameters": {}, "sets": 2, "base": "ours", "rows": [row]}
    described = {"cpu": "a", "cores": 2, "threads": 1, "gpu": None, **machine_keys}
    return {"schema": 1, "suite": suite, "date": "2026-01-01T00:00:00+00:00",
            "commit": {"id": "abc", "date": "2026-01-01T00:00:00+00:00", "dirty": False},
            "machine": described, "others_share": share, "cases": [case]}  # fmt: skip


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"schema": 99}', '{"schema": 1, "suite": "a"}', "[" * 10**5,
    json.dumps({**result(), "cases": 3}), json.dumps({**result(), "machine": "fast"}),
    json.dumps({**result(), "cases": [{"case": "a", "base": "b", "parameters": {}, "rows": [
        {"name": "ours", "kind": "ours", "seconds": {"median": "1 ms"}}]}]}),
    json.dumps(result(seconds=0.0)), json.dumps(result(seconds=float("nan"))),
    json.dumps({**result(), "others_share": "all"}),
    json.dumps({**result(), "suite": ["loss_cpu"]}),
])  # fmt: skip
def test_files_that_are_not_results_are_reported(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(results.ResultsError, match=r"x\.json"):
        results.read_all(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(results.ResultsError, match="contains no results"):
        results.read_all(tmp_path / "empty")
    with pytest.raises(results.ResultsError, match="cannot read"):
        results.read_all(tmp_path / "missing")


def test_results_round_trip(tmp_path):
    results.write(tmp_path / "loss_cpu.json", result())
    results.write(tmp_path / "metrics.json", result("metrics"))
    assert results.read_all(tmp_path) == {"loss_cpu": result(), "metrics": result("metrics")}
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".json"]
    (tmp_path / "accuracy.json").write_text('{"schema": "accuracy-1"}')
    assert set(results.read_all(tmp_path)) == {"loss_cpu", "metrics"}
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(results.ResultsError, match=r"broken\.json"):
        results.read_all(tmp_path)


def test_the_machine_is_described_and_can_be_written_as_json():
    described = machine.describe(1, "cpu")
    assert json.loads(json.dumps(described)) == described
    assert described["last_level_cache"] >= 2**18
    assert described["versions"]["torch"] == torch.__version__
    assert set(machine.commit()) == {"id", "date", "dirty"}


def test_load_by_other_processes_is_measured(monkeypatch):
    neighbours = machine.Neighbours()
    monkeypatch.setattr(neighbours, "before", (0.0, 0.0, 0.0))
    monkeypatch.setattr(neighbours, "_read", lambda: (10.0, 8.0, 3.0))
    assert neighbours.share() == 0.5
    monkeypatch.setattr(neighbours, "_read", lambda: None)
    assert neighbours.share() is None


class Ahead:
    """A contender that has prefetched the results of some calls. Other calls take one second each,
    on another processor."""

    def __init__(self, ready: int) -> None:
        self.now, self.ready, self.asked = 0.0, ready, 0

    def call(self, i: int) -> None:
        self.asked += self.ready <= 0
        self.ready -= 1

    def settle(self) -> None:
        self.now, self.asked = self.now + self.asked, 0


def test_prefetched_and_unfinished_work_is_counted_correctly():
    work = Ahead(ready=0)
    clock = WallClock(lambda: work.now, 4.0, work.settle)
    for lead, expected in ((3, 1.0), (0, 0.25)):
        sampler = clock.sampler(Contender("x", work.call, lead=lead), 1)
        work.ready = 3  # prefetched while other contenders ran
        assert sampler.calls == 4
        assert sampler.sample() == expected
