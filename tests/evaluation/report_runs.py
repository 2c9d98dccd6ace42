"""Make runs for the tests of the report, without folders. All numbers of all networks, seeds and
steps differ, so that a test detects a number in the wrong place."""

from array import array
from pathlib import Path
from statistics import mean, stdev
from xml.etree.ElementTree import Element

import numpy as np
import pytest
from svg_marks import body_of

from bdkd.evaluation.predictions import NetworkPredictions, Predictions, featured_images
from bdkd.evaluation.report.groups import group_runs
from bdkd.evaluation.report.page import render
from bdkd.evaluation.report.runs import Run, Series

SEEDS = (0, 1, 2)
STEPS = range(5, 61, 5)
STEPS_PER_EPOCH = 20
# A teacher, and a student with a moving average, which the report shows instead of the student.
ROLES = {"teacher": "teacher", "student": "student", "student_ema": "student"}
METRICS = ("top1", "ece", "ece_if_calibrated", "ece_scaled", "nll", "brier")
MODELS = {"teacher": "wrn_40_2", "student": "resnet8", "student_ema": "resnet8"}
IMAGES = 90


def told_apart(*key: object) -> float:
    """Return a number between 0.1 and 0.9 that is different for each key."""
    return float(np.random.default_rng(list(repr(key).encode())).uniform(0.1, 0.9))


def predictions(method: str, seed: int) -> Predictions:
    rng = np.random.default_rng([seed, *method.encode()])
    target = np.arange(IMAGES) % 3
    featured = featured_images(target)[::2]
    networks = {}
    for k, name in enumerate(ROLES):
        wrong = rng.random(IMAGES) < 0.2 + 0.1 * k
        features = rng.normal(size=(len(featured), 4)) + 9 * np.eye(3, 4)[target[featured]]
        networks[name] = NetworkPredictions(
            rng.uniform(0.35, 1, IMAGES),
            (rng.normal(1 + 0.1 * k, 0.2, IMAGES)).astype(np.float32),
            np.where(wrong, (target + 1) % 3, target),
            features.astype(np.float16),
        )
    return Predictions(("ape", "bee", "cat"), target, featured, networks)


def a_run(method: str, seed: int, finished: bool = True, **config: object) -> Run:
    networks = {n: {"model": MODELS[n], "role": r} for n, r in ROLES.items() if "ema" not in n}
    series = {}
    for name in ROLES:
        for metric in ("loss", "top1", "ece", "nll", "entropy"):
            for split, steps in (("train", STEPS), ("val", STEPS[3::4])):
                if split == "train" and name.endswith("_ema"):
                    continue
                values = [told_apart(method, name, metric, split, seed, s) for s in steps]
                series[name, split, metric] = Series(array("d", steps), array("d", values))
    for metric in ("forward_weight", "reverse_weight", "forward_kl", "reverse_kl",
                   "images_per_second", "data_wait"):  # fmt: skip
        values = [told_apart(method, metric, seed, s) for s in STEPS]
        series["", "train", metric] = Series(array("d", STEPS), array("d", values))
    results = {
        name: {"parameters": 10_000 * (k + 1), "model": MODELS[name], "role": role,
               **{m: told_apart(method, name, m, seed) for m in METRICS}}
        for k, (name, role) in enumerate(ROLES.items())
    }  # fmt: skip
    return Run(
        Path(f"runs/{method}-{seed}"), f"{method}-{seed}",
        {"name": "tiny", "seed": seed, "objective": {"name": method}, "networks": networks,
         **config}, f"seed = {seed}",
        {"method": method, "wall_seconds": 100.0 + seed, "networks": results} if finished else {},
        series, STEPS_PER_EPOCH, predictions(method, seed) if finished else None, {},
        [] if finished else ["not finished"],
    )  # fmt: skip


SEEDS_OF = {"bdkd": SEEDS, "dkd": SEEDS[:2]}


def of_seeds(values: list[float], percents: bool) -> str:
    scale, digits, unit = (100, 2, "%") if percents else (1, 3, "")
    return f"{scale * mean(values):.{digits}f} ± {scale * stdev(values):.{digits}f}{unit}"


def page_of(runs: list[Run]) -> Element:
    """Return the body of the page of runs, without t-SNE maps, which take a second each."""
    return body_of(render(group_runs(runs), [], tsne=False, title="")[0])


@pytest.fixture(scope="module")
def body() -> Element:
    """Return the page of two methods with three and two seeds."""
    runs = [a_run(method, seed) for method, seeds in SEEDS_OF.items() for seed in seeds]
    page, warnings = render(group_runs(runs), [], tsne=False, title="A title")
    assert warnings == []
    return body_of(page)
