"""All shipped recipes are valid, and their networks train on images of the right size."""

import dataclasses
import re

import pytest
import torch
from small_runs import components_of, trainer_of

from bdkd.cli import main
from bdkd.config import (
    load_recipe,
    parse_recipe,
    select,
    shipped_recipes,
    to_toml,
)
from bdkd.engine.state import TrainingState
from bdkd.errors import UsageError
from bdkd.registry import OBJECTIVES, OPTIMIZERS, SOURCES

CLASSES = {
    "cifar10": 10, "cifar100": 100, "tiny-imagenet": 200, "digits": 10, "images": 10,
    "fashion-mnist": 10, "glyphs": 500,
}  # fmt: skip
SIZES = {
    "cifar10": 32, "cifar100": 32, "tiny-imagenet": 64, "images": 64, "fashion-mnist": 28,
    "glyphs": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_valid_and_does_not_change_when_it_is_written_and_read(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(to_toml(recipe), "again") == recipe


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if "imagenet-" not in n[:9]])
def test_networks_of_a_shipped_recipe_train(name):
    """Two steps with 4 images are fast even for a WRN-16-8, and batch norm needs several images."""
    recipe = load_recipe(name)
    data = recipe.data
    if data.source in SIZES:
        size, classes = SIZES[data.source], CLASSES[data.source]
        data = select(recipe, "data", "synthetic").data
        data = dataclasses.replace(
            data, image_size=size, classes=classes, images=10 * classes, train_images=None
        )
    recipe = dataclasses.replace(
        recipe, data=data, threads=1, train=dataclasses.replace(recipe.train, batch_size=4)
    )
    components = components_of(recipe)
    state = TrainingState(components)
    batches = components.source.train_batches(0, 0, 4, components.objective.views)
    components.networks.train()
    before = [p.detach().clone() for p in components.networks.parameters()]
    for _ in range(2):
        trainer_of(state, components.objective).train_step(next(batches))
    assert not state.skipped.any()
    changed = [
        not torch.equal(a, b) for a, b in zip(before, components.networks.parameters(), strict=True)
    ]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize(
    ("recipe", "needed"),
    [
        ('name = "x"\n[networks.a]\nmodel = "resnet8"\nrole = "teacher"\n',
         r"no network is a student: set networks.a.role"),
        ('name = "x"\n[networks.a]\nmodel = "resnet8"\nrole = "student"\n'
         '[networks.a]\nmodel = "resnet8"\nrole = "teacher"\n', r"networks.*a"),
        ('name = "x"\n[networks.a]\nmodel = "resnet8"\nrole = "student"\n'
         '[networks.b]\nmodel = "resnet8"\nrole = "teacher"\noptions = {num_classes = 7}\n',
         r"networks\.b\.options.*num_classes"),
        ('name = "x"\n[objective]\nname = "switokd"\n'
         '[networks.a]\nmodel = "resnet8"\nrole = "student"\n'
         '[networks.b]\nmodel = "resnet8"\nrole = "student"\n'
         '[networks.c]\nmodel = "resnet8"\nrole = "teacher"\n',
         r"needs one student, got 2 \(a, b\): set networks.NAME.role"),
    ],
    ids=["no student", "two of one name", "unlike class counts", "three for two"],
)  # fmt: skip
def test_invalid_recipes_are_refused_in_one_line(recipe, needed, tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text(recipe)
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(path), "--run-dir", str(tmp_path / "run")])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message.count("\n") == 1
    assert re.search(needed, message), message


def test_weights_that_do_not_fit_the_teacher_are_refused(tmp_path, capsys):
    from bdkd.models import create_model

    torch.save(create_model("resnet8", 7, 1).state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits", "--objective.name", "kd", "--run-dir", str(tmp_path / "run"),
              "--networks.teacher.model", "resnet8",
              "--networks.teacher.weights", str(tmp_path / "teacher.pt")])  # fmt: skip
    message = capsys.readouterr().err
    assert exit_.value.code == 1
    assert "networks.teacher.weights" in message
    assert "needed" in message


def test_an_objective_that_pauses_networks_cannot_be_compiled():
    """The backward pass of a compiled graph would include a paused teacher."""
    recipe = load_recipe("digits")
    recipe = dataclasses.replace(
        recipe,
        objective=OBJECTIVES.configure("switokd"),
        train=dataclasses.replace(recipe.train, compile=True),
    )
    with pytest.raises(UsageError, match=r"compile must be false with the objective 'switokd'"):
        components_of(recipe)


def test_selecting_another_objective_keeps_shared_options():
    config = OBJECTIVES.configure(
        "bdkd", gamma=3.0, temperature=2.0, label_smoothing=0.1, backend="native"
    )
    recipe = dataclasses.replace(load_recipe("digits"), objective=config)
    for name, kept in (
        ("dml", {"label_smoothing": 0.1, "backend": "native"}),
        ("lskd", {"label_smoothing": 0.1, "backend": "native"}),
        ("dkd", {"label_smoothing": 0.1}),
        ("independent", {"label_smoothing": 0.1}),
    ):
        selected = select(recipe, "objective", name)
        assert selected.objective == OBJECTIVES.configure(name, **kept)


def test_selecting_another_optimizer_or_data_source_keeps_shared_options():
    recipe = select(load_recipe("digits"), "optimizer", "adamw")
    known = load_recipe("digits").optimizer
    assert recipe.optimizer == OPTIMIZERS.configure(
        "adamw", learning_rate=known.learning_rate, weight_decay=known.weight_decay
    )
    recipe = select(recipe, "data", "imagenet")
    assert recipe.data == SOURCES.configure("imagenet", validation=0.15)
    assert select(recipe, "data", "imagenet") == recipe
    with pytest.raises(UsageError, match="unknown data source 'imagnet': did you mean 'imagenet'"):
        select(recipe, "data", "imagnet")
