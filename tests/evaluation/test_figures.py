"""Figures are complete PNG files that show the given data, and do not use the state of pyplot."""

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
from scipy import stats

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
    """Return a list of the figures that are saved to files during the test."""
    saved, save = [], figures.save_figure

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save_figure", keep)
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


def test_reliability_diagrams_are_side_by_side_with_their_metrics(tmp_path, drawn):
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
        assert f"ECE {result.ece:.1%} (chance" in headline
        assert texts(lower) == [figures._short(n) for n in result.bin_count if n]
        assert_bins_are_drawn(upper, result, legend_of(figure))
        np.testing.assert_allclose([b.get_height() for b in lower.patches], result.bin_count)
        middles = [b.get_x() + b.get_width() / 2 for b in lower.patches]
        np.testing.assert_allclose(middles, [(k + 0.5) / 15 for k in range(15)])
        # The counts of all networks have the same scale, with space above the highest bar.
        low, high = lower.get_ylim()
        assert low == 0
        assert max(max(r.bin_count) for r in results.values()) < high
        assert high == figure.axes[1].get_ylim()[1]
        assert upper.get_xlim() == lower.get_xlim() == (0, 1)


def legend_of(figure) -> dict:
    [legend] = figure.legends
    return {text.get_text(): handle for text, handle in
            zip(legend.get_texts(), legend.legend_handles, strict=True)}  # fmt: skip


def assert_bins_are_drawn(axes, result: CalibrationResult, legend: dict) -> None:
    """Check every bin: a bar up to the smaller of accuracy and confidence, the gap up to the larger
    one in the hatch of the legend, and Wilson's interval of the accuracy as computed by SciPy."""
    bars, intervals = {}, {}
    for bar in axes.patches:
        assert bar.get_width() == pytest.approx(1 / 15)
        bars.setdefault(round(bar.get_x() * 15, 6), []).append(bar)
    *lines, diagonal = axes.lines
    for line in lines:
        intervals[round(line.get_xdata()[0] * 15 - 0.5, 6)] = sorted(line.get_ydata())
    occupied = [k for k, n in enumerate(result.bin_count) if n]
    assert [*bars] == [*intervals] == occupied
    for k in occupied:
        accuracy, confidence, n = (
            result.bin_accuracy[k], result.bin_confidence[k], result.bin_count[k],
        )  # fmt: skip
        lower, upper = sorted((accuracy, confidence))
        bar, gap = bars[k]
        assert (bar.get_y(), bar.get_height()) == pytest.approx((0, lower))
        assert (gap.get_y(), gap.get_height()) == pytest.approx((lower, upper - lower))
        name = "overconfident by" if confidence > accuracy else "underconfident by"
        assert bar.get_facecolor() == legend["accuracy"].get_facecolor()
        assert gap.get_facecolor() == legend[name].get_facecolor()
        assert gap.get_hatch() == legend[name].get_hatch()
        expected = stats.binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
        assert intervals[k] == pytest.approx([expected.low, expected.high], abs=1e-6)
    np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])
    assert diagonal.get_linestyle() == legend["calibrated"].get_linestyle()


@pytest.mark.parametrize("networks", [1, 3])
def test_reliability_diagrams_of_one_and_three_networks(tmp_path, networks):
    results = {f"network{k}": result_of(50 + k) for k in range(networks)}
    path = tmp_path / "reliability.png"
    figures.reliability_diagram(results, path, "title")
    assert png_size(path)[0] == pytest.approx(200 * (0.75 + 4 * networks), abs=1)


def test_reliability_diagrams_with_nan_and_without_networks(tmp_path):
    path = tmp_path / "reliability.png"
    figures.reliability_diagram({"student": result_of(1, poison=True)}, path, "one NaN")
    png_size(path)
    figures.reliability_diagram({"student": result_of(40, poison=True)}, path, "a NaN among 40")
    png_size(path)
    with pytest.raises(ValueError, match="at least one network"):
        figures.reliability_diagram({}, path, "none")


@pytest.mark.parametrize(("rate", "count"), [(0.0, 1), (1.0, 3), (0.5, 10), (0.97, 5000)])
def test_wilson_bounds_are_z_standard_errors_from_the_rate(rate, count):
    low, high = figures.wilson(rate, count)
    assert -1e-12 <= low <= rate + 1e-12
    assert rate - 1e-12 <= high <= 1 + 1e-12
    for bound in (low, high):  # definition: |rate - bound| = z sqrt(bound (1 - bound) / n)
        spread = math.sqrt(max(bound * (1 - bound), 0.0) / count)
        assert abs(rate - bound) == pytest.approx(1.959964 * spread, abs=1e-6)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(7, "7"), (999, "999"), (1234, "1.2k"), (9949, "9.9k"), (9950, "10k"), (43210, "43k")],
)
def test_counts_over_bars_are_short(count, shown):
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
    """All values differ. Networks are in the order of the file, which is not alphabetical."""
    trained, validated, points = ("teacher", "student"), ("teacher", "student", "student_ema"), {}

    def values(step: int, split: str, names) -> dict:
        found = {}
        for k, name in enumerate(names):
            for m, metric in enumerate(("loss", "top1", "entropy", "ece")):
                if split == "train" or metric != "loss":
                    value = (1 + k) / (step + 7 * m) + (split == "val") / 50
                    found.setdefault(name, {})[metric] = value
                    points.setdefault((name, split, metric), []).append((step, value))
        return found

    lines = []
    for step in range(10, 101, 10):
        line = {"step": step, "epoch": 0, "split": "train", "images_per_second": 1e3}
        lines.append(line | values(step, "train", trained) | {"forward_weight": 1 + step / 500})
        if step % 50 == 0:
            lines.append({"step": step, "split": "val"} | values(step, "val", validated))
    metrics = write(tmp_path / "metrics.jsonl", lines, tail='{"step": 21')
    figures.training_curves(metrics, tmp_path / "curves.png")
    png_size(tmp_path / "curves.png")
    [figure] = drawn
    legend = legend_of(figure)
    assert [*legend] == ["teacher", "student", "student_ema", "training", "validation"]
    assert len({legend[name].get_color() for name in validated}) == 3
    shown = panels(figure)
    titles = {"training loss": "loss", "top-1": "top1", "entropy (nats)": "entropy"}
    assert [*shown] == [*titles, "mean weight of the forward KL"]
    for title, metric in titles.items():
        expected = {
            (legend[name].get_color(), split): series
            for (name, split, of), series in points.items() if of == metric
        }  # fmt: skip
        came = {}
        for line in shown[title].lines:
            # Thin lines show the training. Thick lines with dots show the validation.
            split = "train" if line.get_linewidth() < 1.5 else "val"
            assert line.get_marker() == ("None" if split == "train" else "o")
            came[line.get_color(), split] = [(x, y) for x, y in zip(*line.get_data(), strict=True)]
        assert came == expected
    assert shown["top-1"].yaxis.get_major_formatter()(0.5, 0) == "50%"
    [weight] = shown["mean weight of the forward KL"].lines
    assert list(weight.get_xdata()) == list(range(10, 101, 10))
    np.testing.assert_allclose(weight.get_ydata(), [1 + s / 500 for s in range(10, 101, 10)])


def test_curves_without_a_weight_and_with_missing_values(tmp_path, drawn):
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


def test_an_error_about_curves_names_the_file(tmp_path):
    path = tmp_path / "curves.png"
    metrics = write(tmp_path / "metrics.jsonl", [])
    with pytest.raises(ValueError, match=r"metrics\.jsonl contains no metrics"):
        figures.training_curves(metrics, path)
    metrics.write_text('{"step": 1, "split"\n{"step": 2, "split": "train"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1, is not JSON"):
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


def test_matplotlib_is_imported_on_use_and_without_pyplot(tmp_path):
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
