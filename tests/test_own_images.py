"""Short options, and training without a recipe, as in
``bdkd train --data photos/ --teacher A --student B``."""

import json
import shutil

import pytest
from data.photo_folders import make_photos
from small_runs import bdkd
from test_one_line import failure

from bdkd.cli import main
from bdkd.cli.flags import flags_of
from bdkd.cli.shortcuts import expand
from bdkd.cli.train import FINE_TUNING_RATE, Arguments, parse_command
from bdkd.config import load_recipe, parse_recipe
from bdkd.engine.image_size import mistaken_models
from bdkd.errors import UsageError

DIGITS = load_recipe("digits")
PAIR = ["--teacher", "resnet8", "--student", "resnet8"]


def expanded(line: str, recipe=DIGITS) -> list[str]:
    return expand(line.split(), recipe, flags_of(Arguments(recipe.name, recipe)))


@pytest.mark.parametrize(
    ("line", "long"),
    [
        ("--epochs 5", "--train.epochs=5"),
        ("--epochs=5", "--train.epochs=5"),
        ("--batch-size 8", "--train.batch-size=8"),
        ("--batch_size 8", "--train.batch-size=8"),
        ("--teacher resnet20", "--networks.teacher.model=resnet20"),
        ("--student timm:resnet18", "--networks.student.model=timm:resnet18"),
        ("--objective kd", "--objective.name=kd"),
        ("--data digits", "--data.source=digits"),
        ("--data synthetic", "--data.root=None --data.source=synthetic"),
        ("--data cifar10 --data.root x", "--data.source=cifar10 --data.root x"),
        ("--data hf:a/b", "--data.root=hf:a/b --data.source=images"),
        ("--seed 3 --train.compile", "--seed 3 --train.compile"),
        ("--seed 3 --epochs 5 --train.compile", "--seed 3 --train.epochs=5 --train.compile"),
    ],
)
def test_short_options_set_long_options(line, long):
    assert expanded(line) == long.split()


def test_the_last_of_a_short_and_a_long_option_wins():
    first = parse_command(["digits", "--epochs", "5", "--train.epochs", "6"]).arguments.config
    last = parse_command(["digits", "--train.epochs", "6", "--epochs", "5"]).arguments.config
    assert (first.train.epochs, last.train.epochs) == (6, 5)


def test_short_options_follow_the_roles_of_the_recipe():
    text = """
        name = "three"
        networks.large = {model = "resnet20", role = "teacher"}
        networks.one_a = {model = "resnet8", role = "student"}
        networks.two = {model = "resnet8", role = "student"}
    """
    recipe = parse_recipe(text, "text")
    assert expanded("--teacher resnet14", recipe) == ["--networks.large.model=resnet14"]
    with pytest.raises(
        UsageError, match=r"'three' has 2 students: use --networks\.one_a\.model or"
    ):
        expanded("--student resnet14", recipe)


def test_pretrained_applies_to_every_network_with_published_weights(monkeypatch):
    published = {"timm:resnet18"}
    monkeypatch.setattr("bdkd.models.pretrained.has_published_weights", published.__contains__)
    line = expanded("--pretrained --teacher timm:resnet18")
    assert line[-1] == "--networks.teacher.weights=pretrained"
    assert not any("student.weights" in word for word in line)
    published.add("resnet8")
    assert expanded("--pretrained --teacher timm:resnet18")[-2:] == [
        "--networks.teacher.weights=pretrained", "--networks.student.weights=pretrained",
    ]  # fmt: skip


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_photos(tmp_path / "my photos", cat=30, dog=20)


def test_photos_to_a_student_in_one_command(photos, capsys):
    line = ["train", "--data", str(photos), *PAIR, "--epochs", "2", "--data.image-size", "16"]
    main([*line, "--data.workers", "0"])
    out = capsys.readouterr().out
    assert "3x16x16, 2 classes" in out
    run = photos.parent / "runs" / "my-bdkd-seed0"
    recipe = parse_recipe((run / "config.toml").read_text(), "config.toml")
    assert (recipe.data.source, recipe.data.root) == ("images", str(photos))
    # Of 50 images, 10 are for testing, 4 for validation, and 36 for training in batches of 2.
    assert recipe.train.batch_size == 2
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images"] == 10
    assert [network["role"] for network in summary["networks"].values()] == ["teacher", "student"]
    # The same command resumes the run with its batch size. So does the run folder without options.
    main([*line, "--data.workers", "0", "--resume"])
    main(["train", "--resume", "--run-dir", str(run), "--quiet"])
    assert (run / "config.toml").read_text().count("batch_size = 2") == 1


@pytest.mark.parametrize(
    ("count", "batch_size"), [(4, 2), (30, 4), (500, 64)], ids=["few", "some", "many"]
)
def test_a_run_without_a_recipe_has_ten_batches_in_an_epoch_if_it_can(
    count, batch_size, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "p", (8, 8), a=count, b=count)
    line = ["--data", "p", *PAIR, "--data.workers", "0"]
    assert parse_command(line).arguments.config.train.batch_size == batch_size
    chosen = parse_command([*line, "--batch-size", "6"]).arguments.config
    assert chosen.train.batch_size == 6


def test_pretrained_networks_train_at_a_lower_rate_unless_it_is_given(photos, monkeypatch):
    monkeypatch.setattr("bdkd.models.pretrained.has_published_weights", lambda _: True)
    line = ["--data", str(photos), *PAIR]

    def rate(*more: str) -> float:
        return parse_command([*line, *more]).arguments.config.optimizer.learning_rate

    usual = load_recipe("images").optimizer.learning_rate
    assert rate() == usual > FINE_TUNING_RATE
    assert rate("--pretrained") == FINE_TUNING_RATE
    assert rate("--pretrained", "--optimizer.learning-rate", "0.5") == 0.5
    assert rate("--pretrained", "--optimizer.name", "sgd") == usual


def test_a_folder_named_like_a_source_is_never_confused_with_it(photos, capsys):
    for name in ("folder", "digits"):
        make_photos(photos.parent / name, cat=4, dog=4)
    config = parse_command(["--data", "folder", *PAIR]).arguments.config
    assert (config.data.source, config.data.root) == ("images", "folder")
    code, message = failure(["train", "--data", "digits", *PAIR], capsys)
    assert (code, "pass ./digits for the folder" in message) == (2, True)
    assert parse_command(["--data", "./digits", *PAIR]).arguments.config.data.root == "./digits"
    code, message = failure(["train", "imagenet-r50-mbv1", "--data", "cifar10"], capsys)
    assert "data.root must name the folder of the data set 'cifar10'" in message


@pytest.mark.parametrize("name", ["digits", "images"])
def test_a_folder_named_like_a_recipe_does_not_hide_it(name, tmp_path, monkeypatch):
    """``bdkd compare digits --folder digits`` creates such a folder."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_command([name]).arguments.config.name == name


def test_recipes_take_the_short_data_option_too(photos, capsys):
    main(["train", "digits", "--data", str(photos), "--dry-run", "--no-probe", "--batch-size", "4"])
    assert "images, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"cat": 5}, ["at least 2 classes", "cat (5 images)"]),
        ({"cat": 1, "dog": 2}, ["the class cat", "holds 1 image", "at least 3"]),
    ],
    ids=["one class", "three images"],
)
def test_too_few_photos_are_an_error_of_one_line(counts, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "p", **counts)
    code, message = failure(["train", "--data", "p", *PAIR], capsys)
    assert code == 1
    assert all(word in message for word in words)
    assert not (tmp_path / "runs").exists()


def test_nested_and_empty_folders_are_errors_of_one_line(photos, capsys):
    nested = photos.parent / "nested"
    nested.mkdir()
    shutil.move(photos, nested / "pets")
    code, message = failure(["train", "--data", "nested", *PAIR], capsys)
    assert (code, message.count("pass nested/pets")) == (1, 1)
    (photos.parent / "none").mkdir()
    code, message = failure(["train", "--data", "none", *PAIR], capsys)
    assert (code, "none holds no images" in message) == (1, True)


def test_an_unknown_network_is_an_error_of_one_line(photos, capsys):
    code, message = failure(
        ["train", "--data", str(photos), *PAIR[:2], "--student", "rsnet8"], capsys
    )
    assert (code, "'resnet8'" in message) == (2, True)


def test_a_network_for_small_images_on_large_ones_is_a_warning(photos, monkeypatch):
    line = ["--data", str(photos), "--student", "resnet8", "--batch-size", "4"]
    for teacher, side, count in (("resnet18", 160, 1), ("resnet18", 32, 0), ("resnet8", 160, 0)):
        given = [*line, "--teacher", teacher, "--data.image-size", str(side)]
        config = parse_command(given).arguments.config
        found = mistaken_models(config, side)
        assert len(found) == count
        assert all("use imagenet_resnet18 for large images" in warning for warning in found)
    done = bdkd("train", *line, "--teacher", "resnet18", "--data.image-size", "160", "--dry-run",
                "--no-probe", cwd=photos.parent)  # fmt: skip
    assert done.stderr.count("warning: networks.teacher: resnet18 is a network for small") == 1


def test_resume_with_a_run_folder_suggests_run_dir(photos, capsys):
    code, message = failure(["train", "--resume", str(photos)], capsys)
    assert (code, f"pass --resume --run-dir {photos}" in message) == (2, True)


def test_images_of_other_formats_are_left_out_with_a_note(photos, capsys):
    for number in range(3):
        (photos / "cat" / f"{number}.gif").write_bytes(b"")
    (photos / "dog" / "a.JFIF").write_bytes(b"")
    main(["train", "--data", str(photos), *PAIR, "--dry-run", "--no-probe"])
    out, err = capsys.readouterr()
    assert "36 train" in out
    assert err.count("4 images in") == 1
    assert "are not used: 3 .gif, 1 .jfif; convert them to JPEG or PNG" in err


@pytest.mark.parametrize("name", ["synthetic_photos", "two\nlines", "a b, c"])
def test_benchmarks_take_folders_with_any_name(name, photos, capsys):
    photos.rename(photos.parent / name)
    line = ["benchmark", "images", "--data", name, *PAIR, "--batch-size", "4", "--steps", "1"]
    main([*line, "--warmup", "0", "--data.workers", "0", "--data.image-size", "16"])
    assert "training step" in capsys.readouterr().out


def test_two_data_sets_in_one_command_are_refused(photos, capsys):
    for more in (["--data.source", "digits"], ["--data.root", "x"], ["--data", "digits"]):
        code, message = failure(["train", "--data", str(photos), *PAIR, *more], capsys)
        assert code == 2
        assert "give one" in message


def test_a_comparison_that_failed_before_its_first_step_takes_other_options(photos, capsys):
    line = ["compare", "digits", "--data", str(photos), *PAIR, "--epochs", "1", "--seeds", "1",
            "--methods", "independent", "--folder", "here", "--data.image-size", "16"]  # fmt: skip
    code, message = failure(line, capsys, quiet=False)
    assert (code, "pass a smaller --batch-size" in message) == (2, True)
    main([*line, "--batch-size", "8"])
    assert "independent" in capsys.readouterr().out
