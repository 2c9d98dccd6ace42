"""The image size of the sources ``images`` and ``folder``, from the networks or the pictures."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vision import mended_torchvision

from bdkd.cli import main
from bdkd.config import NetworkConfig, Recipe, load_recipe, parse_recipe, select, to_toml
from bdkd.data import create_source
from bdkd.engine.image_size import check_image_size, with_image_size
from bdkd.errors import RunError, UsageError
from bdkd.registry import SOURCES
from bdkd.runs.checkpoint import load_checkpoint, save_checkpoint
from bdkd.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_figures")


def photos(root: Path, size: tuple[int, int]) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def recipe_of(
    source: str, teacher: str, student: str, size: int | None = None, **options
) -> Recipe:
    recipe = select(load_recipe("digits"), "data", source)
    data = dataclasses.replace(recipe.data, root="photos", image_size=size)
    networks = {  # the student first, because the teacher's size has priority in any order
        "student": NetworkConfig(student, "student"),
        "teacher": NetworkConfig(teacher, "teacher", options=options),
    }
    return dataclasses.replace(recipe, data=data, networks=networks)


def resolved(*arguments, **options) -> int | None:
    return with_image_size(recipe_of(*arguments, **options)).data.image_size


@pytest.mark.parametrize("source", ["images", "folder"])
def test_the_size_comes_from_the_teacher_or_else_from_the_student(source):
    mended_torchvision()
    assert resolved(source, "imagenet_resnet18", "resnet8") == 224
    assert resolved(source, "resnet8", "imagenet_resnet18") == 224
    assert resolved(source, "torchvision:inception_v3", "imagenet_resnet18") == 299
    assert resolved(source, "timm:tf_efficientnet_b3", "imagenet_resnet18") == 300
    assert resolved(source, "timm:vit_tiny_patch16_224", "resnet8", img_size=96) == 96
    assert resolved(source, "resnet8", "resnet20") is None
    assert resolved(source, "imagenet_resnet18", "resnet8", 64) == 64, "a given size is kept"
    for other in ("imagenet", "digits", "synthetic"):
        assert resolved(other, "imagenet_resnet18", "resnet8") is None


@pytest.mark.parametrize("source", ["images", "folder"])
@pytest.mark.parametrize(("size", "side"), [((60, 40), 40), ((500, 300), 224), ((5, 9), 8)])
def test_without_a_size_of_the_networks_the_pictures_decide_up_to_224(source, size, side, tmp_path):
    config = SOURCES.configure(source, root=str(photos(tmp_path / "photos", size)))
    found = create_source(config, 0, torch.device("cpu"), torch.contiguous_format)
    assert found.info.image_size == (side, side)


def test_a_size_that_a_network_cannot_take_is_refused_before_data_are_read():
    mended_torchvision()
    vit = "timm:vit_tiny_patch16_224"
    check_image_size(with_image_size(recipe_of("images", vit, "resnet8")))
    check_image_size(recipe_of("images", vit, "resnet8", 96, img_size=96))
    with pytest.raises(UsageError) as raised:
        check_image_size(recipe_of("images", vit, "resnet8", 160))
    assert str(raised.value) == (
        "networks.teacher: timm:vit_tiny_patch16_224 takes images of 224x224 pixels, and "
        "data.image_size or data.progressive is 160: set them to 224, or the option img_size of "
        "the network"
    )
    with pytest.raises(UsageError, match=r"networks\.student: .* takes images of 224x224 pixels"):
        check_image_size(with_image_size(recipe_of("images", "timm:tf_efficientnet_b3", vit)))


def train(capsys, folder: Path, source: str, *more: str) -> str:
    main(["train", "digits", "--data.source", source, "--data.root", str(folder / "photos"),
          "--networks.teacher.model", "resnet8", "--train.batch-size", "4", "--train.epochs", "2",
          "--checkpoint.every-steps", "2", "--log", "--threads", "1", "--device", "cpu",
          "--run-dir", str(folder / "run"), *more])  # fmt: skip
    return capsys.readouterr().out


def forget_the_size(run: Path) -> None:
    """Remove the image size from a run, because older versions stored none."""
    paths = [*run.glob("checkpoints/*.pt")]
    config = RunFolder(run).config
    text = re.sub(r"(image_size|use_val_split|test_share) = .*\n", "", config.read_text())
    assert "image_size" not in text
    config.write_text(text)
    for path in paths:
        save_checkpoint(path, text, load_checkpoint(path)[1])


def test_an_old_run_of_a_folder_keeps_images_of_32_pixels(tmp_path, capsys):
    """Evaluate, export and resume the run. Its validation folder is not read."""
    for split in ("train", "val", "test"):
        photos(tmp_path / "photos" / split, (48, 48))
    train(capsys, tmp_path, "folder", "--data.image-size", "32", "--data.no-use-val-split",
          "--max-steps", "3")  # fmt: skip
    run = str(tmp_path / "run")
    main(["evaluate", run, "--json"])
    before = json.loads(capsys.readouterr().out)
    forget_the_size(tmp_path / "run")
    main(["evaluate", run, "--json"])
    assert json.loads(capsys.readouterr().out) == before
    main(["export", run, "--to", "safetensors"])
    [exported] = (tmp_path / "run" / "export").rglob("*.safetensors")
    capsys.readouterr()
    main(["evaluate", str(exported), "--json"])
    after = json.loads(capsys.readouterr().out)["networks"]["student"]
    assert after["top1"] == before["networks"]["student"]["top1"]
    assert abs(after["nll"] - before["networks"]["student"]["nll"]) < 1e-5
    out = train(capsys, tmp_path, "folder", "--resume", "--max-steps", "5")
    assert "changed data" not in out
    stored = (tmp_path / "run" / "config.toml").read_text()
    assert "image_size = 32" in stored
    assert "use_val_split = false" in stored


def test_only_recipes_of_old_runs_default_to_32_pixels():
    recipe = recipe_of("folder", "resnet8", "resnet8")
    text = to_toml(recipe)
    assert parse_recipe(text, "mine").data.image_size is None
    assert parse_recipe(text, "a run's", of_run=True).data.image_size == 32
    sized = to_toml(recipe_of("folder", "resnet8", "resnet8", 48))
    assert parse_recipe(sized, "a run's", of_run=True).data.image_size == 48
    images = to_toml(recipe_of("images", "resnet8", "resnet8"))
    assert parse_recipe(images, "a run's", of_run=True).data.image_size is None


def test_a_run_stores_the_size_and_resumes_with_it(tmp_path, capsys):
    """The size belongs to the run and stays the same if the pictures change."""
    photos(tmp_path / "photos", (40, 24))
    train(capsys, tmp_path, "folder", "--max-steps", "3")
    assert "image_size = 24" in (tmp_path / "run" / "config.toml").read_text()
    for file in (tmp_path / "photos").rglob("*.png"):
        with Image.open(file) as image:
            image.resize((20, 20)).save(file)
    out = train(capsys, tmp_path, "folder", "--resume", "--max-steps", "5")
    assert "data.image_size" not in out
    assert "image_size = 24" in (tmp_path / "run" / "config.toml").read_text()


def test_timm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("bdkd.models.libraries.import_module", missing_timm)
    with pytest.raises(RunError, match="timm is not installed: pip install"):
        resolved("images", "timm:resnet50", "resnet8")


def missing_timm(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
