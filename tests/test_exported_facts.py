"""The facts and the model card of an exported network agree with the files of its run."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import TINY_RUN
from torch import nn

from bdkd import create_model
from bdkd.cli import main
from bdkd.config import load_recipe, parse_recipe
from bdkd.data.base import Normalisation
from bdkd.engine.networks import with_model_options
from bdkd.errors import RunError
from bdkd.export.card import model_card
from bdkd.export.export import export
from bdkd.export.facts import Exported, Facts
from bdkd.export.formats import FORMATS, open_network, read_exported
from bdkd.export.trained import _commit, open_trained
from bdkd.runs.checkpoint import load_checkpoint
from bdkd.runs.weights import network_weights

NETWORKS = ("teacher", "student", "student_ema")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a run of three epochs of 12 steps. Each epoch is validated and saved, and the last one
    is also measured on the test images. The teacher starts from weights in another file."""
    folder = tmp_path_factory.mktemp("runs")
    weights = folder / "first.pt"
    torch.manual_seed(1)
    torch.save(create_model("resnet8", 3).state_dict(), weights)
    main(["train", *TINY_RUN, "--seed", "5", "--checkpoint.every-steps", "12",
          "--networks.teacher.weights", str(weights), "--train.ema-decay", "0.9", "--quiet",
          "--run-dir", str(folder / "run")])  # fmt: skip
    return folder / "run"


def card_of(facts: Facts, name: str) -> str:
    """Return the card of a folder with one file."""
    return model_card([Exported(Path(name), "safetensors", b"", facts, "")])


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}.pt"


def numbers(values: dict) -> dict:
    """Return the metrics of a network, without its name and size and without the training loss."""
    return {k: v for k, v in values.items() if isinstance(v, float) and k != "loss"}


@pytest.fixture(scope="module")
def trained(run) -> dict:
    return {
        (name, step): open_trained(checkpoint(run, step), name, None)
        for name in NETWORKS for step in (24, 36)
    }  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_facts_describe_the_network_at_its_step(name, run, trained):
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert summary["selected_step"] == 36
    [validated] = [x for x in lines if (x["step"], x["split"]) == (24, "val")]
    recipe = with_model_options(load_recipe(TINY_RUN[0]))
    for step, split, images, values in (
        (24, "val", 0, validated[name]),
        (36, "test", summary["images"], summary["networks"][name]),
    ):
        facts = trained[name, step].facts
        assert (facts.measured_on, facts.images) == (split, images)
        assert facts.metrics == numbers(values)
        assert (facts.network, facts.step, facts.seed, facts.model) == (name, step, 5, "resnet8")
        assert facts.role == ("teacher" if name == "teacher" else "student")
        assert facts.parameters == sum(p.numel() for p in create_model("resnet8", 3).parameters())
        assert facts.method == "bdkd"
        assert facts.classes == ("0", "1", "2")
        assert facts.input_shape == (3, 8, 8)
        assert facts.versions["torch"] == torch.__version__
        # The recipe is that of the run, without paths of this machine.
        published = parse_recipe(facts.recipe, source="the facts")
        assert published.seed == 5
        assert published.networks == recipe.networks
        assert published.train.ema_decay == 0.9
        assert published.run_dir is None
        assert str(run.parent) not in facts.recipe


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_has_the_weights_of_the_checkpoint(name, run, trained):
    for step in (24, 36):
        came = trained[name, step]
        assert not came.network.training
        saved = load_checkpoint(checkpoint(run, step))[1]
        weights = network_weights(saved, name, checkpoint(run, step))
        own = saved["ema"]["student"] if name == "student_ema" and "student" in saved["ema"] else {}
        for key, value in came.network.state_dict().items():
            assert torch.equal(value, weights[key]), key
            assert key not in own or torch.equal(value, own[key])
    first, average = (trained[n, 36].network.state_dict() for n in ("student", "student_ema"))
    assert any(not torch.equal(first[key], average[key]) for key in first)


def test_check_images_are_normalised_as_in_the_facts(trained):
    """Reversing ``(value - mean) / std`` per channel gives whole numbers from 0 to 255."""
    came = trained["student", 24]
    norm = came.facts.normalisation
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (norm.mean, norm.std))
    pixels = came.images * std + mean
    assert norm.largest == 255
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)
    assert 0 <= pixels.round().min() < pixels.round().max() <= 255
    assert pixels.std() > 20


def test_a_checkpoint_outside_its_run_has_no_metrics(run, tmp_path):
    """``bdkd update-bn`` writes such checkpoints. The run's metrics are for other statistics."""
    (tmp_path / "other").mkdir()
    other = shutil.copy(checkpoint(run, 36), tmp_path / "other" / "step-00000036.pt")
    for name in ("summary.json", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path / name)
    facts = open_trained(Path(other), "student", None).facts
    assert (facts.measured_on, facts.images, facts.metrics) == ("", 0, {})
    card = card_of(facts, "model.safetensors")
    assert "Not measured yet" in card
    assert "model-index" not in card


# --- the model card ------------------------------------------------------------------------------

# Metric -> (name on the Hugging Face Hub, text in the card).
ON_CARD = {
    "top1": ("accuracy", "top-1 accuracy"), "top5": ("top_5_accuracy", "top-5 accuracy"),
    "nll": ("nll", "negative log likelihood"), "brier": ("brier_score", "Brier"),
    "ece": ("expected_calibration_error", "(ECE)"),
    "ece_if_calibrated": ("ece_if_calibrated", "if perfectly calibrated"),
    "mce": ("maximum_calibration_error", "(MCE)"), "adaptive_ece": ("adaptive_ece", "equal count"),
    "classwise_ece": ("classwise_ece", "class-wise"), "entropy": ("entropy", "mean entropy"),
}  # fmt: skip


@pytest.mark.parametrize("step", [24, 36])
def test_each_metric_of_a_card_has_its_value(step, trained):
    facts = trained["student_ema", step].facts
    _, front, body = card_of(facts, "model.safetensors").split("---\n", 2)
    [entry] = yaml.safe_load(front)["model-index"]
    assert entry["name"] == "tiny-student_ema"
    [result] = entry["results"]
    assert result["dataset"]["split"] == facts.measured_on
    came = {metric["type"]: metric["value"] for metric in result["metrics"]}
    measured = {key: value for key, value in facts.metrics.items() if key in ON_CARD}
    assert len(measured) == (10 if step == 36 else 7)
    assert came == {ON_CARD[key][0]: value for key, value in measured.items()}
    rows = dict(re.findall(r"^\| (.*?) \| (\d[\d.e-]*) \|$", body, re.MULTILINE))
    del rows["`model.safetensors` | fp32"]
    assert len(rows) == len(measured)
    for key, value in measured.items():
        [shown] = [text for name, text in rows.items() if ON_CARD[key][1] in name]
        assert float(shown) == pytest.approx(value, rel=1e-5), key
    where = "the test images (12 images)" if step == 36 else "the validation images (images)"
    assert f"On {where}" in body
    assert f"seed 5, the weights of step {step}." in body
    assert f"{facts.parameters:,} parameters, trained as student" in body


def test_a_card_describes_shape_pixels_and_classes(trained):
    """Images that are not square, a mean that is not a round number, and unsorted classes."""
    facts = dataclasses.replace(
        trained["student_ema", 36].facts, image_size=(6, 9), classes=("z", "a", "m"),
        normalisation=Normalisation((1 / 3, 2 / 7, 0.1), (1.5, 2.5, 1e-3), 16.0),
        metrics={"top1": 0.0, "ece": None},
    )  # fmt: skip
    text = card_of(facts, "weights.safetensors")
    assert "Images are `(batch, 3, 6, 9)`, pixel values 0 to 16, normalised by" in text
    assert "`(value - mean) / std`" in text
    assert "in this order: z, a, m." in text
    names: dict = {}
    [line] = re.findall(r"^mean, std = .*$", text, re.MULTILINE)
    exec(line, names)
    assert names["mean"] == pytest.approx([1 / 3, 2 / 7, 0.1], rel=1e-7)
    assert names["std"] == pytest.approx([1.5, 2.5, 1e-3], rel=1e-7)
    # A top-1 accuracy of 0 was measured. A metric of None was not measured.
    assert "| top-1 accuracy | 0 |" in text
    assert "(ECE)" not in text


def test_a_card_builds_the_network_with_its_options(trained):
    recipe = parse_recipe(trained["student", 36].facts.recipe, source="")
    student = dataclasses.replace(
        recipe.networks["student"], model="timm:resnet18",
        options={"drop_rate": 0.25, "pretrained": True, "stem_type": "deep"},
    )  # fmt: skip
    from bdkd.config import to_toml

    text = to_toml(dataclasses.replace(recipe, networks={**recipe.networks, "student": student}))
    facts = dataclasses.replace(trained["student", 36].facts, model="timm:resnet18", recipe=text)
    assert (
        "create_model('timm:resnet18', 3, 3, drop_rate=0.25, stem_type='deep').eval()"
        in card_of(facts, "a.safetensors")
    )


# --- what is written -----------------------------------------------------------------------------


def test_the_ema_student_is_exported_by_default(run, tmp_path, trained, capsys):
    file = tmp_path / "model.safetensors"
    main(["export", str(run), "--to", "safetensors", "--output", str(file)])
    assert "student_ema (resnet8)" in capsys.readouterr().out
    read = read_exported(file)
    assert read.facts == trained["student_ema", 36].facts
    opened = open_network(read, create_model("resnet8", 3), torch.device("cpu"))
    came = trained["student_ema", 36]
    with torch.inference_mode():
        assert torch.equal(opened(came.images), came.network(came.images))


class Shifted(nn.Module):
    """A network with wrong logits, either only for single images or only for larger batches."""

    def __init__(self, network: nn.Module, by: float, alone: bool) -> None:
        super().__init__()
        self.network, self.by, self.alone = network, by, alone

    def forward(self, x):
        shift = self.by if (len(x) == 1) == self.alone else 0.0
        return self.network(x) + shift


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("by", [3e-3, float("nan")])
def test_a_file_with_different_logits_is_not_written(by, alone, trained, tmp_path, monkeypatch):
    """An error of a thousandth of the largest logit, for one image or for several, is found."""
    came, plain = trained["student", 36], FORMATS["safetensors"]
    shifted = plain._replace(open=lambda *given: Shifted(plain.open(*given), by, alone))
    monkeypatch.setitem(FORMATS, "safetensors", shifted)
    target = tmp_path / "a.safetensors"
    with pytest.raises(RunError, match="different logits from student"):
        export(came, "safetensors", target, force=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    written = export(came, "safetensors", target, force=False)
    assert written.files == [target, tmp_path / "README.md"]
    assert written.error == 0
    with torch.inference_mode():
        assert written.largest == came.network(came.images).abs().max()


def test_the_commit_is_that_of_the_source_and_marks_changes(tmp_path):
    def git(*arguments: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *author, *arguments],
                              capture_output=True, text=True, check=True)  # fmt: skip
        return done.stdout.strip()

    source, other = tmp_path / "source.py", tmp_path / "other.py"
    source.write_text("a = 1\n")
    other.write_text("b = 1\n")
    assert _commit(source) is None  # the folder is not a checkout
    git("init", "-q")
    git("add", "source.py")
    git("commit", "-qm", "first")
    git("tag", "-am", "v1", "v1")
    assert _commit(source) == git("rev-parse", "HEAD")
    assert _commit(other) is None  # the file is not tracked in this checkout
    source.write_text("a = 2\n")
    assert _commit(source) == git("rev-parse", "HEAD") + "-dirty"
