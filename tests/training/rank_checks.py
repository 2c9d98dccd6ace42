"""What test_distributed looks at, done on one to four gloo ranks in processes started once."""

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from small_runs import Tiny, tiny_state
from torch import nn

from bdkd.config import DistributedConfig, ObjectiveConfig, OptimizerConfig
from bdkd.data import Batch, DataInfo, Shard, Split
from bdkd.errors import RunError
from bdkd.objectives import create_objective
from bdkd.training.checkpoint import snapshot
from bdkd.training.distributed import ALONE, Ranks, end_process
from bdkd.training.evaluate import evaluate
from bdkd.training.step import forward_and_loss, train_step, warm_up

LARGEST = 4
CLIP_NORM = 0.05  # below the norm of every network's first gradient: see gradient_norms


class NoNorm(nn.Sequential):
    """A network without batch norm, whose images do not see one another."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Conv2d(1, 5, 3, 2), nn.Tanh(), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(45, 16), nn.Tanh(), nn.Linear(16, 10),
        )  # fmt: skip


def whole_batch(seed: int, dtype=torch.float32, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Batch((images.to(dtype),), torch.randint(10, (size,), generator=generator))


def share(batch: Batch, ranks: Ranks) -> Batch:
    mine = ranks.shard.of_batch(len(batch.target))
    return Batch(tuple(view[mine] for view in batch.views), batch.target[mine])


def objective_of(state, name: str):
    return create_objective(ObjectiveConfig(name), state.recipe.networks)


def run(state, batches, name: str = "bdkd", settled: bool = True) -> None:
    objective = objective_of(state, name)
    state.networks.train()
    batches = list(batches)
    if settled and not state.ranks.alone:
        warm_up(state, objective, share(batches[0], state.ranks), state.recipe.train)
    for batch in batches:
        train_step(state, objective, share(batch, state.ranks), state.recipe.train)


def gradient_norms(state, batch: Batch, name: str = "bdkd") -> dict[str, float]:
    """Of each network, unclipped; of a whole network, as one process has it."""
    _, output = forward_and_loss(
        state.networks, objective_of(state, name), batch, state.recipe.train,
        float(len(batch.target)), torch.ones(()), ALONE,
    )  # fmt: skip
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


# --- what is looked at: each gets its ranks and gives what the test reads -------------------------


def training(ranks: Ranks, name: str = "bdkd", **options) -> dict:
    """Forty steps in float64: the weights, and the log's means."""
    state = tiny_state(NoNorm, dtype=torch.float64, ranks=ranks, controls=name == "switokd",
                       ema_decay=0.9, clip_norm=CLIP_NORM, **options)  # fmt: skip
    norms = gradient_norms(state, whole_batch(0, torch.float64), name) if ranks.alone else {}
    run(state, (whole_batch(i, torch.float64) for i in range(40)), name)
    return {"weights": weights(state), "means": state.meter.read(ranks), "norms": norms}


def training_switokd(ranks: Ranks) -> dict:
    return training(ranks, "switokd")


def training_accumulated(ranks: Ranks) -> dict:
    state = tiny_state(NoNorm, dtype=torch.float64, ranks=ranks, accumulate=2,
                       optimizer=OptimizerConfig("adamw", learning_rate=1e-3))  # fmt: skip
    run(state, (whole_batch(i, torch.float64) for i in range(20)))
    return {"weights": weights(state), "means": state.meter.read(ranks)}


def training_float32(ranks: Ranks) -> dict:
    state = tiny_state(NoNorm, ranks=ranks)
    run(state, (whole_batch(i) for i in range(10)))
    return {"weights": weights(state)}


def training_compressed(ranks: Ranks) -> dict:
    state = tiny_state(NoNorm, ranks=ranks, distributed=DistributedConfig(compress="bf16"))
    run(state, (whole_batch(i) for i in range(10)))
    return {"weights": weights(state)}


class Images:
    """A data source of random images, of which only the evaluation is wanted."""

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


def evaluation(ranks: Ranks, count: int = 103) -> dict:
    """Networks with batch norm, whose running statistics have gone apart."""
    state = tiny_state(dtype=torch.float64, ranks=ranks)
    for network in state.networks.members.values():
        network[1].running_mean += ranks.rank
    results = evaluate(state.evaluated_networks(), Images(count), "val", 10, "fp32", ranks)
    everywhere = ranks.gather(results)
    if everywhere is not None:
        assert all(of_rank == results for of_rank in everywhere)
    return {name: dataclasses.asdict(result) for name, result in results.items()}


def evaluation_of_two(ranks: Ranks) -> dict:
    """Fewer images than ranks."""
    return evaluation(ranks, 2)


def poisoned(ranks: Ranks) -> dict:
    """A NaN among the images of the last rank alone."""
    state = tiny_state(ranks=ranks)
    run(state, [whole_batch(0)])
    before = snapshot(state.networks.state_dict())
    batch = whole_batch(1)
    batch.views[0][-1, 0, 2, 2] = torch.nan
    run(state, [batch], settled=False)
    after = snapshot(state.networks.state_dict())
    return {
        "unchanged": ranks.gather(all(torch.equal(before[key], after[key]) for key in before)),
        "skipped": ranks.gather(state.skipped.tolist()),
    }


def resumed(ranks: Ranks) -> dict:
    """Six steps, and three with their state loaded into another run that does the other three."""
    options = {"ranks": ranks, "ema_decay": 0.9}

    def fresh():
        return tiny_state(lambda: nn.Sequential(Tiny(), nn.Dropout(0.2)), **options)

    steps = [whole_batch(i) for i in range(6)]
    straight = fresh()
    run(straight, steps)
    drawn = torch.rand(1).item()
    first = fresh()
    run(first, steps[:3])
    saved = ranks.from_first(_whole(first))
    second = fresh()
    objective = objective_of(second, "bdkd")
    if not ranks.alone:
        second.networks.train()
        warm_up(second, objective, share(steps[0], ranks), second.recipe.train)
    second.load_state_dict(saved)
    run(second, steps[3:], settled=False)
    # The running statistics of the first rank are the run's; each rank has its own.
    kept = "state_dict" if ranks.first else "named_parameters"
    pairs = [dict(getattr(state.networks, kept)()) for state in (straight, second)]
    same = all(torch.equal(pairs[0][key], pairs[1][key]) for key in pairs[0])
    return {
        "same": ranks.gather(same),
        "drawn": ranks.gather(torch.rand(1).item() == drawn),
        "means": [straight.meter.read(ranks), second.meter.read(ranks)],
    }


def _whole(state) -> Callable[[], dict]:
    saved = state.state_dict()
    return lambda: snapshot(saved)


def sharded(ranks: Ranks, optimizer: OptimizerConfig | None = None) -> dict:
    """A sharded teacher: the training, its checkpoint, and another run from that."""
    options = {"dtype": torch.float64, "ema_decay": 0.9, "optimizer": optimizer,
               "clip_norm": CLIP_NORM}  # fmt: skip
    names = () if ranks.alone else ("teacher",)
    state = tiny_state(NoNorm, ranks=ranks, sharded=names, **options)
    norms = gradient_norms(state, whole_batch(0, torch.float64)) if ranks.alone else {}
    run(state, (whole_batch(i, torch.float64) for i in range(5)))
    saved = ranks.from_first(_whole(state))
    again = tiny_state(NoNorm, ranks=ranks, sharded=names, **options)
    again.load_state_dict(snapshot(saved))  # the optimizer takes moments over as they are
    run(again, (whole_batch(i, torch.float64) for i in range(5, 10)))
    alone = tiny_state(NoNorm, **options)
    alone.load_state_dict(saved)
    run(alone, (whole_batch(i, torch.float64) for i in range(5, 10)))
    results = evaluate(again.evaluated_networks(), Images(5), "val", 2, "fp32", ranks)
    return {
        "weights": weights(again), "alone": weights(alone), "nll": results["teacher"].nll,
        "norms": norms,
        "part": sum(p.to_local().numel() if names else p.numel()
                    for p in again.networks.members["teacher"].parameters()),
    }  # fmt: skip


def sharded_adamw(ranks: Ranks) -> dict:
    return sharded(ranks, OptimizerConfig("adamw", learning_rate=1e-3))


def agreements(ranks: Ranks) -> dict:
    """Each rank asks for its own number at step 1, the first for 5 at step 2."""
    asked = [(ranks.rank, 0), (0, 5 if ranks.first else 1), (0, 0)]
    answers = [ranks.agree(*numbers) for numbers in asked]
    ranks.close()
    return {"answers": ranks.gather(answers)}


def errors(ranks: Ranks) -> dict:
    def broken() -> None:
        raise RunError("the disk has gone")

    try:
        ranks.from_first(broken)
    except RunError as error:
        return {"said": ranks.gather(str(error))}
    raise AssertionError("no error came")


CHECKS = (
    training, training_switokd, training_accumulated, training_float32, training_compressed,
    evaluation, evaluation_of_two, poisoned, resumed, sharded, sharded_adamw, agreements, errors,
)  # fmt: skip


def main(rank: int, folder: str) -> None:
    """All checks on all numbers of ranks; the first rank keeps what each gave."""
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
        ranks = Ranks(rank, world, group=group, control=control) if world > 1 else ALONE
        for check in CHECKS:
            torch.manual_seed(0)
            setattr(found, f"{check.__name__}-{world}", check(ranks))
    if rank == 0:
        torch.save(vars(found), Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()
    end_process(0)
