"""The report shows finished, running and broken runs on one page. The page loads no external
resources and contains no markup from files."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdkd.cli.report import run as report
from bdkd.errors import RunError, UsageError
from bdkd.evaluation.calibration import Calibration
from bdkd.evaluation.predictions import (
    NetworkPredictions,
    Predictions,
    featured_images,
    to_bytes,
)
from bdkd.evaluation.report import write_report
from bdkd.evaluation.report.charts import Line, Scale, line_chart, number
from bdkd.evaluation.report.embedding import embed
from bdkd.evaluation.report.groups import POINTS, average, differing, group_runs
from bdkd.evaluation.report.markup import tag
from bdkd.evaluation.report.reliability import bin_images
from bdkd.evaluation.report.runs import find_runs, read_run

VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "</title><script>alert(1)</script>\"'><img src=http://evil.example/x>&amp;\x00\u202e"


class Page(HTMLParser):
    """Parse a page into elements and text, and check that it is well formed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]


def assert_self_contained(page: Page) -> None:
    """Check the rules of a page: no script, no external resource, a name for everything but
    text."""
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "img"}
    for name, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), f"{name} has {key}"
            if key in {"href", "src", "xlink:href", "srcset", "action"}:
                assert name == "a", name
                assert (value or "").startswith("#")
                assert value != "#"
                assert (value or "")[1:] in {a.get("id") for _, a in page.elements}
    assert page.all("html") == [{"lang": "en"}]
    titled = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert len([a for a in page.all("title") if "id" in a]) == len(titled)
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identities) == len(set(identities))
    for svg in page.all("svg"):
        if svg.get("aria-hidden") != "true":
            assert svg["role"] == "img"
            assert set((svg["aria-labelledby"] or "").split()) <= set(identities)
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    for attributes in page.all("th"):
        assert attributes.get("scope") in ("row", "col")


def predictions(networks=("teacher", "student"), images=60, seed=0, classes=None) -> Predictions:
    rng = np.random.default_rng(seed)
    target = np.arange(images) % 3
    featured = featured_images(target)
    made = {}
    for k, name in enumerate(networks):
        right = rng.random(images) < 0.8
        predicted = np.where(right, target, (target + 1) % 3)
        features = (rng.normal(size=(len(featured), 5)) + 4 * target[featured, None] + k).astype(
            np.float16
        )
        made[name] = NetworkPredictions(
            rng.uniform(0.4, 1, images), rng.uniform(0, 1, images).astype(np.float32), predicted,
            features,
        )  # fmt: skip
    return Predictions(tuple(classes or ("cat", "dog", "eel")), target, featured, made)


def make_run(
    path: Path, method="bdkd", seed=0, steps=60, teacher="wrn_16_2", finished=True,
    networks=("teacher", "student"), roles=None, gamma=2.0, classes=None, tail="", size=1e5,
) -> Path:  # fmt: skip
    """Write the folder of a run as the trainer does."""
    path.mkdir(parents=True)
    roles = roles or {name: name.split("_")[0].rstrip("0123456789") for name in networks}
    config = [f"name = 'tiny'\nseed = {seed}\n[objective]\nname = '{method}'\ngamma = {gamma}"]
    for name in networks:
        if not name.endswith("_ema"):
            model = teacher if roles[name] == "teacher" else "resnet8"
            config.append(
                f"[networks.{json.dumps(name)}]\nmodel = '{model}'\nrole = '{roles[name]}'"
            )
    (path / "config.toml").write_text("\n".join(config))
    lines = []
    for step in range(10, steps + 1, 10):
        values = {"loss": 3 / step, "top1": 1 - 5 / (step + seed), "nll": 0.4, "ece": 0.1,
                  "entropy": 2 / step}  # fmt: skip
        trained = {name: values for name in networks if not name.endswith("_ema")}
        line = {"step": step, "epoch": step // 20, "split": "train", **trained,
                "images_per_second": 900.0}  # fmt: skip
        if method == "bdkd":
            line |= {"forward_weight": 1.4, "reverse_weight": 1.6, "forward_kl": 0.1,
                     "reverse_kl": 0.2}  # fmt: skip
        lines.append(line)
        if step % 20 == 0:
            lines.append({"step": step, "epoch": step // 20, "split": "val",
                          **{name: values | {"brier": 0.2} for name in networks}})  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + tail)
    if finished:
        results = {
            name: {"model": teacher if roles.get(name) == "teacher" else "resnet8",
                   "role": roles.get(name, "student"),
                   "parameters": size if roles.get(name) == "teacher" else 1e4,
                   "top1": 0.9 + seed / 100, "ece": 0.05, "ece_if_calibrated": 0.03, "nll": 0.4,
                   "brier": 0.2}
            for name in networks
        }  # fmt: skip
        summary = {"method": method, "seed": seed, "wall_seconds": 12.0, "networks": results}
        (path / "summary.json").write_text(json.dumps(summary))
        content = to_bytes(predictions(networks, seed=seed, classes=classes))
        (path / "predictions.safetensors").write_bytes(content)
    return path


def page_of(paths, tmp_path, tsne=False) -> tuple[Page, list[str]]:
    output = tmp_path / "report.html"
    warnings = write_report(paths, output, tsne=tsne)
    page = Page(output)
    assert_self_contained(page)
    return page, warnings


def test_the_report_of_a_finished_run_contains_all_figures(tmp_path, capsys):
    run = make_run(tmp_path / "mine")
    (run / "profile.json").write_text(
        json.dumps({"device": "cuda:0", "steps": 20,
                    "phases": [{"name": "backward", "milliseconds": 4.5, "share": 0.9},
                               {"name": "data wait", "milliseconds": 0.5}, {"name": "odd"}, 3],
                    "host": [{"name": "optimizer", "milliseconds": 2.0}]})
    )  # fmt: skip
    output = tmp_path / "out.html"
    report([str(run), "--output", str(output), "--title", "My runs"])
    assert capsys.readouterr() == (f"{output}\n", "")
    page = Page(output)
    assert_self_contained(page)
    for shown in (
        "My runs", "90.00%", "Student accuracy", "Accuracy gap between teacher and student",
        "Student calibration error", "Reliability of bdkd: student", "Entropy H (nats): bdkd",
        "Entropy gap on the test images", "Weight of the forward KL", "Forward KL",
        "t-SNE of bdkd: student", "t-SNE of bdkd: teacher", "mine, cuda:0", "backward: 4.5 ms",
        "10.00%", "Mean over 20 recorded steps. A step takes 5 ms", "mine, host", "optimizer: 2 ms",
        "Training speed", "cat", "role = 'student'",
    ):  # fmt: skip
        assert shown in page.text, shown
    assert "Capacity gap" not in page.text  # with teachers of only one size there is no curve
    assert len(output.read_bytes()) < 200_000
    first = output.read_bytes()
    report([str(run), "--output", str(output), "--title", "My runs"])
    once_more = re.sub(rb"f\d+[td]", b"", output.read_bytes())
    assert once_more == re.sub(rb"f\d+[td]", b"", first)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_seeds_are_averaged_and_methods_are_separate(tmp_path):
    folder = tmp_path / "compared"
    for seed in range(3):
        make_run(folder / f"bdkd-seed{seed}", seed=seed)
        make_run(folder / f"unweighted-seed{seed}", seed=seed, gamma=1.0)
        make_run(folder / f"independent-seed{seed}", "independent", seed=seed)
    (folder / "comparison.md").write_text(
        "# Methods\n\n| method | top-1 |\n| :-- | --: |\n| bdkd | 91.00 ± 1.00 |\n\n<b>n</b> = 3\n"
    )
    (folder / "events").mkdir()
    page, warnings = page_of([folder, folder / "bdkd-seed0"], tmp_path)
    assert warnings == []
    assert "9 runs · 3 configurations" in page.text
    assert "91.00 ± 1.00%" in page.text
    assert "over 3 seeds" in page.text
    assert "bdkd (gamma = 1)" in page.text
    assert "bdkd (gamma = 2)" in page.text
    assert "objective.gamma" in page.text
    assert "91.00 ± 1.00" in page.text
    assert "<b>n</b> = 3" in page.text  # shown as text
    assert "bdkd compare in compared" in page.text
    groups = group_runs([read_run(p) for p in find_runs([folder])])
    assert [len(group.runs) for group in groups] == [3, 3, 3]
    assert set(differing(groups)) == {"objective.name", "objective.gamma"}


def test_reports_show_many_networks_and_moving_averages_by_role(tmp_path):
    names = ("teacher1", "teacher2", "student", "student_ema")
    run = make_run(tmp_path / "many", networks=names)
    cohort = make_run(tmp_path / "peers", "dml", networks=("a", "b", "c"),
                      roles=dict.fromkeys("abc", "student"))  # fmt: skip
    page, warnings = page_of([run, cohort], tmp_path)
    assert warnings == []
    assert read_run(run).networks_with_role("student") == ["student_ema"]
    assert read_run(run).networks_with_role("teacher") == ["teacher1", "teacher2"]
    for shown in ("bdkd: student_ema", "bdkd: teacher2", "dml: c"):
        assert f"Reliability of {shown}" in page.text
    gaps = [a for a in page.text.split("Numbers") if "Accuracy gap" in a]
    assert gaps
    assert "dml" not in gaps[0].split("Line chart")[1]  # peers have no teacher


def test_incomplete_runs_are_shown_with_notes(tmp_path, capsys):
    running = make_run(tmp_path / "running", finished=False, tail='{"step": 70, "spl')
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.toml").write_text("name = 'tiny'\n")
    page, warnings = page_of([running], tmp_path)
    assert "running" in page.text
    assert "1 not finished" in page.text
    assert warnings == [f"{running}: not finished: there is no summary.json yet"]
    page, warnings = page_of([begun], tmp_path)
    assert "No run is finished yet" in page.text
    assert any("no metrics yet" in warning for warning in warnings)

    broken = make_run(tmp_path / "broken", seed=1)
    (broken / "config.toml").write_bytes(b"name = \xff\xfe")
    (broken / "summary.json").write_text("[" * 100_000)
    (broken / "predictions.safetensors").write_bytes(b"\x10\x00")
    (broken / "profile.json").write_text("[1]")
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": "ten"}\nnull\n[]\n' + "[" * 100_000 + "\n")
        odd = {"top1": None, "ece": "x", "nll": math.inf, "entropy": -(10**400), "loss": True}
        line = {"step": 80, "epoch": None, "split": None, "student": odd, "forward_weight": {}}
        file.write(json.dumps(line) + "\n")
    page, warnings = page_of([broken, running], tmp_path)
    for said in (
        "cannot read config.toml",
        "cannot read summary.json",
        "no predictions of a run",
        "profile.json: the content is not a table",
        "4 lines of metrics.jsonl cannot be read",
    ):
        assert any(said in warning for warning in warnings), said
        assert said in page.text
    report([str(broken), "--output", str(tmp_path / "r.html"), "--no-tsne"])
    assert "cannot read summary.json" in capsys.readouterr().err


def test_text_from_files_is_escaped(tmp_path):
    run = make_run(tmp_path / "<b>run", networks=(HOSTILE, "teacher"),
                   roles={HOSTILE: "student", "teacher": "teacher"},
                   classes=[HOSTILE, "</svg>", "\ud800"])  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"method": HOSTILE, "device": HOSTILE, "torch": [HOSTILE], "seed": {"a": HOSTILE}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "profile.json").write_text(
        json.dumps({"phases": [{"name": HOSTILE, "milliseconds": 1}]})
    )
    (run / "comparison.md").write_text(f"| {HOSTILE} |\n| a |\n{HOSTILE}\n")
    output = tmp_path / "report.html"
    write_report([run], output, title=HOSTILE)
    text = output.read_text("utf-8")
    assert_self_contained(Page(output))
    assert "<script" not in text
    assert "<img" not in text
    assert "\x00" not in text
    assert text.count("&lt;script&gt;") > 10
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    assert tag("p", HOSTILE, title=HOSTILE).count("<") == 2


def test_curves_of_long_runs_are_thinned_so_that_the_page_is_small(tmp_path):
    runs = [make_run(tmp_path / f"run{k}", gamma=1.0 + k) for k in range(6)]
    network = {"loss": 0.5, "top1": 0.5, "nll": 0.4, "ece": 0.1, "entropy": 0.3}
    with open(runs[0] / "metrics.jsonl", "w") as file:
        for step in range(20_000):
            line = {"step": step, "epoch": 0, "split": "train", "student": network,
                    "teacher": network, "forward_weight": 1.5}  # fmt: skip
            file.write(json.dumps(line) + "\n")
    page, _ = page_of(runs, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 700_000
    longest = max(len(a["d"] or "") for a in page.all("path"))
    assert longest < 16 * 2 * POINTS


def test_paths_without_a_run_and_unwritable_outputs_are_errors(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"nowhere is not a folder: pass the folder of a run"):
        write_report([run, tmp_path / "nowhere"], tmp_path / "r.html")
    with pytest.raises(RunError, match=r"empty contains no run folder"):
        write_report([tmp_path / "empty"], tmp_path / "r.html")
    with pytest.raises(RunError, match=r"cannot write .*no/r\.html: .* another --output"):
        write_report([run], tmp_path / "no" / "r.html", tsne=False)
    with pytest.raises(RunError, match=r"cannot write .*: .* another --output"):
        write_report([run], tmp_path / "empty", tsne=False)
    with pytest.raises(RunError, match=r"cannot write /dev/full: No space left"):
        write_report([run], Path("/dev/full"), tsne=False)
    assert Path("/dev/full").is_char_device()
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    write_report([run], tmp_path / "link.html", tsne=False)
    assert (tmp_path / "link.html").is_symlink()
    for name in ("link.html", "page.html"):
        (tmp_path / name).unlink()
    with pytest.raises(UsageError, match="needs the folder of at least one run"):
        report([])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "run"]


def test_a_failed_write_does_not_change_the_old_page(tmp_path, monkeypatch):
    run, output = make_run(tmp_path / "run"), tmp_path / "report.html"
    output.write_text("the old page")

    def fail(*_):
        assert output.read_text() == "the old page"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(RunError, match="No space left on device; choose another --output"):
        write_report([run], output, tsne=False)
    assert output.read_text() == "the old page"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "run"]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["networks", "student", "teacher", "top1", "ece", "role", "model", "step",
                         "epoch", "split", "objective", "name", "phases", "host", "milliseconds",
                         "loss", "entropy", "forward_weight", "", "seed"]) | st.text(max_size=5),
        inner, max_size=6,
    ),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=40)
@given(summary=ANY, profile=ANY, lines=st.lists(ANY, max_size=4), step=st.integers(0, 9))
def test_any_content_of_the_files_gives_a_page(tmp_path_factory, summary, profile, lines, step):
    run = tmp_path_factory.mktemp("any") / "run"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "profile.json").write_text(json.dumps(profile))
    stepped = [line | {"step": step} if isinstance(line, dict) else line for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stepped))
    page_of([run], run)


def test_without_scikit_learn_the_page_says_how_to_install_it(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    page, warnings = page_of([run], tmp_path, tsne=True)
    assert "pip install 'bdkd[train]'" in page.text
    assert warnings == ["features are not drawn without scikit-learn: pip install 'bdkd[train]'"]


def test_diagrams_have_the_same_bins_as_the_metrics():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(900, 5, generator=generator)
    logits[:30] = 0.0  # a confidence of 1/5 = 3/15, which is a bin edge
    target = torch.randint(5, (900,), generator=generator)
    calibration = Calibration(5)
    calibration.update(logits, target)
    result = calibration.compute(draws=1)
    confidence, correct = (t.numpy() for t in calibration.samples())
    bins = bin_images(confidence, correct)
    assert bins.count.tolist() == list(result.bin_count)
    np.testing.assert_allclose(bins.accuracy, result.bin_accuracy)
    np.testing.assert_allclose(bins.confidence, result.bin_confidence)
    assert bins.ece == pytest.approx(result.ece)
    confidence[0] = math.nan
    assert bin_images(confidence, correct).count.sum() == 899


def test_thinned_lines_have_gaps_and_the_last_value():
    x = np.arange(1000.0)
    y = x.copy()
    y[300:400] = math.nan
    line = average("", [(x, y)], 0)
    assert len(line.x) == POINTS
    assert line.last == 999
    assert np.isnan(line.y).any()
    chart = line_chart("t", [line], "step")
    assert chart is not None
    assert re.search(r'd="M[^"]*M', chart)  # a second M command after the gap
    assert line_chart("t", [Line("", x[:3], np.full(3, math.nan))], "step") is None
    one = line_chart("t", [Line("flat", np.array([5.0]), np.array([0.0]))], "step")
    assert one is not None
    assert "<circle" in one


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3, 3.5, [3, 3.1, 3.2, 3.3, 3.4, 3.5]),
     (0, 30000, [0, 5000, 10000, 15000, 20000, 25000, 30000]),
     (-2e-9, 1e-9, [-2e-9, -1.5e-9, -1e-9, -5e-10, 0, 5e-10, 1e-9])],
)  # fmt: skip
def test_ticks_are_round_numbers(low, high, expected):
    np.testing.assert_allclose(Scale(low, high, 0, 1).ticks(), expected, atol=1e-15)


def test_numbers_have_three_significant_digits():
    assert [number(v) for v in (0.0, 0.12345, 12345.6, 1e-7, 2e9, math.nan)] == [
        "0", "0.123", "12,346", "1.00e-07", "2.00e+09", "–",
    ]  # fmt: skip


def test_embedding_separates_clusters_and_returns_none_for_unusable_features():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    features = rng.normal(size=(60, 12)) + 12 * np.eye(3, 12)[labels]
    points = embed((features * 1000).astype(np.float16))
    assert points is not None
    middles = np.stack([points[labels == k].mean(0) for k in range(3)])
    nearest = np.linalg.norm(points[:, None] - middles, axis=-1).argmin(1)
    assert (nearest == labels).all()
    assert embed(features[:4]) is None
    assert embed(np.ones((30, 4), np.float16)) is None
    assert embed(np.full((30, 4), np.nan, np.float16)) is None


def contrast(a: str, b: str) -> float:
    """Return the contrast ratio of two colours #rrggbb as defined by WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_enough_contrast_in_light_dark_and_print():
    text = (files("bdkd.evaluation.report") / "style.css").read_text("utf-8")
    themes = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    assert len(themes) == 3
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
        for ink, ground in (("ink", "page"), ("ink", "card"), ("muted", "page"), ("muted", "card"),
                            ("accent", "card"), ("accent", "page"), ("head-ink", "head"),
                            ("head-muted", "head"), ("head-muted", "tile"),
                            ("warn", "warn-ground")):  # fmt: skip
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for mark in (*(f"c{k}" for k in range(8)), "bar", "over", "under", "count"):
            assert contrast(colours[mark], colours["card"]) >= 3, mark
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
