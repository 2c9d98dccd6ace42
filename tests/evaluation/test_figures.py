"""Figures: whole PNG files that show what they were given, and no trace of a global matplotlib."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from bdkd.evaluation import figures
from bdkd.evaluation.calibration import Calibration, CalibrationResult


def result_of(samples: int, classes: int = 10, poison: bool = False) -> CalibrationResult:
    generator = torch.Generator().manual_seed(samples)
    logits = 3 * torch.randn(samples, classes, generator=generator)
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    if poison:
        logits[0] = math.nan
    calibration = Calibration(classes)
    calibration.update(logits, target)
    return calibration.compute(draws=10)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, beside their files."""
    saved, save = [], figures._save

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "_save", keep)
    return saved


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    pixels = imread(path)  # decodes every row
    assert pixels.shape[:2] == (height, width)
    assert pixels.std() > 0.05
    return width, height


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_reliability_shows_networks_side_by_side_with_their_numbers(tmp_path, drawn):
    results = {"student": result_of(360), "teacher": result_of(5000, 100)}
    path = tmp_path / "reliability.png"
    figures.reliability_diagram(results, path, "digits: test images")
    width, height = png_size(path)
    assert 1500 < width < 2000 > height
    (figure,) = drawn
    assert "digits: test images" in texts(figure)
    for column, (name, result) in enumerate(results.items()):
        upper, lower = figure.axes[2 * column : 2 * column + 2]
        title, headline = texts(upper)
        assert title == name
        for shown in (f"{result.top1:.1%}", f"{result.nll:.3f}", f"{result.ece:.1%}"):
            assert shown in headline
        assert f"chance: {result.ece_if_calibrated:.1%}" in headline
        heights = [bar.get_height() for bar in lower.patches]
        assert heights == list(result.bin_count)
        assert texts(lower) == [figures._short(n) for n in result.bin_count if n]
        # Accuracy and gap of a bin stack up to the larger of accuracy and confidence.
        tops = {}
        for bar in upper.patches:
            k = round(bar.get_x() * 15)
            tops[k] = max(tops.get(k, 0.0), bar.get_y() + bar.get_height())
        for k, n in enumerate(result.bin_count):
            larger = max(result.bin_accuracy[k], result.bin_confidence[k])
            assert (k in tops) == (n > 0)
            assert tops.get(k, 0.0) == pytest.approx(larger)


@pytest.mark.parametrize("networks", [1, 3])
def test_reliability_of_other_numbers_of_networks(tmp_path, networks):
    results = {f"network{k}": result_of(50 + k) for k in range(networks)}
    path = tmp_path / "reliability.png"
    figures.reliability_diagram(results, path, "title")
    assert png_size(path)[0] == pytest.approx(200 * (0.75 + 4 * networks), abs=1)


def test_reliability_of_a_network_that_broke(tmp_path):
    path = tmp_path / "reliability.png"
    figures.reliability_diagram({"student": result_of(1, poison=True)}, path, "one NaN")
    png_size(path)
    figures.reliability_diagram({"student": result_of(40, poison=True)}, path, "a NaN among 40")
    png_size(path)
    with pytest.raises(ValueError, match="at least one network"):
        figures.reliability_diagram({}, path, "none")


@pytest.mark.parametrize(("rate", "count"), [(0.0, 1), (1.0, 3), (0.5, 10), (0.97, 5000)])
def test_wilson_holds_the_rates_within_z_standard_errors(rate, count):
    low, high = figures.wilson(rate, count)
    assert -1e-12 <= low <= rate + 1e-12
    assert rate - 1e-12 <= high <= 1 + 1e-12
    for bound in (low, high):  # its definition: |rate - bound| = z sqrt(bound (1 - bound) / n)
        spread = math.sqrt(max(bound * (1 - bound), 0.0) / count)
        assert abs(rate - bound) == pytest.approx(1.959964 * spread, abs=1e-6)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(7, "7"), (999, "999"), (1234, "1.2k"), (9949, "9.9k"), (9950, "10k"), (43210, "43k")],
)
def test_counts_fit_over_their_bars(count, shown):
    assert figures._short(count) == shown


def metrics_lines(steps: int, weight: bool = True) -> list[dict]:
    lines = []
    for step in range(10, steps + 1, 10):
        network = {"loss": 2 / step, "top1": 1 - 1 / step, "ece": 0.1, "nll": 0.3, "entropy": 0.5}
        line = {"step": step, "epoch": 0, "split": "train", "images_per_second": 1e3}
        line |= {"student": network, "teacher": network | {"entropy": 0.4}}
        lines.append(line | ({"forward_weight": 1.5} if weight else {}))
        if step % 50 == 0:
            seen = {name: value for name, value in network.items() if name != "loss"}
            lines.append({"step": step, "epoch": 0, "split": "val", "student": seen,
                          "teacher": seen, "student_ema": seen})  # fmt: skip
    return lines


def write(path: Path, lines: list[dict], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def panels(figure) -> dict:
    return {a.get_title(loc="left"): a for a in figure.axes if a.get_visible()}


def test_curves_show_every_network_and_the_weight(tmp_path, drawn):
    metrics = write(tmp_path / "metrics.jsonl", metrics_lines(200), tail='{"step": 21')
    figures.training_curves(metrics, tmp_path / "curves.png")
    png_size(tmp_path / "curves.png")
    shown = panels(drawn[0])
    lines = {title: len(axes.lines) for title, axes in shown.items()}
    assert lines == {
        "training loss": 2,
        "top-1": 5,  # both in training, three in validation
        "entropy (nats)": 5,
        "mean weight of the forward KL": 1,
    }
    x, y = shown["training loss"].lines[0].get_data()
    assert list(x) == list(range(10, 201, 10))
    np.testing.assert_allclose(y, [2 / step for step in x])
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["student", "teacher", "student_ema", "training", "validation"]


def test_curves_without_a_weight_and_with_gaps(tmp_path, drawn):
    lines = metrics_lines(50, weight=False)
    lines[1]["student"]["loss"] = math.nan
    lines[2]["teacher"]["loss"] = None
    metrics = write(tmp_path / "metrics.jsonl", lines)
    figures.training_curves(metrics, tmp_path / "curves.png")
    png_size(tmp_path / "curves.png")
    shown = panels(drawn[0])
    assert set(shown) == {"training loss", "top-1", "entropy (nats)"}
    student, teacher = (line.get_ydata() for line in shown["training loss"].lines)
    assert np.isnan(student).tolist() == [False, True, False, False, False]
    assert np.isnan(teacher).tolist() == [False, False, True, False, False]


def test_curves_of_a_broken_file_name_it(tmp_path):
    path = tmp_path / "curves.png"
    metrics = write(tmp_path / "metrics.jsonl", [])
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no metrics"):
        figures.training_curves(metrics, path)
    metrics.write_text('{"step": 1, "split"\n{"step": 2, "split": "train"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1, is no JSON"):
        figures.training_curves(metrics, path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        figures.training_curves(tmp_path / "nowhere.jsonl", path)
    assert not path.exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "reliability.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", fail)
        with pytest.raises(OSError, match="No space left"):
            figures.reliability_diagram({"student": result_of(20)}, path, "title")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        figures.reliability_diagram({"student": result_of(20)}, tmp_path / "no" / "r.png", "title")


def test_the_same_results_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        figures.reliability_diagram({"student": result_of(20)}, tmp_path / name, "title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path):
    metrics = write(tmp_path / "metrics.jsonl", metrics_lines(50))
    program = f"""
import sys
from pathlib import Path
from bdkd.evaluation import figures
assert "matplotlib" not in sys.modules, "imported with the module"
figures.training_curves(Path({str(metrics)!r}), Path({str(tmp_path / "curves.png")!r}))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
