"""Invalid recipes: each is refused with one line that contains the key and the value."""

import os
import threading
import time

import pytest

from bdkd import text
from bdkd.config import load_recipe, parse_recipe
from bdkd.errors import RunError, UsageError

NETWORKS = '[networks.s]\nmodel = "resnet8"\nrole = "student"\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('train.epochs = "many"', "train.epochs must be an integer, got 'many' (a string)"),
        ("train.epochs = 2.5", "train.epochs must be an integer, got 2.5 (a number)"),
        ('train.precision = "fp8"',
         "train.precision must be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ("train.precision = 8", "train.precision must be 'fp32', 'bf16' or 'fp16', got 8"),
        ('schedule.milestones = ["a"]',
         "schedule.milestones[0] must be a number, got 'a' (a string)"),
        ("schedule.milestones = 3",
         "schedule.milestones must be an array of numbers, got 3 (an integer)"),
        ("optimizer = {name = 'adamw', betas = [0.9]}",
         "optimizer.betas must be an array of 2 numbers, got [0.9] (an array)"),
        ("log = 'wandb'", "log must be an array of 'tensorboard' or 'wandb', got 'wandb'"),
        ("data.root = 3", "data.root must be a string, got 3 (an integer)"),
        ("networks = 3", "networks must be a table ([networks]), got 3"),
        ("networks.a.options = 3", "networks.a.model is missing; see the config.toml of any run"),
        ("networks.a = {model = 'x', role = 'pupil'}",
         "networks.a.role must be 'student' or 'teacher', got 'pupil'"),
        ("networks.a = {model = 'x', role = 'student', options = {w = [1]}}",
         "networks.a.options.w must be true or false, an integer, a number or a string, got [1]"),
        ("train.epochs = 0x" + "f" * 10_000, "train.epochs must be within 64 bits, got an integer"),
        ("train.clip_norm = 1" + "0" * 400, "train.clip_norm must be within 64 bits, got 1000"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_are_refused_with_the_accepted_types(line, message):
    networks = "" if line.startswith("networks = ") else NETWORKS
    with pytest.raises(UsageError) as raised:
        parse_recipe(f'name = "x"\n{line}\n{networks}', source="r.toml")
    assert str(raised.value).startswith(f"r.toml: {message}")
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a = " + "[" * 10_000, "nested too deeply"),
        ("a = " + "[" * 400 + "]" * 400, ""),  # tomllib may or may not read this depth
        ("a = " + "{a = " * 10_000, "nested too deeply"),
        ("a." * 100_000 + "a = 1", "a key has more than 100 parts (at line 1)"),
        ("\n[" + "'a' . " * 100_000 + "a]", "a key has more than 100 parts (at line 2)"),
        ("seed = " + "9" * 10_000, "an integer of thousands of digits"),
        ("# " + "x" * 1_000_000, "1,000,002 characters, at most 1,000,000"),
    ],
    ids=["arrays", "deep", "tables", "dotted", "header", "digits", "long"],
)
def test_malicious_recipes_are_refused_quickly(content, message):
    began = time.monotonic()
    with pytest.raises(UsageError) as raised:
        parse_recipe(content, source="r.toml")
    assert message in str(raised.value)
    assert time.monotonic() - began < 5


def test_long_lines_of_numbers_and_strings_are_accepted():
    rates = ", ".join(f"0.{n:03}" for n in range(1, 300))
    recipe = parse_recipe(
        f'name = "x"\nrun_dir = "{"a-b. " * 200}"\nschedule.milestones = [{rates}]\n{NETWORKS}',
        source="r.toml",
    )
    assert len(recipe.schedule.milestones) == 299


def test_devices_and_large_files_are_not_read_as_recipes(tmp_path):
    sparse = tmp_path / "sparse.toml"
    with open(sparse, "wb") as file:
        file.truncate(2**31)
    for path, words in (
        ("/dev/zero", "it is not a regular file"),
        (str(sparse), "2,147,483,648 bytes"),
        (str(tmp_path), "Is a directory"),
        (f"{tmp_path}/{'a' * 300}.toml", "File name too long"),
    ):
        with pytest.raises(RunError, match=f"^cannot read .*{words}"):
            load_recipe(path)
    with pytest.raises(UsageError, match="unknown recipe 'aaa"):
        load_recipe("a" * 300)


def test_a_pipe_is_read_and_times_out_without_a_writer(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(f'name = "piped"\n{NETWORKS}',))
    writer.start()
    assert load_recipe(str(pipe)).name == "piped"
    writer.join()
    monkeypatch.setattr(text, "PIPE_SECONDS", 0.1)
    with pytest.raises(RunError, match="nothing was written to this pipe"):
        load_recipe(str(pipe))
