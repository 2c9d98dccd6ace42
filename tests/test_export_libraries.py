"""``bdkd export --to timm`` and ``--to torchvision`` write files that the libraries load."""

import dataclasses
import json

import pytest
import torch
from small_runs import tiny_recipe
from vision import mended_torchvision

from bdkd.cli import main
from bdkd.config import NetworkConfig, to_toml
from bdkd.runs.checkpoint import load_checkpoint
from bdkd.runs.folder import selected_checkpoint
from bdkd.runs.weights import network_weights

mended_torchvision()
timm = pytest.importorskip("timm", exc_type=ImportError)
torchvision = pytest.importorskip("torchvision", exc_type=ImportError)

NETWORKS = {
    "teacher": NetworkConfig("imagenet_resnet18", "teacher"),
    "student": NetworkConfig("imagenet_mobilenet_v2", "student"),
    "pupil": NetworkConfig("timm:mobilenetv3_small_050", "student"),
    "reader": NetworkConfig("torchvision:mobilenet_v3_small", "student"),
    "small": NetworkConfig("resnet8", "student"),
    "narrow": NetworkConfig("imagenet_mobilenet_v2", "student", options={"width": 0.5}),
}
EXPORTS = [
    ("teacher", "timm", "resnet18"), ("teacher", "torchvision", "resnet18"),
    ("student", "timm", "mobilenetv2_100"), ("student", "torchvision", "mobilenet_v2"),
    ("pupil", "timm", "mobilenetv3_small_050"), ("reader", "torchvision", "mobilenet_v3_small"),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run of one step with networks of both libraries."""
    folder = tmp_path_factory.mktemp("libraries")
    recipe = tiny_recipe(data={"image_size": 32}, train={"batch_size": 16})
    recipe = dataclasses.replace(recipe, networks=NETWORKS)
    (folder / "recipe.toml").write_text(to_toml(recipe))
    main(["train", str(folder / "recipe.toml"), "--max-steps", "1", "--quiet",
          "--optimizer.learning-rate", "0.001", "--run-dir", str(folder / "run")])  # fmt: skip
    return folder / "run"


def tensors(run, name: str) -> dict:
    checkpoint = selected_checkpoint(run)
    return network_weights(load_checkpoint(checkpoint)[1], name, checkpoint)


def ours(run, name: str):
    from bdkd.models import create_model

    config = NETWORKS[name]
    network = create_model(config.model, 3, 3, **config.options)
    network.load_state_dict(tensors(run, name))
    return network.eval()


@pytest.mark.parametrize(("name", "library", "their_name"), EXPORTS)
def test_the_library_loads_the_file_and_gives_the_same_logits(name, library, their_name, run):
    main(["export", str(run), "--to", library, "--network", name, "--force"])
    folder = run / "export" / name / library
    if library == "timm":
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
        config = json.loads((folder / "config.json").read_text())
        assert config["architecture"] == their_name
        assert config["label_names"] == ["0", "1", "2"]
        data = timm.data.resolve_model_data_config(theirs)
        assert (data["input_size"], data["crop_pct"]) == ([3, 32, 32], 1.0)
        assert all(0 < value < 1 for value in (*data["mean"], *data["std"]))
    else:
        theirs = torchvision.models.get_model(their_name, num_classes=3)
        theirs.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(images), ours(run, name)(images))


def test_the_files_start_another_run(run, tmp_path):
    for name, library, _ in EXPORTS[2:4]:
        main(["export", str(run), "--to", library, "--network", name, "--force"])
        main(["train", str(run / "config.toml"), "--max-steps", "1", "--quiet",
              "--networks.student.weights", str(run / "export" / name / library),
              "--optimizer.learning-rate", "1e-30", "--optimizer.weight-decay", "0",
              "--run-dir", str(tmp_path / library)])  # fmt: skip
        given, came = tensors(run, "student"), tensors(tmp_path / library, "student")
        assert all(torch.equal(came[k], v) for k, v in given.items() if k.endswith("weight"))


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--to", "timm", "--network", "small"], 2, "a network that timm also has, got resnet8"),
        (["--to", "torchvision", "--network", "pupil"], 2, "got timm:mobilenetv3_small_050"),
        (["--to", "timm", "--network", "narrow"], 1, "mobilenetv2_100 has different weights"),
        (["--to", "torchvision", "--network", "teacher", "--output", "x.pt"], 2, "named *.pth"),
    ],
)
def test_networks_missing_in_the_library_are_refused(
    arguments, code, reason, run, capsys, tmp_path
):
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(run), *arguments])
    error = capsys.readouterr().err
    assert (exit_.value.code, error.count("\n")) == (code, 1), error
    assert reason in error


def test_existing_library_files_are_kept_without_force(run, capsys):
    main(["export", str(run), "--to", "timm", "--network", "teacher", "--force"])
    config = run / "export" / "teacher" / "timm" / "config.json"
    config.write_text("mine")
    (config.parent / "model.safetensors").unlink()
    with pytest.raises(SystemExit):
        main(["export", str(run), "--to", "timm", "--network", "teacher"])
    assert "config.json exists: --force replaces it" in capsys.readouterr().err
    assert config.read_text() == "mine"
