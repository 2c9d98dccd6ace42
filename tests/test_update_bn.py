"""``bdkd update-bn``: statistics of batch norm recomputed on training images."""

import json
from pathlib import Path

import pytest
import torch

from bdkd.cli import main
from bdkd.training.checkpoint import load_checkpoint, save_checkpoint
from bdkd.training.exported import read_exported

TINY = str(Path(__file__).parent / "training" / "tiny.toml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    main(["train", TINY, "--run-dir", str(run), "--train.ema-decay", "0.9", "--quiet"])
    return run


def networks(path: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(path)[1]
    return {**state["networks"], **{f"ema.{k}": v for k, v in state["ema"]["student_ema"].items()}}


def test_statistics_are_recomputed_and_nothing_else_changes(run, capsys):
    """A statistic spoilt by hand comes out right; weights, moments and random states stay."""
    source = max((run / "checkpoints").glob("step-*.pt"))
    text, state = load_checkpoint(source)
    spoilt = run / "spoilt.pt"
    key = next(k for k in state["ema"]["student_ema"] if k.endswith("running_mean"))
    state["ema"]["student_ema"][key] += 100
    save_checkpoint(spoilt, text, state)
    main(["update-bn", str(spoilt), "--output", str(run / "mended.pt")])
    assert "student_ema" in capsys.readouterr().out
    before, after = networks(source), networks(run / "mended.pt")
    assert (after[f"ema.{key}"] - before[f"ema.{key}"]).abs().max() < 10
    for name, value in before.items():
        if "running_" not in name and "num_batches" not in name:
            assert torch.equal(value, after[name]), name
    old, new = load_checkpoint(source)[1], load_checkpoint(run / "mended.pt")[1]
    for rank_before, rank_after in zip(old["ranks"], new["ranks"], strict=True):
        assert torch.equal(rank_before["rng"]["cpu"], rank_after["rng"]["cpu"])
    assert old["position"] == new["position"]
    capsys.readouterr()
    main(["evaluate", str(run / "mended.pt"), "--json"])
    assert json.loads(capsys.readouterr().out)["networks"].keys() >= {"student_ema"}


def test_an_output_is_never_overwritten_unasked(run, capsys):
    main(["update-bn", str(run), "--images", "8"])
    [written] = (run / "update-bn").iterdir()
    content = written.read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["update-bn", str(run)])
    assert ended.value.code == 1
    assert "--force" in capsys.readouterr().err
    assert written.read_bytes() == content
    with pytest.raises(SystemExit) as ended:
        main(["update-bn", str(written), "--output", str(written), "--force"])
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        main(["update-bn", str(run), "--images", "0", "--force"])
    assert ended.value.code == 2


def test_an_export_does_not_claim_what_was_measured_before(run, tmp_path):
    """The run's summary is of the statistics that were replaced."""
    main(["update-bn", str(run), "--images", "8", "--output", str(tmp_path / "new.pt")])
    for source, measured in ((run, True), (tmp_path / "new.pt", False)):
        output = tmp_path / f"{measured}" / "model.safetensors"
        main(["export", str(source), "--to", "safetensors", "--output", str(output)])
        assert bool(read_exported(output).facts.metrics) is measured


def test_a_run_with_the_average_keeps_up_with_its_student(tmp_path):
    """With a constant rate the average was at chance: it had its student's statistics."""
    run = tmp_path / "run"
    main(["train", "digits", "--networks.teacher.model", "resnet8", "--train.ema-decay", "0.99",
          "--schedule.name", "constant", "--schedule.warmup", "0", "--train.epochs", "6", "--log",
          "--train.select", "last", "--run-dir", str(run), "--quiet"])  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "val"][-3:]
    student, average = (
        sum(line[name]["top1"] for line in last) / 3 for name in ("student", "student_ema")
    )
    assert average > student - 0.05
