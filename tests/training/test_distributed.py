"""Several ranks train, evaluate and decide like one process."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from rank_checks import CLIP_NORM, LARGEST, main
from small_runs import components_of

from bdkd.config import load_recipe
from bdkd.distributed.context import DistributedContext
from bdkd.engine.networks import parallelize
from bdkd.errors import UsageError
from bdkd.registry import OBJECTIVES

SEVERAL = range(2, LARGEST + 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the results of every check by its name and its number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(main, (str(folder),), LARGEST)
    return torch.load(folder / "found.pt", weights_only=True)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def close(a, b, tolerance: float) -> bool:
    """Return whether nested numbers are nearly equal. NaN is equal to NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return a == pytest.approx(b, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize("world", SEVERAL)
@pytest.mark.parametrize("check", ["training", "training_switokd", "training_accumulated"])
def test_float64_training_does_not_depend_on_the_number_of_ranks(check, world, found):
    """A batch of 16 is divisible by 2 and 4 and not by 3. The logged means are over all ranks."""
    one, several = found[f"{check}-1"], found[f"{check}-{world}"]
    assert largest_difference(several["weights"], one["weights"]) < 1e-10
    assert close(several["means"], one["means"], 1e-6)  # the meter's softmax is in float32
    assert one["means"]["student"]["loss"] > 0
    if "norms" in one:  # clipping acts on both networks
        assert len(one["norms"]) == 2
        assert min(one["norms"].values()) > 2 * CLIP_NORM


@pytest.mark.parametrize("world", SEVERAL)
def test_ten_steps_in_float32_agree_to_1e_5(world, found):
    one, several = found["training_float32-1"], found[f"training_float32-{world}"]
    assert largest_difference(several["weights"], one["weights"]) < 1e-5


@pytest.mark.parametrize("world", SEVERAL)
def test_gradients_in_bf16_train_nearly_the_same(world, found):
    exact, rounded = found["training_float32-1"], found[f"training_compressed-{world}"]
    assert 1e-6 < largest_difference(rounded["weights"], exact["weights"]) < 1e-2


@pytest.mark.parametrize("world", SEVERAL)
@pytest.mark.parametrize("check", ["evaluation", "evaluation_of_two"])
def test_evaluation_does_not_depend_on_the_number_of_ranks(check, world, found):
    """103 images are not divisible by the number of ranks, and 2 are fewer than 3 or 4 ranks."""
    one, several = found[f"{check}-1"], found[f"{check}-{world}"]
    assert close(several, one, 1e-12)
    counts = [(r["count"], r["top1"], r["bin_count"]) for r in one.values()]
    assert [(r["count"], r["top1"], r["bin_count"]) for r in several.values()] == counts


@pytest.mark.parametrize("world", SEVERAL)
@pytest.mark.parametrize("check", ["predictions", "predictions_of_three", "predictions_sharded"])
def test_predictions_do_not_depend_on_the_number_of_ranks(check, world, found):
    one, several = found[f"{check}-1"], found[f"{check}-{world}"]
    assert one.keys() == several.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_close(several[key], value)
        elif value.is_floating_point():
            torch.testing.assert_close(several[key], value, rtol=1e-6, atol=1e-3 * ("feat" in key))
        else:
            assert torch.equal(several[key], value), key


def assert_close(came: dict, needed: dict) -> None:
    """Check that the numbers in nested dictionaries are nearly equal."""
    assert came.keys() == needed.keys()
    for key, value in needed.items():
        if isinstance(value, dict):
            assert_close(came[key], value)
        else:
            assert came[key] == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("world", range(1, LARGEST + 1))
def test_a_nan_on_one_rank_skips_the_step_on_all(world, found):
    came = found[f"poisoned-{world}"]
    assert came["unchanged"] == [True] * world  # batch norm's statistics too
    assert came["skipped"] == [[1, 1, 1]] * world


@pytest.mark.parametrize("world", range(1, LARGEST + 1))
def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(world, found):
    """The check includes dropout, which each rank draws for itself, and the logged means."""
    came = found[f"resumed-{world}"]
    assert came["same"] == [True] * world
    assert came["drawn"] == [True] * world
    assert came["means"][0] == came["means"][1]


@pytest.mark.parametrize("world", SEVERAL)
@pytest.mark.parametrize("check", ["sharded", "sharded_adamw"])
def test_a_sharded_teacher_trains_like_an_unsharded_one(check, world, found):
    """It also resumes from its checkpoint, on the same number of ranks and in one process."""
    one, several = found[f"{check}-1"], found[f"{check}-{world}"]
    assert largest_difference(several["weights"], one["weights"]) < 1e-10
    assert largest_difference(several["alone"], one["weights"]) < 1e-10
    assert min(one["norms"].values()) > 2 * CLIP_NORM  # clipping acts, by the norm over all shards
    assert several["nll"] == pytest.approx(one["nll"], abs=1e-10)
    assert several["part"] < 0.8 * one["part"]


@pytest.mark.parametrize("world", SEVERAL)
def test_a_request_of_one_rank_reaches_all_ranks_one_step_later(world, found):
    answers = [(0, 0), (world - 1, 0), (0, 5)]
    assert found[f"agreements-{world}"]["answers"] == [answers] * world
    assert found["agreements-1"]["answers"] == [[(0, 0), (0, 5), (0, 0)]]  # one process: at once


@pytest.mark.parametrize("world", SEVERAL)
def test_an_error_on_rank_0_is_raised_on_all_ranks(world, found):
    assert found[f"errors-{world}"]["said"] == ["the disk has gone"] * world


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"batch_size": 8, "accumulate": 4}}, "train.batch_size must be at least 12"),
        ({"distributed": {"sync_batch_norm": True}}, "sync_batch_norm must be false on a CPU"),
        ({"shard": True}, "shard must be false"),
    ],
    ids=["batch", "batch norm", "shard"],
)
def test_options_that_do_not_fit_the_ranks_are_refused(changes, said):
    recipe = load_recipe("digits")
    if "shard" in changes:
        teacher = dataclasses.replace(recipe.networks["teacher"], shard=True)
        recipe = dataclasses.replace(
            recipe,
            networks={**recipe.networks, "teacher": teacher},
            objective=OBJECTIVES.configure("switokd"),
        )
    else:
        parts = {k: dataclasses.replace(getattr(recipe, k), **v) for k, v in changes.items()}
        recipe = dataclasses.replace(recipe, **parts)
    with pytest.raises(UsageError, match=said):
        components_of(recipe, context=DistributedContext(0, 3))
    assert components_of(recipe).sharded == []  # one process accepts every change


def test_sync_batch_norm_keeps_logits_and_checkpoints(monkeypatch):
    """torch trains synchronised batch norm only on GPUs, so bdkd refuses it on a CPU. This test
    skips that check. In evaluation, synchronised batch norms must equal those that they replace."""
    monkeypatch.setattr("bdkd.engine.components.check_requirements", lambda *_: None)
    recipe = load_recipe("digits")
    synced = dataclasses.replace(recipe.distributed, sync_batch_norm=True)
    group = object()
    several = components_of(
        dataclasses.replace(recipe, distributed=synced),
        DistributedContext(0, 2, group=group),  # type: ignore[arg-type]
    )
    own = components_of(recipe, context=DistributedContext(0, 2))
    for components in (several, own):
        parallelize(
            components.networks, [], components.context, components.recipe.distributed,
            components.device, ddp=False,
        )  # fmt: skip
    for name, network in several.networks.members.items():
        norms = [m for m in network.modules() if hasattr(m, "running_mean")]
        plain = [m for m in own.networks.members[name].modules() if hasattr(m, "running_mean")]
        assert len(norms) == len(plain) > 0
        assert all(getattr(norm, "process_group", None) is group for norm in norms)
        assert not any(hasattr(norm, "process_group") for norm in plain)
    several.networks.load_state_dict(own.networks.state_dict())
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        logits = [components.networks.eval()((images,)) for components in (several, own)]
    torch.testing.assert_close(*logits)


ENDING = """
import atexit, sys, time
import torch
import torch.distributed as dist
from bdkd import cli
from bdkd.errors import RunError
from bdkd.distributed.launch import init_distributed as join_ranks

class Slow:
    def __del__(self):  # runs while the interpreter ends; other threads can run meanwhile
        time.sleep(1)

def busy():  # makes gloo's thread wait for the interpreter lock until the interpreter ends
    print("atexit", flush=False)
    sys.setswitchinterval(60)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        pass

slow = Slow()
atexit.register(busy)

def command(given):
    global held  # the objects of the trainer keep the ranks alive too
    with join_ranks(60, "cpu") as ranks:
        held = ranks
        if not ranks.is_rank0:
            time.sleep(1)  # rank 0 is already ending when its all_reduce completes
        work = dist.all_reduce(torch.ones(3), group=ranks.control, async_op=True)
        if not ranks.is_rank0:
            work.wait()
        if given == ["fails"]:
            raise RunError("no space left")
    print("done", flush=False)

cli.run = command
cli.main()
"""


@pytest.mark.parametrize(("how", "code", "last"), [
    ("ends", 0, "done"), pytest.param("fails", 1, "", marks=pytest.mark.soak),
])  # fmt: skip
def test_a_rank_exits_cleanly_while_gloo_still_holds_a_tensor(how, code, last, tmp_path):
    """gloo's thread releases the tensor while the interpreter ends, which may abort the process."""
    script = tmp_path / "rank.py"
    script.write_text(ENDING)
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--log-dir", str(tmp_path), "--redirects", "3", str(script), how,
    ]  # fmt: skip
    ended = subprocess.run(launch, capture_output=True, text=True, timeout=120)
    assert "SIGABRT" not in ended.stderr
    assert ended.returncode == code, ended.stderr
    (output,) = tmp_path.glob("*/attempt_0/0/stdout.log")
    assert output.read_text().split() == [*last.split(), "atexit"]
