"""``bdkd benchmark``: the printed numbers. No test asserts the speed of this machine."""

import json
from types import SimpleNamespace

import pytest
import torch
from small_runs import TINY_RUN, bdkd, tiny_recipe, torchrun

from bdkd.cli import main
from bdkd.cli.benchmark import Arguments, describe, of_all_ranks, parse
from bdkd.config import load_recipe, shipped_recipes
from bdkd.data import SourceContext, create_source
from bdkd.data.imagenet.options import ImageNetConfig
from bdkd.data.random_images import SHAPES, create_random_images
from bdkd.engine.throughput import StepTimes
from bdkd.errors import UsageError
from bdkd.registry import SOURCES
from bdkd.trainer import Trainer

FEW = ["--steps", "2", "--warmup", "1"]
SMALL_NETWORKS = ["--networks.teacher.model", "resnet8", "--networks.student.model", "resnet8"]


def measured(capsys, *arguments: str) -> dict:
    main(["benchmark", *arguments, *FEW, "--json"])
    return json.loads(capsys.readouterr().out)  # exactly one JSON object


def test_the_measured_numbers_are_consistent(capsys):
    results = measured(capsys, *TINY_RUN)
    for row in (results, *results["networks"].values()):
        assert 0 < row["ms"]["median"] <= row["ms"]["p90"]
        assert row["images_per_second"] == pytest.approx(4 / (row["ms"]["mean"] / 1000))
    assert results["networks"].keys() == {"teacher", "student"}
    assert results["networks"]["teacher"]["model"] == "resnet8"
    assert results["networks"]["teacher"]["parameters"] == 77_587
    assert 0 <= results["data_wait"] <= 1
    assert results["memory_mib"] > 50
    assert results["flops_per_second"] > 0
    assert results["mfu"] is None  # the peak of a CPU is not known
    facts = {"recipe": "tiny", "method": "bdkd", "device": "cpu", "ranks": 1, "data": "synthetic",
             "image_size": [8, 8], "classes": 3, "batch_size": 4, "steps": 2}  # fmt: skip
    assert facts.items() <= results.items()


def test_the_table_shows_the_same_numbers_as_the_json(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["benchmark", *TINY_RUN, *FEW])
    out, err = capsys.readouterr()
    assert err == "timing 3 steps on cpu\n"
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "recipe     tiny, objective bdkd, seed 0"
    rows = [line.split("  ")[0] for line in lines]
    for row in ("training step", "teacher, forward only", "student, forward only"):
        assert row in rows
    assert "data wait " in lines[-2]
    assert "FLOP/s; peak memory " in lines[-1]
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_training_options_apply_to_the_benchmark(capsys):
    options = ["--train.batch-size", "8", "--train.precision", "bf16", "--train.accumulate", "2"]
    results = measured(capsys, *TINY_RUN, *options)
    assert (results["batch_size"], results["precision"], results["accumulate"]) == (8, "bf16", 2)


def test_the_table_of_a_gpu_and_several_ranks():
    network = {"model": "m", "images_per_second": 12345.6,
               "ms": {"mean": 2.0, "median": 1.5, "p90": 3.0}}  # fmt: skip
    results = {**network, "images_per_second": 99.123, "networks": {"pupil": network},
               "device": "cuda:0", "ranks": 2, "memory_mib": 2048.0, "data_wait": 0.125,
               "flops_per_second": 2.5e14, "mfu": 0.314, "steps": 50, "warmup": 10}  # fmt: skip
    assert describe(results).splitlines() == [
        "                     images/s  mean ms  median ms  p90 ms",
        "-------------------  --------  -------  ---------  ------",
        "training step            99.1     2.00       1.50    3.00",
        "pupil, forward only    12,346     2.00       1.50    3.00",
        "",
        "measured 50 steps after 10 warm-up steps; data wait 12.5% of a step",
        "250 TFLOP/s, MFU 31.4%; peak memory of a rank 2.0 GiB (tensors on the GPU)",
    ]


def test_the_times_are_those_of_the_slowest_rank():
    own = StepTimes((1.0, 2.0), 8, 0.1, 500.0)
    other = StepTimes((3.0, 1.0), 8, 0.4, 300.0)
    context = SimpleNamespace(gather_objects=lambda times: [times, other])
    assert of_all_ranks(own, context) == StepTimes((3.0, 2.0), 8, 0.4, 500.0)  # type: ignore[arg-type]
    context = SimpleNamespace(gather_objects=lambda times: None)  # not rank 0
    assert of_all_ranks(own, context) == own  # type: ignore[arg-type]


@pytest.mark.soak  # the tests above check the arithmetic
def test_two_ranks_print_one_result():
    done = torchrun(2, "benchmark", *TINY_RUN, *FEW, "--json", "--data", "synthetic")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["ranks"] == 2
    assert results["images_per_second"] == pytest.approx(4000 / results["ms"]["mean"])


def test_out_of_memory_prints_one_line(monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(SystemExit) as exit_:
        main(["benchmark", *TINY_RUN, *FEW])
    assert exit_.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bdkd: out of memory while timing steps: raise train.accumulate, ")


def test_too_little_memory_is_refused_before_the_system_kills_the_process(monkeypatch, capsys):
    monkeypatch.setattr("bdkd.probe.available_memory", lambda device: 2**20)
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("a step was timed"))
    with pytest.raises(SystemExit) as exit_:
        main(["benchmark", *TINY_RUN, *FEW])
    assert exit_.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bdkd: not enough memory: training needs about ")
    assert err.count("\n") == 1


def test_help_needs_no_recipe(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["benchmark", "--help"])
    assert exit_.value.code in (0, None)
    text = capsys.readouterr().out
    for option in ("--data ", "--classes", "--steps", "--warmup", "--json", "--batch-size"):
        assert option in text


# --- synthetic images ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_can_be_measured_on_synthetic_images(
    name, tmp_path, monkeypatch, capsys
):
    """The networks and batches are small, and also the images of ImageNet recipes."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    large = recipe.data.source in ("imagenet", "images")
    small = ["--data.image-size", "32"] if large else []
    small += ["--classes", "7"] if recipe.data.source == "images" else []
    results = measured(capsys, name, "--data", "synthetic", *SMALL_NETWORKS, *small,
                       "--train.batch-size", "4")  # fmt: skip
    shape = SHAPES[recipe.data.source]
    characters = getattr(recipe.data, "characters", None)  # an option of glyphs
    assert results["classes"] == (shape.classes or characters or 7)
    side = 32 if small else recipe.data.image_size or shape.side
    assert results["image_size"] == [side, side]
    assert results["data"] == "random images"


def test_an_imagenet_recipe_is_measured_at_its_image_size(tmp_path):
    """This test runs the command in a separate process."""
    options = ["--train.batch-size", "2", "--steps", "1", "--warmup", "0", *SMALL_NETWORKS]
    done = bdkd("benchmark", "imagenet-r50-mbv1", "--data", "synthetic", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 test images of 3x224x224," in done.stdout
    assert "1,000 classes" in done.stdout


def source_of(config, classes=None, batch_size=6):
    context = SourceContext(0, torch.device("cpu"), torch.channels_last, torch.bfloat16)
    return create_random_images(config, classes, batch_size, context)


def test_synthetic_images_have_the_shapes_of_the_data_sources():
    context = SourceContext(0, torch.device("cpu"), torch.channels_last)
    for name, options in (("digits", {}), ("synthetic", {"classes": 7, "images": 70})):
        config = SOURCES.configure(name, **options)
        real = create_source(config, *context).info
        info = source_of(config).info
        assert (info.num_classes, info.channels, info.image_size) == (
            real.num_classes, real.channels, real.image_size,
        )  # fmt: skip
    assert set(SHAPES) == {name for name in SOURCES if not SOURCES.is_foreign(name)}


def test_random_images_have_the_dtype_and_layout_of_a_data_source():
    source = source_of(SOURCES.configure("cifar10"))
    [batch] = source.train_batches(3, 0, 6, 2)
    assert len(batch.views) == 2
    assert not torch.equal(*batch.views)
    for view in batch.views:
        assert (view.shape, view.dtype) == ((6, 3, 32, 32), torch.bfloat16)
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert (batch.target.shape, batch.target.dtype) == ((6,), torch.int64)
    [again] = source.train_batches(4, 0, 6, 2)
    assert again.views[0] is batch.views[0], "the second batch costs nothing"
    [evaluated] = source.eval_batches("test", 4)
    assert (evaluated.views[0].shape, evaluated.views[0].dtype) == ((4, 3, 32, 32), torch.float32)
    assert list(source.eval_batches("val", 4)) == []


def test_mixed_images_have_soft_labels():
    config = ImageNetConfig("imagenet", image_size=8, mixup=0.2)
    [batch] = source_of(config, classes=5).train_batches(0, 0, 6, 1)
    assert batch.target.shape == (6, 5)
    assert torch.allclose(batch.target.sum(-1), torch.ones(6))


@pytest.mark.usefixtures("registries")
def test_the_shape_of_a_plugins_source_must_be_given(tmp_path, monkeypatch):
    from bdkd.config import DataConfig

    SOURCES.decorator("mine", DataConfig, DataConfig)(lambda config, context: None)
    config = SOURCES.configure("mine")
    with pytest.raises(UsageError, match="number of classes of the data source 'mine' is unknown"):
        source_of(config)
    with pytest.raises(UsageError, match="image size of the data source 'mine' is unknown"):
        source_of(config, classes=3)
    info = source_of(SOURCES.configure("mine", image_size=16), classes=3).info
    assert (info.num_classes, info.channels, info.image_size) == (3, 3, (16, 16))


def test_the_benchmark_accepts_a_recipe_file(tmp_path):
    arguments = parse([*TINY_RUN, "--data", "synthetic", "--classes", "9"])
    assert arguments == Arguments(
        recipe=TINY_RUN[0], config=tiny_recipe(), synthetic=True, classes=9
    )
