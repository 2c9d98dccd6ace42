"""The checks of test_distributed, which run on one to four gloo ranks in the same processes."""

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from small_runs import Tiny, objective_of, tiny_state, trainer_of
from torch import nn

from bdkd.config import DistributedConfig, OptimizerConfig
from bdkd.data import Batch, DataInfo, Shard, Split
from bdkd.distributed.context import SINGLE_PROCESS, DistributedContext
from bdkd.distributed.launch import exit_rank
from bdkd.engine.optim import AdamConfig
from bdkd.engine.state import snapshot
from bdkd.engine.step import warm_up
from bdkd.errors import RunError
from bdkd.evaluation.predict import Evaluator

LARGEST = 4
CLIP_NORM = 0.05  # below the norm of every network's first gradient: see gradient_norms


class NoNorm(nn.Sequential):
    """A network without batch norm: its output for an image does not depend on other images."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Conv2d(1, 5, 3, 2), nn.Tanh(), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(45, 16), nn.Tanh(), nn.Linear(16, 10),
        )  # fmt: skip


def whole_batch(seed: int, dtype=torch.float32, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Batch((images.to(dtype),), torch.randint(10, (size,), generator=generator))


def share(batch: Batch, ranks: DistributedContext) -> Batch:
    mine = ranks.shard.of_batch(len(batch.target))
    return Batch(tuple(view[mine] for view in batch.views), batch.target[mine])


def run(state, batches, name: str = "bdkd", warms_up: bool = True) -> None:
    trainer = trainer_of(state, objective_of(state, name))
    state.networks.train()
    batches = list(batches)
    if warms_up and state.context.is_distributed:
        *_, (micro_batch, _) = share(batches[0], state.context).micro_batches(trainer.accumulate)
        warm_up(state, trainer.forward_backward, micro_batch)
    for batch in batches:
        trainer.train_step(share(batch, state.context))


def gradient_norms(state, batch: Batch, name: str = "bdkd") -> dict[str, float]:
    """Return the gradient norm of each network in one process, before clipping."""
    objective, logits = objective_of(state, name), state.networks(batch.views)
    samples, active = float(len(batch.target)), None
    if objective.has_dynamic_active_set:
        active = objective.active(objective.measure(logits, batch.target) / samples)
    output = objective(logits, batch.target, samples, 1.0, active)
    norms = {}
    for member, loss in output.losses.items():
        parameters = list(state.networks.members[member].parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        norms[member] = torch.cat([g.flatten() for g in gradients]).norm().item()
    return norms


def weights(state) -> dict[str, torch.Tensor]:
    values = state.networks.state_dict()
    if state.sharding is not None:
        values = state.sharding.gather_weights(values)
    return snapshot(values)


# --- the checks: each takes its ranks and returns the values that a test compares -----------------


def training(ranks: DistributedContext, name: str = "bdkd", **options) -> dict:
    """Train forty steps in float64, and return the weights and the logged means."""
    state = tiny_state(NoNorm, dtype=torch.float64, context=ranks, objective=name,
                       ema_decay=0.9, clip_norm=CLIP_NORM, **options)  # fmt: skip
    norms = (
        gradient_norms(state, whole_batch(0, torch.float64), name)
        if not ranks.is_distributed
        else {}
    )
    run(state, (whole_batch(i, torch.float64) for i in range(40)), name)
    return {"weights": weights(state), "means": state.meter.read(ranks), "norms": norms}


def training_switokd(ranks: DistributedContext) -> dict:
    return training(ranks, "switokd")


def training_accumulated(ranks: DistributedContext) -> dict:
    state = tiny_state(NoNorm, dtype=torch.float64, context=ranks, accumulate=2,
                       optimizer=AdamConfig("adamw", learning_rate=1e-3))  # fmt: skip
    run(state, (whole_batch(i, torch.float64) for i in range(20)))
    return {"weights": weights(state), "means": state.meter.read(ranks)}


def training_float32(ranks: DistributedContext) -> dict:
    state = tiny_state(NoNorm, context=ranks)
    run(state, (whole_batch(i) for i in range(10)))
    return {"weights": weights(state)}


def training_compressed(ranks: DistributedContext) -> dict:
    state = tiny_state(NoNorm, context=ranks, distributed=DistributedConfig(compress="bf16"))
    run(state, (whole_batch(i) for i in range(10)))
    return {"weights": weights(state)}


class Images:
    """A data source of random images, for evaluation only."""

    def __init__(self, count: int) -> None:
        self.batch = whole_batch(7, torch.float64, count)
        names = tuple("0123456789")
        self.info = DataInfo("random", names, 1, (8, 8), {"train": 0, "val": count, "test": 0})

    def eval_batches(self, split: Split, batch_size: int, shard: Shard) -> Iterator[Batch]:
        mine = shard.of_split(len(self.batch.target))
        images, target = self.batch.views[0][mine], self.batch.target[mine]
        for start in range(0, len(target), batch_size):
            part = slice(start, start + batch_size)
            yield Batch((images[part],), target[part])


def evaluation(ranks: DistributedContext, count: int = 103) -> dict:
    """Evaluate networks whose batch norm statistics differ between ranks."""
    state = tiny_state(dtype=torch.float64, context=ranks)
    for network in state.networks.members.values():
        network[1].running_mean += ranks.rank
    results = Evaluator(state.evaluated_networks(), Images(count), 10, "fp32", ranks).evaluate(
        "val"
    )
    everywhere = ranks.gather_objects(results)
    if everywhere is not None:
        assert all(of_rank == results for of_rank in everywhere)
    return {name: dataclasses.asdict(result) for name, result in results.items()}


class Featured(NoNorm):
    """A network whose features are its first activations."""

    def forward_features(self, images):
        return self[1](self[0](images))


def predictions(ranks: DistributedContext, count: int = 103, sharded=()) -> dict:
    """Return predictions, features and recalibrated results of one pass. Only rank 0 has them."""
    names = sharded if ranks.is_distributed else ()
    state = tiny_state(Featured, dtype=torch.float64, context=ranks, sharded=names)
    evaluator = Evaluator(state.evaluated_networks(), Images(count), 10, "fp32", ranks)
    temperatures = evaluator.fit_temperatures()
    done = evaluator.run("val", temperatures, keep_predictions=True)
    results, scaled, kept = done.results(), done.recalibrated(), done.predictions()
    assert (kept is None) == (not ranks.is_rank0)
    if kept is None:
        return {}
    return {
        "target": torch.from_numpy(kept.target), "featured": torch.from_numpy(kept.featured),
        "scaled": scaled, "nll": {name: result.nll for name, result in results.items()},
        **{f"{name}/{key}": torch.from_numpy(getattr(answers, key))
           for name, answers in kept.networks.items()
           for key in ("confidence", "entropy", "predicted", "features")},
    }  # fmt: skip


def predictions_of_three(ranks: DistributedContext) -> dict:
    """Predict three images, so that one of four ranks has no image."""
    return predictions(ranks, 3)


def predictions_sharded(ranks: DistributedContext) -> dict:
    return predictions(ranks, 103, ("teacher",))


def evaluation_of_two(ranks: DistributedContext) -> dict:
    """Evaluate two images, which are fewer than three or four ranks."""
    return evaluation(ranks, 2)


def poisoned(ranks: DistributedContext) -> dict:
    """Train a step with a NaN in an image of the last rank only."""
    state = tiny_state(context=ranks)
    run(state, [whole_batch(0)])
    before = snapshot(state.networks.state_dict())
    batch = whole_batch(1)
    batch.views[0][-1, 0, 2, 2] = torch.nan
    run(state, [batch], warms_up=False)
    after = snapshot(state.networks.state_dict())
    return {
        "unchanged": ranks.gather_objects(
            all(torch.equal(before[key], after[key]) for key in before)
        ),
        "skipped": ranks.gather_objects(state.skipped.tolist()),
    }


def resumed(ranks: DistributedContext) -> dict:
    """Train six steps in one run, and also in two runs of three steps with a resume."""
    options = {"context": ranks, "ema_decay": 0.9}

    def fresh():
        return tiny_state(lambda: nn.Sequential(Tiny(), nn.Dropout(0.2)), **options)

    steps = [whole_batch(i) for i in range(6)]
    straight = fresh()
    run(straight, steps)
    drawn = torch.rand(1).item()
    first = fresh()
    run(first, steps[:3])
    saved = ranks.broadcast_from_rank0(_whole(first))
    second = fresh()
    trainer_of(second).warm_up_ddp()
    second.load_state_dict(saved)
    run(second, steps[3:], warms_up=False)
    # Each rank has its own running statistics, and a checkpoint has those of rank 0.
    kept = "state_dict" if ranks.is_rank0 else "named_parameters"
    pairs = [dict(getattr(state.networks, kept)()) for state in (straight, second)]
    same = all(torch.equal(pairs[0][key], pairs[1][key]) for key in pairs[0])
    return {
        "same": ranks.gather_objects(same),
        "drawn": ranks.gather_objects(torch.rand(1).item() == drawn),
        "means": [straight.meter.read(ranks), second.meter.read(ranks)],
    }


def _whole(state) -> Callable[[], dict]:
    saved = state.state_dict()
    return lambda: snapshot(saved)


def sharded(ranks: DistributedContext, optimizer: OptimizerConfig | None = None) -> dict:
    """Train with a sharded teacher, and continue from its checkpoint with and without sharding."""
    options = {"dtype": torch.float64, "ema_decay": 0.9, "optimizer": optimizer,
               "clip_norm": CLIP_NORM}  # fmt: skip
    names = () if not ranks.is_distributed else ("teacher",)
    state = tiny_state(NoNorm, context=ranks, sharded=names, **options)
    norms = gradient_norms(state, whole_batch(0, torch.float64)) if not ranks.is_distributed else {}
    run(state, (whole_batch(i, torch.float64) for i in range(5)))
    saved = ranks.broadcast_from_rank0(_whole(state))
    again = tiny_state(NoNorm, context=ranks, sharded=names, **options)
    again.load_state_dict(snapshot(saved))  # a copy, because the optimizer keeps loaded tensors
    run(again, (whole_batch(i, torch.float64) for i in range(5, 10)))
    alone = tiny_state(NoNorm, **options)
    alone.load_state_dict(saved)
    run(alone, (whole_batch(i, torch.float64) for i in range(5, 10)))
    results = Evaluator(again.evaluated_networks(), Images(5), 2, "fp32", ranks).evaluate("val")
    return {
        "weights": weights(again), "alone": weights(alone), "nll": results["teacher"].nll,
        "norms": norms,
        "part": sum(p.to_local().numel() if names else p.numel()
                    for p in again.networks.members["teacher"].parameters()),
    }  # fmt: skip


def sharded_adamw(ranks: DistributedContext) -> dict:
    return sharded(ranks, AdamConfig("adamw", learning_rate=1e-3))


def agreements(ranks: DistributedContext) -> dict:
    """Reduce the maximum of each rank's number at step 1, and of 5 on rank 0 at step 2."""
    asked = [(ranks.rank, 0), (0, 5 if ranks.is_rank0 else 1), (0, 0)]
    answers = [ranks.async_all_reduce_max(*numbers) for numbers in asked]
    ranks.close()
    return {"answers": ranks.gather_objects(answers)}


def errors(ranks: DistributedContext) -> dict:
    def broken() -> None:
        raise RunError("the disk has gone")

    try:
        ranks.broadcast_from_rank0(broken)
    except RunError as error:
        return {"said": ranks.gather_objects(str(error))}
    raise AssertionError("no error was raised")


CHECKS = (
    training, training_switokd, training_accumulated, training_float32, training_compressed,
    evaluation, evaluation_of_two, predictions, predictions_of_three, predictions_sharded,
    poisoned, resumed, sharded, sharded_adamw, agreements, errors,
)  # fmt: skip


def main(rank: int, folder: str) -> None:
    """Run all checks on one to four ranks. Rank 0 saves the results in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=LARGEST
    )
    timeout = datetime.timedelta(seconds=300)
    found = SimpleNamespace()
    for world in range(1, LARGEST + 1):
        members = list(range(world))
        group, control = (dist.new_group(members, timeout=timeout) for _ in range(2))
        if rank >= world:
            continue
        ranks = (
            DistributedContext(rank, world, group=group, control=control)
            if world > 1
            else SINGLE_PROCESS
        )
        for check in CHECKS:
            torch.manual_seed(0)
            setattr(found, f"{check.__name__}-{world}", check(ranks))
    if rank == 0:
        torch.save(vars(found), Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()
    exit_rank(0)
