"""Read the numbers of a report from the tables of its page, and compare them with plain loops over
the runs."""

import math
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from report_runs import (
    IMAGES,
    METRICS,
    MODELS,
    ROLES,
    SEEDS,
    SEEDS_OF,
    a_run,
    body,
    of_seeds,
    page_of,
    predictions,
    told_apart,
)
from svg_marks import Axes, body_of, cards_of, points_of, rows_of, with_class, words

from bdkd.evaluation.report.charts import number
from bdkd.evaluation.report.embedding import embed
from bdkd.evaluation.report.groups import differing, group_runs
from bdkd.evaluation.report.page import render

__all__ = ["body"]  # a fixture


@pytest.fixture(scope="module")
def cards(body):
    return cards_of(body, "accuracy", "calibration", "balance", "time")


def test_the_table_of_results_has_the_numbers_of_every_network(body):
    [table] = with_class(body, "table", "results")
    head, *lines = rows_of(table)
    assert head == ["method", "network", "model", "parameters", "seeds", "top-1", "ECE",
                    "ECE if calibrated", "ECE after T scaling", "NLL", "Brier",
                    "agrees with teacher"]  # fmt: skip
    assert words(table.find("caption")) == "Test images; mean ± standard deviation over seeds"
    expected = []
    for method, seeds in SEEDS_OF.items():
        for k, (name, role) in enumerate(ROLES.items()):
            values = {m: [told_apart(method, name, m, s) for s in seeds] for m in METRICS}
            found = [predictions(method, s).networks for s in seeds]
            agree = [float((p[name].predicted == p["teacher"].predicted).mean()) for p in found]
            expected.append([
                method, name, MODELS[name], f"{10_000 * (k + 1):,}", str(len(seeds)),
                of_seeds(values["top1"], True), of_seeds(values["ece"], True),
                f"{mean(values['ece_if_calibrated']):.2%}", of_seeds(values["ece_scaled"], True),
                of_seeds(values["nll"], False), of_seeds(values["brier"], False),
                of_seeds(agree, True) if role == "student" else "–",
            ])  # fmt: skip
    assert lines == expected


def test_a_metric_without_values_has_no_column():
    """Runs of older versions or without validation images have no ECE after temperature scaling."""
    run = a_run("bdkd", 0)
    for network in run.summary["networks"].values():
        network["ece_scaled"] = None
        del network["ece_if_calibrated"]
    del run.summary["networks"]["teacher"]["nll"]
    [table] = with_class(page_of([run]), "table", "results")
    head, *lines = rows_of(table)
    assert head[4:] == ["top-1", "ECE", "NLL", "Brier", "agrees with teacher"]
    for line, name in zip(lines, ROLES, strict=True):
        top1, ece, nll, brier = (
            told_apart("bdkd", name, metric, 0) for metric in ("top1", "ece", "nll", "brier")
        )
        shown = "–" if name == "teacher" else f"{nll:.3f}"
        assert line[4:-1] == [f"{top1:.2%}", f"{ece:.2%}", shown, f"{brier:.3f}"]


def test_the_caption_names_the_number_of_seeds_if_all_methods_have_the_same(body):
    for runs, said, column in (
        ([a_run("bdkd", s) for s in SEEDS], "; mean ± standard deviation over 3 seeds", False),
        ([a_run("bdkd", 0)], "", False),
        ([a_run("bdkd", 0), a_run("bdkd", 1), a_run("dkd", 0)],
         "; mean ± standard deviation over seeds", True),
    ):  # fmt: skip
        [table] = with_class(page_of(runs), "table",
                             "results")  # fmt: skip
        assert words(table.find("caption")) == "Test images" + said
        assert ("seeds" in rows_of(table)[0]) == column


def test_a_tile_shows_the_numbers_of_the_averaged_student_and_its_teacher(body):
    [tiles] = with_class(body, "ul", "tiles")
    for tile, (method, seeds) in zip(tiles, SEEDS_OF.items(), strict=True):

        def of(name: str, metric: str, method=method, seeds=seeds) -> str:
            return f"{mean(told_apart(method, name, metric, s) for s in seeds):.2%}"

        assert [words(p) for p in tile.iter("p")] == [
            method, of("student_ema", "top1"), f"top-1 of the student, {len(seeds)} seeds",
            f"ECE of the student {of('student_ema', 'ece')}", f"teacher {of('teacher', 'top1')}",
        ]  # fmt: skip


def test_finished_and_running_runs_are_distinguished():
    runs = [a_run("bdkd", 0), a_run("bdkd", 1, finished=False), a_run("dkd", 0, finished=False)]
    body = page_of(runs)
    assert "3 runs · 2 configurations · 2 not finished" in words(body)
    numbers = [words(e) for e in with_class(body, "p", "tile-number")]
    assert numbers == [f"{told_apart('bdkd', 'student_ema', 'top1', 0):.2%}", "running"]
    # A network without results has no row. Only the finished seed is in the mean.
    [table] = with_class(body, "table", "results")
    assert [row[:2] for row in rows_of(table)[1:]] == [["bdkd", name] for name in ROLES]


def test_runs_are_listed_with_seed_time_notes_and_recipe():
    runs = [a_run("bdkd", 3), a_run("dkd", 4, finished=False)]
    runs[0].summary |= {"device": "cuda:0", "torch": "2.9"}
    [section] = [s for s in page_of(runs).iter("section") if s.get("id") == "runs"]
    first, second = section.iter("details")
    assert words(first.find("summary")) == "bdkd-3 bdkd"
    assert [words(p) for p in first.iter("p")] == [
        "method bdkd, seed 3, trained 103 s, cuda:0, 2.9"
    ]
    assert words(first.find("pre")) == "seed = 3"
    assert [words(p) for p in second.iter("p")] == ["method dkd, seed 4", "not finished"]


def test_differing_keys_are_shown_with_the_value_of_each_configuration():
    first = a_run("bdkd", 0, train={"epochs": 5, "flip": False})
    second = a_run("bdkd", 0, train={"epochs": 5, "flip": True, "ema": 0})
    groups = group_runs([first, second])
    assert differing(groups) == {"train.ema": [None, 0], "train.flip": [False, True]}
    body = body_of(render(groups, [], False, "")[0])
    tables = {
        words(t.find("caption")): t for t in body.iter("table") if t.find("caption") is not None
    }
    head, *lines = rows_of(tables["Keys of the recipes that differ"])
    assert head == ["key", "bdkd (flip = False)", "bdkd (ema = 0, flip = True)"]
    assert lines == [["train.ema", "–", "0"], ["train.flip", "False", "True"]]


def test_the_markdown_tables_of_a_comparison_become_html_tables():
    markdown = "# Head\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |\n| 3 | 4 |\n\nwords\n\n![x](x.png)\n"
    page, _ = render(group_runs([a_run("bdkd", 0)]), [(Path("here"), markdown)], False, "")
    [details] = [d for d in with_class(body_of(page), "details", "run") if d.find("h3") is not None]
    assert words(details.find("h3")) == "Head"
    assert rows_of(details) == [["a", "b"], ["1", "2"], ["3", "4"]]
    assert [words(p) for p in details.iter("p")] == ["words"]


@pytest.mark.parametrize("method", SEEDS_OF)
@pytest.mark.parametrize("name", ["student_ema", "teacher"])
def test_a_reliability_card_pools_the_images_of_all_seeds(method, name, cards):
    card = cards[f"{method}: {name}"]
    found = [predictions(method, s) for s in SEEDS_OF[method]]
    confidence = np.concatenate([p.networks[name].confidence for p in found])
    correct = np.concatenate([p.networks[name].predicted == p.target for p in found])
    rows = []
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            rows.append(
                [
                    f"{k / 15:.0%}–{(k + 1) / 15:.0%}",
                    str(inside.sum()),
                    f"{correct[inside].mean():.2%}",
                    f"{confidence[inside].mean():.2%}",
                ]
            )
    assert rows_of(card) == [["confidence", "images", "accuracy", "mean confidence"], *rows]
    eces = [told_apart(method, name, "ece", s) for s in SEEDS_OF[method]]
    chance = mean(told_apart(method, name, "ece_if_calibrated", s) for s in SEEDS_OF[method])
    [note] = with_class(card, "p", "note")
    assert words(note) == f"ECE {of_seeds(eces, True)}, if calibrated {chance:.2%}"
    assert f"{name}" in words(card.find("svg/title"))
    assert len(list(card.iter("g"))) == len(rows)


def test_with_many_networks_only_students_have_diagrams():
    """With more than twelve diagrams of one kind, the page would be too long to read."""
    for methods, expected in ((6, ("student_ema", "teacher")), (7, ("student_ema",))):
        runs = [a_run(f"m{k}", 0) for k in range(methods)]
        found = [h for h in cards_of(page_of(runs), "calibration") if "_" in h or "teacher" in h]
        assert found == [f"m{k}: {name}" for k in range(methods) for name in expected]


def test_a_run_without_an_ece_in_its_summary_shows_that_of_its_predictions():
    run = a_run("bdkd", 0)
    for network in run.summary["networks"].values():
        del network["ece"], network["ece_if_calibrated"]
    body = page_of([run])
    card = cards_of(body)["bdkd: teacher"]
    kept = run.predictions.networks["teacher"]
    correct, total = kept.predicted == run.predictions.target, 0.0
    for k in range(15):
        inside = (kept.confidence > k / 15) & (kept.confidence <= (k + 1) / 15)
        total += abs(correct[inside].sum() - kept.confidence[inside].sum())
    assert words(with_class(card, "p", "note")[0]) == f"ECE {total / IMAGES:.2%}"


def test_the_entropy_gap_is_the_teachers_entropy_less_the_students(cards):
    card = cards["Entropy gap on the test images"]
    gaps = {}
    for method, seeds in SEEDS_OF.items():
        networks = [predictions(method, s).networks for s in seeds]
        gaps[method] = np.concatenate(
            [n["teacher"].entropy - n["student_ema"].entropy for n in networks]
        )
    assert rows_of(card) == [
        ["method", "mean gap (nats)", "student more certain", "images"],
        *([m, number(float(g.mean())), f"{(g > 0).mean():.2%}", str(len(g))]
          for m, g in gaps.items()),
    ]  # fmt: skip
    chart = with_class(card, "svg", "chart")[0]
    axes = Axes(chart)
    [reference] = with_class(chart, "line", "reference")
    assert axes.x(float(reference.get("x1"))) == pytest.approx(0, abs=axes.near[0])
    for path, values in zip(with_class(chart, "path", "line"), gaps.values(), strict=True):
        steps = path.get("d").split("V")[1:-1]
        heights, ends = np.array([[float(v) for v in step.split("H")] for step in steps]).T
        shares, edges = axes.y(heights), axes.x(ends)
        # Every image is in a bar. Values beyond the last edge are in the last bar.
        assert shares.sum() == pytest.approx(1, abs=0.003)
        assert shares[-1] == pytest.approx((values > edges[-2]).mean(), abs=0.02)
        assert shares[0] == pytest.approx((values <= edges[0]).mean(), abs=0.02)
        upper = edges > axes.near[0]
        assert shares[upper].sum() == pytest.approx((values > edges[~upper].max()).mean(), abs=0.03)


def test_a_map_of_features_has_a_point_for_each_image_in_the_colour_of_its_class():
    body = body_of(render(group_runs([a_run("bdkd", 0)]), [], tsne=True, title="")[0])
    card = cards_of(body, "features")["bdkd: student_ema"]
    assert "t-SNE of bdkd: student_ema" in words(card)
    chart = with_class(card, "svg", "chart")[0]
    kept = predictions("bdkd", 0)
    labels = kept.target[kept.featured]
    assert (labels != kept.networks["student_ema"].predicted[kept.featured]).any()
    clouds = with_class(chart, "path", "cloud")
    assert [c.get("d").count("M") for c in clouds] == np.bincount(labels).tolist()
    assert [words(e) for e in with_class(chart, "text", "name")] == ["ape", "bee", "cat"]
    assert words(with_class(card, "p", "note")[0]) == f"{len(labels)} test images of bdkd-0"


def test_the_map_of_features_does_not_depend_on_their_scale_and_offset():
    """t-SNE has a fixed seed. float16 features may be large and far from 0."""
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(9, 5)) + 8 * np.eye(3, 5)[np.arange(9) % 3]).astype(np.float32)
    points = embed(features)
    assert points.shape == (9, 2)
    np.testing.assert_array_equal(points, embed(features))
    assert embed(features[:7]) is None
    assert embed(features[:8]).shape == (8, 2)  # eight images are enough
    # The squares of large features overflow in float32.
    np.testing.assert_allclose(embed(2.0**100 * features), points)
    line = embed(features[:, :1])  # a single feature does not have two principal components
    np.testing.assert_array_equal(line, embed(features[:, :1]))
    assert line.shape == (9, 2)
    assert embed(np.tile(features[:1], (9, 1))) is None  # equal images have no map
    broken = features.copy()
    broken[3, 2] = math.inf
    assert embed(broken) is None


def test_the_capacity_gap_has_a_point_for_each_teacher_in_the_order_of_their_size():
    runs = []
    for size, model in ((4e6, "a_large"), (1e5, "z_small"), (1e6, "b_middle")):
        for seed in (0, 1):
            run = a_run("bdkd", seed, data={"teacher": model})
            run.config["networks"]["teacher"]["model"] = model
            run.summary["networks"]["teacher"] |= {"parameters": size, "model": model}
            run.summary["networks"]["student_ema"]["top1"] = told_apart(model, seed)
            runs.append(run)
    card = cards_of(page_of(runs))["Capacity gap: student accuracy over teacher size"]
    models = ["z_small", "b_middle", "a_large"]
    tops = {m: [told_apart(m, seed) for seed in (0, 1)] for m in models}
    assert rows_of(card) == [
        ["student", "teacher", "teacher's parameters", "student's top-1"],
        *(["resnet8, bdkd", m, size, of_seeds(tops[m], True)]
          for m, size in zip(models, ("100,000", "1,000,000", "4,000,000"), strict=True)),
    ]  # fmt: skip
    chart = with_class(card, "svg", "chart")[0]
    axes = Axes(chart, log_x=True)
    [path] = with_class(chart, "path", "line")
    axes.assert_drawn(path, [1e5, 1e6, 4e6], np.array([mean(tops[m]) for m in models]))
    assert [words(e) for e in with_class(chart, "text", "halo")] == models
    [band] = [points_of(p)[0] for p in with_class(chart, "path", "band")]
    expected = [*(max(tops[m]) for m in models), *(min(tops[m]) for m in models[::-1])]
    np.testing.assert_allclose(axes.y(band[:, 1]), expected, atol=axes.near[1])


def test_the_sizes_of_several_teachers_are_added():
    runs = []
    for k in (1, 2):
        run = a_run("bdkd", 0, data={"teachers": k})
        run.config["networks"]["other"] = {"role": "teacher", "model": "vgg8"}
        run.summary["networks"]["other"] = {"role": "teacher", "model": "vgg8", "parameters": 7 * k}
        runs.append(run)
    body = page_of(runs)
    table = rows_of(cards_of(body)["Capacity gap: student accuracy over teacher size"])
    assert [row[1:3] for row in table[1:]] == [
        ["wrn_40_2 + vgg8", "10,007"], ["wrn_40_2 + vgg8", "10,014"],
    ]  # fmt: skip


def test_shares_of_step_time_add_up_over_all_phases():
    run = a_run("bdkd", 0)
    phases = [{"name": "backward", "milliseconds": 6.0}, {"name": "forward", "milliseconds": 2.0}]
    run.profile = {"device": "cuda:0", "steps": 20, "phases": phases,
                   "host": [{"name": "data", "milliseconds": 4.0}]}  # fmt: skip
    cards = cards_of(page_of([run]))
    card = cards["Time of a training step: bdkd-0, cuda:0"]
    assert rows_of(card) == [
        ["phase", "time", "share"], ["backward", "6 ms", "75.00%"], ["forward", "2 ms", "25.00%"],
    ]  # fmt: skip
    assert (
        words(with_class(card, "p", "note")[0]) == "Mean over 20 recorded steps. A step takes 8 ms."
    )
    assert rows_of(cards["Time of a training step: bdkd-0, host"])[1:] == [
        ["data", "4 ms", "100.00%"]
    ]
