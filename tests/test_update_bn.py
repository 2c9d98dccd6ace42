"""``bdkd update-bn`` recomputes the statistics of batch norm on training images."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small_runs import components_of
from torch import nn

from bdkd.cli import main
from bdkd.config import parse_recipe, to_toml
from bdkd.engine.state import TrainingState, snapshot
from bdkd.export.formats import read_exported
from bdkd.runs.checkpoint import load_checkpoint, save_checkpoint
from bdkd.runs.update_bn import update_bn

pytestmark = pytest.mark.usefixtures("without_figures")

TINY = str(Path(__file__).parent / "training" / "tiny.toml")


@pytest.fixture(scope="module")
def run(without_figures, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    main(["train", TINY, "--run-dir", str(run), "--train.ema-decay", "0.9", "--quiet"])
    return run


def networks(path: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(path)[1]
    return {**state["networks"], **{f"ema.{k}": v for k, v in state["ema"]["student_ema"].items()}}


def test_statistics_are_recomputed_and_nothing_else_changes(run, capsys):
    """A wrong statistic is corrected. Weights, moments and random states do not change."""
    source = max((run / "checkpoints").glob("step-*.pt"))
    text, state = load_checkpoint(source)
    spoilt = run / "spoilt.pt"
    key = next(k for k in state["ema"]["student_ema"] if k.endswith("running_mean"))
    state["ema"]["student_ema"][key] += 100
    save_checkpoint(spoilt, text, state)
    main(["update-bn", str(spoilt), "--output", str(run / "mended.pt")])
    [row] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("student_ema")]
    measured = []
    for path in (spoilt, run / "mended.pt"):
        main(["evaluate", str(path), "--json"])
        measured.append(json.loads(capsys.readouterr().out)["networks"]["student_ema"])
    assert row.split()[1:] == [
        f"{100 * network[metric]:.2f}%" for metric in ("top1", "ece") for network in measured
    ]
    assert measured[0]["nll"] != measured[1]["nll"]
    before, after = networks(source), networks(run / "mended.pt")
    assert (after[f"ema.{key}"] - before[f"ema.{key}"]).abs().max() < 10
    for name, value in before.items():
        if "running_" not in name and "num_batches" not in name:
            assert torch.equal(value, after[name]), name
    old, new = load_checkpoint(source)[1], load_checkpoint(run / "mended.pt")[1]
    for rank_before, rank_after in zip(old["ranks"], new["ranks"], strict=True):
        assert torch.equal(rank_before["rng"]["cpu"], rank_after["rng"]["cpu"])
    assert old["position"] == new["position"]


def test_an_output_is_not_overwritten_without_force(run, capsys):
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


def test_an_export_does_not_contain_earlier_metrics(run, tmp_path):
    """The metrics in the run's summary were measured with the replaced statistics."""
    main(["update-bn", str(run), "--images", "8", "--output", str(tmp_path / "new.pt")])
    for source, measured in ((run, True), (tmp_path / "new.pt", False)):
        output = tmp_path / f"{measured}" / "model.safetensors"
        main(["export", str(source), "--to", "safetensors", "--output", str(output)])
        assert bool(read_exported(output).facts.metrics) is measured


def plain_statistics(network: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the mean over batches of the mean and the unbiased variance of each norm's inputs."""
    found: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def see(_, inputs):
            x = inputs[0].double().transpose(0, 1).flatten(1)  # (C, B * H * W)
            found.setdefault(f"{name}.running_mean", []).append(x.mean(1))
            found.setdefault(f"{name}.running_var", []).append(x.var(1))

        module.register_forward_pre_hook(see)

    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            watch(name, module)
    network.train()
    with torch.no_grad():
        for images in batches:
            network(images)
    return {key: torch.stack(values).mean(0) for key, values in found.items()}


@pytest.mark.parametrize(("images", "batches"), [(None, 12), (3, 1), (8, 2), (11, 2)])
def test_the_statistics_are_the_means_over_whole_training_batches(run, tmp_path, images, batches):
    """There are 48 training images in batches of 4. The cases are an epoch, less than a batch, and
    more than two batches."""
    source, output = max((run / "checkpoints").glob("step-*.pt")), tmp_path / "new.pt"
    done = update_bn(source, output, images, "cpu", None)
    assert (done.images, done.split) == (4 * batches, "val")
    text, state = load_checkpoint(source)
    recipe = dataclasses.replace(parse_recipe(text, "a checkpoint"), device="cpu")
    components = components_of(recipe)
    components.networks.load_state_dict(state["networks"])
    average = copy.deepcopy(components.networks.members["student"])
    average.load_state_dict(state["ema"]["student_ema"])
    members = {**components.networks.members, "student_ema": average}
    views = [batch.views[0] for batch in components.source.train_batches(0, 0, 4, 1)][:batches]
    after = load_checkpoint(output)[1]
    assert [name for name, *_ in done.results] == list(members)
    for name, network in members.items():
        written = after["ema"].get(name) or {
            key.removeprefix(f"members.{name}."): value for key, value in after["networks"].items()
        }
        expected = plain_statistics(network, views)
        assert len(expected) >= 10
        for key, value in expected.items():
            torch.testing.assert_close(written[key].double(), value, rtol=1e-4, atol=1e-5)


def test_a_frozen_network_keeps_its_statistics(run, tmp_path):
    source = max((run / "checkpoints").glob("step-*.pt"))
    text, state = load_checkpoint(source)
    frozen = parse_recipe(text, "a checkpoint")
    teacher = frozen.networks["teacher"]
    teacher = dataclasses.replace(teacher, frozen=True, weights="random")
    frozen = dataclasses.replace(frozen, networks={**frozen.networks, "teacher": teacher})
    # A frozen network has no moments, so the optimizer state is that of a run without it.
    components = components_of(frozen)
    of_run = TrainingState(components)
    fresh = snapshot(of_run.state_dict())
    save_checkpoint(tmp_path / "frozen.pt", to_toml(frozen), {
        **state, "optimizer": fresh["optimizer"],
    })  # fmt: skip
    done = update_bn(tmp_path / "frozen.pt", tmp_path / "new.pt", 8, "cpu", None)
    assert [name for name, *_ in done.results] == ["student", "student_ema"]
    before, after = networks(tmp_path / "frozen.pt"), networks(tmp_path / "new.pt")
    changed = {key.split(".")[1] for key in before if not torch.equal(before[key], after[key])}
    assert "teacher" not in changed
    assert "student" in changed
