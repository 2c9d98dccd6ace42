"""``train.compile``: compiled training, with one graph or two graphs, equals eager training.

The backend ``aot_eager`` builds the graphs of inductor and runs them without generated code, which
takes a fraction of the time.
"""

import dataclasses
import gc

import pytest
import torch
import torch.distributed as dist
from compiler import COMPILER, HAS_COMPILER
from small_runs import Tiny, check_step, objective_of, tiny_recipe, tiny_state, trainer_of
from test_step import OPTIMIZERS, a_batch, everything
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.exc import InvalidCxxCompiler

from bdkd.config import load_recipe
from bdkd.data import Batch
from bdkd.distributed.context import DistributedContext
from bdkd.engine.compiled import (
    add_gradients,
    announce_compilation,
    compiled,
    count_shapes,
)
from bdkd.engine.step import warm_up
from bdkd.errors import RunError
from bdkd.registry import SOURCES

ONE_GRAPH = hasattr(torch._dynamo.config, "trace_autograd_ops")


@pytest.fixture(autouse=True)
def fresh():
    """Reset dynamo, which counts the graphs of a function over the whole process."""
    torch.compiler.reset()


@pytest.fixture
def without_flag(monkeypatch):
    """Simulate a torch that cannot include the backward pass in a graph."""
    monkeypatch.setattr("bdkd._torch_compat._BACKWARD_FLAG", "no_such_flag")


class Drops(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.3), nn.Linear(16, 10))


def steps(state, batches, backend=None, shapes=2, **options):
    """Train, compiled if a backend is given. Returns the number of compiled graphs."""
    trainer, counter = trainer_of(state, objective_of(state, **options)), None
    if backend is not None:
        counter = CompileCounterWithBackend(backend)
        compiles = compiled(state, trainer.objective, shapes, counter)
        trainer.forward_backward = announce_compilation(compiles, prints=True)
    state.networks.train()
    if state.context.is_distributed:  # as at the start of a run
        *_, (micro_batch, _) = batches[0].micro_batches(trainer.accumulate)
        warm_up(state, trainer.forward_backward, micro_batch)
    for batch in batches:
        trainer.train_step(batch)
    return counter and counter.frame_count


def assert_same(one, other, **tolerance):
    expected = everything(one)
    torch.testing.assert_close(everything(other), expected, **tolerance)


def backward_in(counter) -> list[bool]:
    """Return for each graph whether it computes gradients."""
    return [
        any(node.target is torch.autograd.grad for node in graph.graph.nodes)
        for graph in counter.graphs
    ]


CASES = {
    "sgd": {"clip_norm": 1.0, "ema_decay": 0.9},
    "adamw": {"optimizer": OPTIMIZERS["adamw"]},
    "four parts": {"accumulate": 4},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_run_equals_an_eager_run(case):
    """One of the steps has a NaN."""
    eager, other = tiny_state(**CASES[case]), tiny_state(**CASES[case])
    batches = [a_batch(seed=i, poisoned=i == 2) for i in range(6)]
    steps(eager, batches)
    assert steps(other, batches, "aot_eager") == 1
    assert_same(eager, other)
    assert other.skipped.tolist() == eager.skipped.tolist() == [1, 0, 1]
    assert str(other.meter.read()) == str(eager.meter.read())


def test_generated_code_trains_like_eager():
    eager, other = tiny_state(), tiny_state()
    batches = [a_batch(seed=i) for i in range(3)]
    steps(eager, batches)
    assert steps(other, batches, COMPILER) == 1
    assert_same(eager, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not ONE_GRAPH, reason="this torch lacks the flag: the test of two graphs below")
def test_the_backward_pass_is_in_the_graph():
    state, counter = tiny_state(), CompileCounterWithBackend("aot_eager")
    compiled(state, objective_of(state), backend=counter)(a_batch())
    assert backward_in(counter) == [True]
    assert all(p.grad is not None for p in state.networks.parameters())


def test_without_the_flag_there_are_two_graphs_and_the_same_run(without_flag):
    eager, other = tiny_state(accumulate=2), tiny_state(accumulate=2)
    batches = [a_batch(seed=i, poisoned=i == 2) for i in range(4)]
    steps(eager, batches)
    counter = CompileCounterWithBackend("aot_eager")
    trainer = trainer_of(other)
    trainer.forward_backward = compiled(other, trainer.objective, backend=counter)
    other.networks.train()
    for batch in batches:
        trainer.train_step(batch)
    assert backward_in(counter) == [False]
    assert_same(eager, other)


def test_under_ddp_gradients_come_from_autograd(tmp_path):
    """DDP's hooks reduce the gradients while autograd computes them."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        compare_under_ddp()
    finally:
        # The models are freed before the group; see _with_one_rank in torch_features.py.
        gc.collect()
        dist.destroy_process_group()


def compare_under_ddp() -> None:
    ranks = DistributedContext(0, 1, group=dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedContext, "is_distributed", True)
        states = [tiny_state(context=ranks, accumulate=2) for _ in range(2)]
        exchanged = []
        states[1].model.register_comm_hook(None, lambda _, bucket: exchanged.append(1) or
                                           _done(bucket.buffer()))  # fmt: skip
        batches = [a_batch(seed=i) for i in range(3)]
        steps(states[0], batches)
        steps(states[1], batches, "aot_eager")
    assert len(exchanged) >= len(batches)
    assert_same(*states)


def _done(value):
    future = torch.futures.Future()
    future.set_result(value)
    return future


def test_a_frozen_teacher_gets_no_gradient():
    frozen = frozenset({"teacher"})
    eager, other = tiny_state(frozen=frozen), tiny_state(frozen=frozen)
    for state in (eager, other):
        state.recipe = dataclasses.replace(
            state.recipe, networks={n: dataclasses.replace(c, frozen=n == "teacher")
                                    for n, c in state.recipe.networks.items()})  # fmt: skip
    batches = [a_batch(seed=i) for i in range(3)]
    before = everything(other)
    steps(eager, batches, name="bdkd")
    assert steps(other, batches, "aot_eager", name="bdkd") == 1
    assert_same(eager, other)
    assert all(torch.equal(v, before[k]) for k, v in everything(other).items() if "teacher" in k)


def test_a_resumed_compiled_run_equals_an_uninterrupted_run(tmp_path):
    """Dropout inside the graph draws from the random state that a checkpoint saves."""
    batches = [a_batch(seed=i) for i in range(6)]
    whole, first, second = (tiny_state(Drops, ema_decay=0.9) for _ in range(3))
    torch.manual_seed(1)
    steps(whole, batches, "aot_eager")
    torch.manual_seed(1)
    steps(first, batches[:3], "aot_eager")
    torch.save(first.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(second, batches[3:], "aot_eager")
    assert_same(whole, second, rtol=0, atol=0)
    assert not torch.equal(everything(first)["members.student.1.weight"],
                           everything(second)["members.student.1.weight"])  # fmt: skip


class Breaks(Tiny):
    """A network that dynamo cannot compile as one graph."""

    def forward(self, x):
        x = self[0](x)
        torch._dynamo.graph_break()
        return super().forward(x) if x.shape[1] == 1 else self[4](self[3](self[2](self[1](x))))


def test_a_network_that_breaks_the_graph_trains_like_eager():
    eager, other = tiny_state(Breaks), tiny_state(Breaks)
    batches = [a_batch(seed=i) for i in range(3)]
    steps(eager, batches)
    assert steps(other, batches, "aot_eager") > 1
    assert_same(eager, other)


class TwoBiases(nn.Module):
    """Two biases that get the same gradient, and a parameter that gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.a(x.flatten(1)) + self.b(x.flatten(1))


def test_gradients_do_not_share_memory():
    """If two gradients shared memory, clipping would scale them twice."""
    eager, other = (tiny_state(TwoBiases, clip_norm=0.01, accumulate=2) for _ in range(2))
    batches = [a_batch(seed=i) for i in range(3)]
    steps(eager, batches)
    steps(other, batches, COMPILER)
    assert_same(eager, other, rtol=1e-4, atol=1e-6)
    p, q = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))
    one = torch.ones(3, 2).T
    add_gradients([p, q], [one, one])
    assert p.grad.data_ptr() != q.grad.data_ptr()
    assert p.grad.stride() == q.grad.stride() == p.stride()
    add_gradients([p, q], [one, None])
    assert p.grad.unique().tolist() == [2]
    assert q.grad.unique().tolist() == [1]


class AnySize(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 10))  # fmt: skip


@pytest.mark.parametrize("flag", [True, False], ids=["one graph", "two graphs"])
def test_every_image_size_is_compiled_once(flag, request):
    """Progressive resolution may have more image sizes than dynamo's recompile limit."""
    if not flag:
        request.getfixturevalue("without_flag")
    recipe, sides = load_recipe("digits"), range(8, 12)
    data = SOURCES.configure("imagenet", image_size=11, progressive=tuple(enumerate(sides)))
    recipe = dataclasses.replace(recipe, data=data)
    shapes = count_shapes(recipe)
    assert shapes == len(sides)
    batches = [Batch((torch.randn(16, 1, side, side),), a_batch().target) for side in sides]
    state = tiny_state(AnySize)
    with torch._dynamo.config.patch(recompile_limit=1):
        assert steps(state, batches * 2, "aot_eager", shapes=shapes) == len(sides)


def test_a_new_shape_is_announced_once_and_only_by_rank_0(capsys):
    state = tiny_state()
    steps(state, [a_batch(16), a_batch(16), a_batch(8)], "eager")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(";")[0].split(" in ")[0] for line in said] == [
        "compiling the step for batches of 16x1x8x8", "compiled and ran the step once",
        "compiling the step for batches of 8x1x8x8", "compiled and ran the step once",
    ]  # fmt: skip
    second = announce_compilation(lambda micro_batch: micro_batch, prints=False)
    assert len(second(a_batch(4)).target) == 4
    assert capsys.readouterr().out == ""


def test_a_compiler_error_is_reported_in_one_line():
    def broken(graph, inputs):
        raise ValueError("no such operator\nand more")

    with pytest.raises(RunError, match=r"^train\.compile: torch could not compile the step: "
                       r"ValueError: no such operator; fix the cause or train"):  # fmt: skip
        steps(tiny_state(), [a_batch()], broken)


def test_a_machine_without_a_compiler_is_refused_before_any_step(monkeypatch):
    recipe = tiny_recipe(train={"compile": True})
    if HAS_COMPILER:
        check_step(recipe, "cpu")

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(RunError, match=r"needs a C\+\+ compiler on a CPU"):
        check_step(recipe, "cpu")
    check_step(recipe, "cuda")
