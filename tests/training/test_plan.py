"""The plan of ``--dry-run`` and the first lines of a run, compared with numbers by hand."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_runs import TINY_RUN, bdkd, components_of, torchrun

from bdkd import probe
from bdkd.cli import main
from bdkd.cli.train import parse
from bdkd.config import Recipe, load_recipe, shipped_recipes
from bdkd.data import SourceContext
from bdkd.data.random_images import create_random_images
from bdkd.engine.components import Components, build_components
from bdkd.engine.cost import costs, estimate_memory
from bdkd.engine.throughput import StepTimes
from bdkd.runs import plan
from bdkd.runs.plan import binary_size, count_evaluations, duration, format_rows
from bdkd.train import describe_plan
from bdkd.trainer import Trainer


def planned(*options: str, ranks: int = 1) -> str:
    """Return the plan of a run whose networks differ in size."""
    small = ["--networks.teacher.options", "width", "0.25"]
    given = [*TINY_RUN, *small, "--dry-run", "--no-probe", *options]
    return unwrapped(describe_plan(parse(given, load_recipe(*TINY_RUN)), ranks))


def unwrapped(text: str) -> str:
    return re.sub(r"\n  +", " ", text)


def components(*options: str) -> Components:
    return components_of(parse([*TINY_RUN, *options], load_recipe(*TINY_RUN)).config)


# --- the parts of a run ---------------------------------------------------------------------------


def test_the_rows_of_a_plan():
    text = planned("--train.accumulate", "2", "--seed", "3", "--networks.student.weights", "x.pt",
                   "--train.compile", "--train.deterministic")  # fmt: skip
    assert "recipe      tiny, objective bdkd, seed 3" in text
    assert "device      cpu, 1 thread" in text
    assert "data        synthetic, 48 train, 12 val, 12 test images of 3x8x8, 3 classes" in text
    assert "networks    teacher: resnet8, " in text
    assert "student: resnet8, 77,587 parameters, weights of x.pt, " in text
    assert "batch       4 images, in 2 micro-batches (train.accumulate)" in text
    assert "precision   fp32, compiled, deterministic" in text
    assert "steps       36: 3 epochs of 12 steps\n" in text


def test_a_warm_up_that_the_run_does_not_complete_is_a_warning():
    options = ["--objective.name", "dkd", "--networks.teacher.weights", "x.pt"]
    text = planned(*options)  # 3 epochs
    assert "dkd, warning: its warm-up of 20 epochs is longer than the 3 epochs of the run" in text
    assert "dkd, its warm-up of 1.5 epochs" in planned(*options, "--objective.warmup", "1.5")
    assert "warm-up of" not in planned(*options, "--objective.warmup", "0").split("optimizer")[0]


def test_a_plan_shows_frozen_networks_and_roles():
    recipe = load_recipe(*TINY_RUN)
    teacher = dataclasses.replace(recipe.networks["teacher"], frozen=True, weights="random")
    networks = {"big": teacher, "student": recipe.networks["student"]}
    frozen = build_components(dataclasses.replace(recipe, networks=networks))
    text = plan.banner(frozen, Path("runs/mine"))
    assert "big (teacher, frozen): resnet8, 77,587 parameters, random weights" in text


def test_several_ranks_share_a_batch():
    text = planned("--train.batch-size", "8", ranks=2)
    assert "batch       8 images, 4 on each of 2 ranks" in text
    assert "on each rank, estimated" in text
    own = re.search(r"per image forward, ([\d.]+) MiB of activations", text)
    alone = re.search(r"per image forward, ([\d.]+) MiB of activations", planned())  # batch of 4
    assert own is not None
    assert alone is not None
    assert own[1] == alone[1]


def test_a_plan_shows_where_steps_stop_and_continue():
    """48 images in batches of 5 are nine steps an epoch. The rest of an epoch is dropped."""
    options = ["--train.batch-size", "5", "--train.epochs", "4"]
    assert "steps       36: 4 epochs of 9 steps\n" in planned(*options)
    for limit, stop in ((18, 18), (100, 36)):
        text = planned(*options, "--max-steps", str(limit))
        assert f"4 epochs of 9 steps, stopping after {stop} (max_steps)" in text
    text = plan.banner(components(*options), Path("runs/mine"), 20)
    assert "steps      36: 4 epochs of 9 steps, continuing from step 20" in text
    assert text.count("weights of the checkpoint") == 2


def random_images(recipe: Recipe, classes: int | None = None) -> Components:
    def create(config, *context):
        size = recipe.train.batch_size
        return create_random_images(config, classes, size, SourceContext(*context))

    return build_components(recipe, create=create)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_line_of_a_shipped_recipe_fits_into_80_columns(name):
    of_recipe = random_images(load_recipe(name), 10 if name == "images" else None)
    each, memory, available, _ = probe.check_memory(of_recipe, 1)
    steps = StepTimes((1.25, 1.5), of_recipe.recipe.train.batch_size, 0.5, 123456.0)
    rows = plan.measured_rows(of_recipe, steps, 0.01)
    text = plan.describe(of_recipe, 1, each, plan.memory_row(memory, available, 1), rows)
    for line in [*text.splitlines(), *plan.banner(of_recipe, Path("runs/mine"), 3).splitlines()]:
        assert len(line) <= 80, line
        assert line == line.rstrip()


def test_lines_break_only_between_pieces():
    rows = [("a", ["x" * 40, "y y" * 12, "z"]), ("long", ["a folder with spaces " * 5])]
    assert format_rows(rows) == "\n".join([
        f"a     {'x' * 40},", f"      {'y y' * 12}, z", f"long  {'a folder with spaces ' * 5}",
    ])  # fmt: skip


# --- memory --------------------------------------------------------------------------------------

# Copies of a network's parameters for gradients and optimizer state, at four bytes per value.
SGD, PLAIN_SGD, ADAMW = 2, 1, 3


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ([], {"teacher": SGD, "student": SGD}),
        (["--optimizer.momentum", "0"], {"teacher": PLAIN_SGD, "student": PLAIN_SGD}),
        (["--optimizer.name", "adamw"], {"teacher": ADAMW, "student": ADAMW}),
        (["--train.ema-decay", "0.9"], {"teacher": SGD, "student": SGD + 1}),
        (
            ["--networks.teacher.frozen", "--networks.teacher.weights", "random"],
            {"teacher": 0, "student": SGD},
        ),
        (["--train.accumulate", "2"], {"teacher": SGD, "student": SGD}),
        (["--train.precision", "bf16"], {"teacher": SGD + 0.5, "student": SGD + 0.5}),
    ],
    ids=["sgd", "no momentum", "adamw", "an average", "frozen", "accumulated", "bf16"],
)
def test_memory_is_weights_gradients_moments_averages_and_activations(options, copies):
    """Activations are those of one micro-batch of a batch of four."""
    if "--networks.teacher.frozen" in options:
        options = [*options, "--objective.name", "independent"]
    of_run = components(*options)
    each = costs(of_run)
    memory = estimate_memory(of_run, each)
    parts = 2 if "--train.accumulate" in options else 1
    parameters = {name: cost.parameters for name, cost in each.items()}
    assert memory.weights == 4 * sum(parameters.values())
    assert memory.gradients == sum(4 * parameters[name] * copies[name] for name in parameters)
    assert memory.activations == sum(cost.kept for cost in each.values()) * 4 // parts
    # 72 images of 3x8x8 bytes with a label of eight
    assert memory.data == 72 * (3 * 8 * 8 + 8)
    assert memory.process > 50 * 2**20
    assert memory.total == memory.process + memory.data + memory.weights + memory.to_come


def test_the_memory_row_names_every_part_and_the_free_memory():
    of_run = components()
    memory = estimate_memory(of_run, costs(of_run))
    text = unwrapped(format_rows([plan.memory_row(memory, 3 * 2**30, 1)]))
    assert f"about {binary_size(memory.total)}, estimated: " in text
    for part in ("Python and torch", "images in memory", "weights", "gradients and optimizer state",
                 "activations", "batches and workspace", "3.0 GiB more is free here"):  # fmt: skip
        assert part in text
    assert "free" not in format_rows([plan.memory_row(memory, None, 1)])


def run_main(capsys, *arguments: str) -> tuple[str, str]:
    main(["train", *TINY_RUN, "--dry-run", *arguments])
    out, err = capsys.readouterr()
    return unwrapped(out), err


def test_too_little_memory_is_a_warning_and_no_step_is_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "available_memory", lambda device: 2**20)
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("a step was timed"))
    out, err = run_main(capsys)
    assert re.fullmatch(
        r"warning: not enough memory: training needs about [\d.]+ MiB more, and "
        r"1.0 MiB is free: raise train.accumulate, lower train.batch_size or data.image_size, "
        r"or set train.precision to bf16\n", err,
    ), err  # fmt: skip
    assert "time        not measured: there is not enough memory" in out
    _, err = run_main(capsys, "--train.precision", "bf16")
    assert err.endswith("or lower train.batch_size or data.image_size\n")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
                     "allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)  # fmt: skip
def test_steps_that_run_out_of_memory_do_not_fail_the_plan(error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(Trainer, "train_step", fail)
    out, err = run_main(capsys)
    assert "warning: out of memory while timing steps: raise train.accumulate, " in err
    assert err.count("\n") == 2
    assert "time        not measured: the steps ran out of memory" in out


def test_another_error_of_a_step_fails_the_plan(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(SystemExit) as exit_:
        main(["train", *TINY_RUN, "--dry-run"])
    assert exit_.value.code == 1
    assert "shapes do not fit" in capsys.readouterr().err


# --- time ----------------------------------------------------------------------------------------


def test_the_time_includes_steps_and_evaluations():
    """36 steps of 400 s are 4 hours. After each of three epochs, and once more at the end, 12
    validation and 12 test images are evaluated: 96 images of 150 s are 4 hours more."""
    watched = components("--watch-test")
    steps = StepTimes((300.0, 500.0), 4, 0.25, 2048.0)
    text = unwrapped(format_rows(plan.measured_rows(watched, steps, 150.0)))
    assert "0.01 images/s, 400,000.0 ms a step, 25% of it waiting for data, " in text
    assert "peak memory 2.0 GiB (the whole process), mean of 2 steps" in text
    assert (
        "time      8.0 hours on this machine, 4.0 hours for 36 steps, 4.0 hours for 8 evaluations"
        in text
    )
    few = components("--data.validation", "0", "--train.select", "last", "--max-steps", "18")
    text = unwrapped(format_rows(plan.measured_rows(few, steps, 150.0)))
    # Without validation images, only the test images at the end are evaluated: 12 of 150 s.
    assert "2.5 hours on this machine, 2.0 hours for 18 steps, 30 minutes for 1 evaluation," in text


def test_progressive_resolution_makes_the_time_an_upper_bound():
    recipe = load_recipe("imagenet-smoke")
    data = dataclasses.replace(recipe.data, progressive=((0, 32), (1, 96)))
    growing = random_images(dataclasses.replace(recipe, data=data))
    rows = plan.measured_rows(growing, StepTimes((1.0,), 32, 0.0, 1.0), 0.0)
    assert "time      at most 1 s on this machine" in format_rows(rows)
    small, large = (
        probe.check_memory(of_run, 1).estimate.activations
        for of_run in (random_images(recipe), growing)
    )
    assert large == pytest.approx(small * (96 / 64) ** 2, rel=0.1)


@pytest.mark.parametrize(
    ("every", "limit", "count"),
    [(1, None, 3), (2, None, 2), (3, None, 1), (5, None, 1), (1, 24, 2), (1, 25, 3), (2, 1, 1)],
)
@pytest.mark.usefixtures("without_figures")
def test_the_number_of_evaluations_equals_that_of_a_training(every, limit, count, tmp_path):
    """The run has three epochs of twelve steps."""
    recipe = load_recipe(*TINY_RUN)
    recipe = dataclasses.replace(recipe, evaluate_every=every, max_steps=limit)
    assert count_evaluations(recipe, 48) == count
    if (every, limit) in ((2, None), (1, 25)):
        from bdkd.runs.folder import RunFolder

        Trainer(components_of(recipe)).train(RunFolder(tmp_path), progress_bar=False)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert sum('"split": "val"' in line for line in lines) == count


def test_with_a_given_speed_no_step_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("a step was timed"))
    out, err = run_main(capsys, "--images-per-second", "0.02")
    assert "time        2.0 hours at 0.02 images/s, without the evaluations" in out  # 36 * 4 / 0.02
    assert err == ""
    out, _ = run_main(capsys, "--images-per-second", "1", "--max-steps", "9")
    assert "time        36 s at 1 images/s" in out
    out, err = run_main(capsys, "--no-probe")
    assert "time        not measured: --no-probe (--images-per-second N estimates it)" in out
    assert err == ""


def test_the_plan_times_real_steps_and_writes_nothing(tmp_path):
    done = bdkd("train", *TINY_RUN, "--dry-run", "--run-dir", "run", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "timing steps on cpu; --no-probe skips this\n"
    text = unwrapped(done.stdout)
    assert re.search(r"measured    [\d,.]+ images/s, [\d,.]+ ms a step, \d+% of it waiting", text)
    assert re.search(r"time        .+ on this machine, .+ for 36 steps, .+ for 5 eval", text)
    assert list(tmp_path.iterdir()) == []


def test_rank_0_plans_alone(tmp_path):
    done = torchrun(2, "train", *TINY_RUN, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = unwrapped(done.stdout)
    assert text.count("recipe      tiny") == 1
    assert "time        not measured: not supported with several ranks (run it without" in text
    assert "batch       4 images, 2 on each of 2 ranks" in text
    assert "timing steps" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- the banner ----------------------------------------------------------------------------------


def banner_of(output: str) -> Sequence[str]:
    """Return the lines up to the folder of the run."""
    lines = output.splitlines()
    last = next(i for i, line in enumerate(lines) if line.startswith("folder "))
    return lines[: last + 1]


@pytest.mark.usefixtures("without_figures")
def test_training_prints_its_plan_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def said(*options: str) -> str:
        main(["train", *TINY_RUN, "--run-dir", "run", *options])
        return capsys.readouterr().out

    lines = banner_of(said("--max-steps", "2"))
    labels = [line.split("  ")[0] for line in lines if not line.startswith(" ")]
    assert labels == ["recipe", "device", "data", "networks", "optimizer", "batch", "precision",
                      "steps", "folder"]  # fmt: skip
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "folder     run"
    again = banner_of(said("--resume", "--max-steps", "4"))
    assert again[0].startswith("resuming with changed max_steps")
    assert "continuing from step 2" in "\n".join(again)
    assert "optimizer  " not in said("--resume"), "nothing is left to train"
    assert said("--resume", "--max-steps", "5", "--quiet") == "run\n"


# --- text ----------------------------------------------------------------------------------------


def test_units():
    assert binary_size(3 * 2**20 // 2) == "1.5 MiB"
    assert binary_size(300 * 2**20) == "300 MiB"
    assert binary_size(5 * 2**30) == "5.0 GiB"
    assert duration(0.2) == "0 s"
    assert duration(119) == "119 s"
    assert duration(7199) == "120 minutes"
    assert duration(7200) == "2.0 hours"
    assert duration(3.6e7) == "10,000.0 hours"
    text = planned()
    step = sum(cost.step for cost in costs(components("--networks.teacher.options", "width",
                                                      "0.25")).values())  # fmt: skip
    said = re.search(r"operations  ([\d.]+) MFLOP per image .*, ([\d.]+) MFLOP per step", text)
    assert said is not None
    assert float(said[1]) == pytest.approx(step / 1e6, rel=5e-3)
    assert float(said[2]) == pytest.approx(4 * step / 1e6, rel=5e-3)
