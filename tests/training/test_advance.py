"""``Objective.advance``: when the trainer calls it, and the warm-up of dkd, which uses it."""

import dataclasses
import gc
import signal

import pytest
import torch
import torch.distributed as dist
from small_runs import TINY_RUN, bdkd, interrupt_at, metrics, objective_of, same, tiny_state
from small_runs import trainer_of as trainer_with
from test_captured import Captures
from test_step import a_batch, everything
from torch._dynamo.testing import CompileCounterWithBackend

from bdkd.distributed.context import DistributedContext
from bdkd.engine.compiled import compiled
from bdkd.engine.cuda_graph import WARM_UP, CapturedStep
from bdkd.errors import UsageError
from bdkd.objectives import Objective, ObjectiveOutput, check_objective
from bdkd.objectives.independent import Independent, IndependentConfig
from bdkd.runs.checkpoint import load_checkpoint
from bdkd.trainer import Trainer

CPU = torch.device("cpu")
IMAGES = 1000  # of the tiny state; a batch has 16
WARMUP = 0.1  # epochs: steps 0 to 6 are in it


@pytest.fixture(autouse=True)
def fresh():
    """Reset dynamo, which counts the graphs of a function over the whole process."""
    torch.compiler.reset()


def a_state(**options):
    """Return a state whose teacher is frozen, with a configuration that names its weights."""
    state = tiny_state(frozen=frozenset({"teacher"}), **options)
    networks = dict(state.recipe.networks)
    networks["teacher"] = dataclasses.replace(networks["teacher"], weights="trained")
    state.recipe = dataclasses.replace(state.recipe, networks=networks)
    state.networks.train()
    return state


def a_trainer(state, **options) -> Trainer:
    return trainer_with(state, objective_of(state, "dkd", **{"warmup": WARMUP, **options}))


def watch(objective: Objective) -> list[tuple]:
    """Return a list that records calls of the objective: the epochs of ``advance``, or "loss"."""
    calls: list = []
    advance, loss = objective.advance, objective.loss_and_grad

    def advances(epochs, device):
        calls.append(epochs)
        assert device == CPU
        advance(epochs, device)

    def computes(*args):
        calls.append("loss")
        return loss(*args)

    objective.advance, objective.loss_and_grad = advances, computes
    return calls


@pytest.mark.parametrize("accumulate", [1, 2])
def test_advance_is_called_once_before_each_step_also_after_a_resume(accumulate, tmp_path):
    state = a_state(accumulate=accumulate)
    trainer = a_trainer(state)
    calls = watch(trainer.objective)
    for seed in range(65):  # 62 full batches are an epoch
        trainer.train_step(a_batch(seed=seed))
        if seed == 29:
            torch.save(state.state_dict(), tmp_path / "state.pt")
    losses = ["loss"] * accumulate
    epochs = [*(step * 16 / IMAGES for step in range(62)), 1.0, 1.016, 1.032]
    assert calls == [call for done in epochs for call in (done, *losses)]

    resumed = a_state(accumulate=accumulate)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    trainer = a_trainer(resumed)
    again = watch(trainer.objective)
    for seed in range(30, 65):
        trainer.train_step(a_batch(seed=seed))
    assert again == calls[30 * (1 + accumulate) :]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_compiled_step_uses_the_current_weight(accumulate):
    """The weight changes in each of these steps, and nothing is compiled again."""
    eager, other, constant = (a_state(accumulate=accumulate) for _ in range(3))
    counter = CompileCounterWithBackend("aot_eager")
    trainers = [a_trainer(eager), a_trainer(other), a_trainer(constant, warmup=0.0)]
    trainers[1].forward_backward = compiled(other, trainers[1].objective, backend=counter)
    for seed in range(8):
        for trainer in trainers:
            trainer.train_step(a_batch(seed=seed))
    assert counter.frame_count == 1
    torch.testing.assert_close(everything(other), everything(eager))
    weight = "members.student.4.weight"
    assert (everything(constant)[weight] - everything(eager)[weight]).abs().max() > 1e-3


def test_ddp_steps_are_not_recompiled_after_the_warm_up(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        after_warm_up, after_steps = graphs_under_ddp()
    finally:
        gc.collect()  # the models are freed before the group
        dist.destroy_process_group()
    assert after_steps == after_warm_up > 0


def graphs_under_ddp() -> tuple[int, int]:
    ranks = DistributedContext(0, 1, group=dist.group.WORLD)
    counter = CompileCounterWithBackend("aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedContext, "is_distributed", True)
        state = a_state(context=ranks)
        trainer = a_trainer(state)
        trainer.forward_backward = compiled(state, trainer.objective, backend=counter)
        trainer.warm_up_ddp()
        after_warm_up = counter.frame_count
        for seed in range(4):
            trainer.train_step(a_batch(seed=seed))
    return after_warm_up, counter.frame_count


def test_a_captured_step_uses_the_current_weight():
    plain, other = a_state(), a_state()
    captures = Captures(other)
    one, two = a_trainer(plain), a_trainer(other)
    two.compute_step = CapturedStep(two.compute_step, other.optimizer, other.device, captures)
    for group in plain.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    for seed in range(WARM_UP + 6):
        for trainer in (one, two):
            trainer.train_step(a_batch(seed=seed))
    assert captures.count == 1
    assert two.objective.ramp.value == 1.0  # the weight grew in replayed steps
    expected = everything(plain)
    for key, value in everything(other).items():
        assert torch.equal(value, expected[key]), key


class Fading(Independent):
    """An objective of a plugin whose weight exists only after a call of ``advance``."""

    def advance(self, epochs, device):
        self.weight = torch.full((), 0.5**epochs, device=device)

    def __call__(self, *arguments):
        output = super().__call__(*arguments)
        losses = {name: self.weight * loss for name, loss in output.losses.items()}
        return ObjectiveOutput(losses)


def test_check_objective_calls_advance_before_the_losses():
    state = a_state()
    fading = Fading(IndependentConfig("independent"), state.recipe.networks)
    check_objective(fading, state.recipe.networks, 4, 10, CPU)
    fading.advance = lambda epochs, device: 1 / 0
    with pytest.raises(UsageError, match=r"fails on logits .*: ZeroDivisionError"):
        check_objective(fading, state.recipe.networks, 4, 10, CPU)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    done = bdkd("train", *TINY_RUN, "--objective.name", "independent", "--run-dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.soak  # test_resume.py kills runs in every suite
@pytest.mark.parametrize("step", [8, 17])
def test_a_killed_run_resumes_in_the_middle_of_the_warm_up(step, teacher, tmp_path):
    """The warm-up lasts two epochs of 12 steps. A checkpoint is saved every 5 steps."""
    options = [*TINY_RUN, "--objective.name", "dkd", "--objective.warmup", "2", "--log",
               "--networks.teacher.weights", str(teacher), "--train.deterministic"]  # fmt: skip
    whole, run, constant = (tmp_path / name for name in ("whole", "run", "constant"))
    done = bdkd("train", *options, "--run-dir", str(whole))
    assert done.returncode == 0, done.stderr
    code, _ = interrupt_at(step, signal.SIGKILL, *options, "--run-dir", str(run))
    assert code == -signal.SIGKILL
    done = bdkd("train", "--resume", "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert "continuing at step" in done.stdout
    final = max((whole / "checkpoints").glob("step-*.pt"), key=lambda path: path.name).name
    came, expected = (load_checkpoint(p / "checkpoints" / final)[1] for p in (run, whole))
    for state in (came, expected):
        del state["position"]["seconds"]
    for key in expected:
        assert same(came[key], expected[key]), key
    assert metrics(run) == metrics(whole)
    bdkd("train", *options, "--objective.warmup", "0", "--run-dir", str(constant))
    assert metrics(constant)[0] != metrics(whole)[0]  # the warm-up changes the loss
