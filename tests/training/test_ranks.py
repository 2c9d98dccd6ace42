"""Launch variables, output and errors of ranks, and how ranks pack tensors for communication."""

import socket

import pytest
import torch

from bdkd.distributed.context import (
    DistributedContext,
    _buckets,
    by_dtype,
    copy_flat,
    flatten,
)
from bdkd.distributed.launch import (
    init_distributed,
    is_launched,
    launch_id,
    local_rank,
    only_rank0_prints,
    report_failure,
)
from bdkd.errors import RunError, UsageError

# As torchrun sets them for the third of four ranks, the first one of the second machine.
LAUNCHED = {
    "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Unset all variables of a launcher, and return a function that sets one."""
    for name in (*LAUNCHED, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


def test_the_local_rank_is_the_position_on_the_machine(environment):
    assert (is_launched(), local_rank()) == (False, 0)
    for name, value in LAUNCHED.items():
        environment(name, value)
    assert (is_launched(), local_rank()) == (True, 0)
    environment("LOCAL_RANK", "1")
    assert local_rank() == 1


@pytest.mark.parametrize("left_out", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_set_of_launch_variables_is_no_launch(left_out, environment):
    """A batch system may set WORLD_SIZE or RANK for other programs. The run is then one process."""
    for name, value in LAUNCHED.items():
        if name != left_out:
            environment(name, value)
    environment("LOCAL_RANK", "3")
    assert (is_launched(), local_rank()) == (False, 0)
    with init_distributed(1.0, "cpu") as ranks:
        assert (ranks.rank, ranks.world_size, not ranks.is_distributed, ranks.is_rank0) == (
            0,
            1,
            True,
            True,
        )


def test_each_launch_has_its_own_id(environment, monkeypatch):
    assert launch_id() is None
    environment("TORCHELASTIC_RUN_ID", "job-17")
    assert launch_id() == "job-17"
    environment("TORCHELASTIC_RUN_ID", "none")  # torchrun's value for every launch without an id
    ranks = []
    for agent, own in ((100, 101), (100, 102), (200, 201)):
        monkeypatch.setattr("os.getppid", lambda agent=agent: agent)
        monkeypatch.setattr("os.getpid", lambda own=own: own)
        ranks.append(launch_id())
    assert ranks[0] == ranks[1] != ranks[2]
    assert socket.gethostname() in str(ranks[0])


def test_tensors_of_all_dtypes_and_layouts_are_flattened_and_restored():
    tensors = [
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), torch.tensor(3),
        torch.randn(4, 3).T, torch.tensor(2.0), torch.randn(0), torch.arange(4),
        torch.randn(3).double(),
    ]  # fmt: skip
    groups = by_dtype(tensors)
    assert [{t.dtype for t in group} for group in groups] == [
        {torch.float32}, {torch.int64}, {torch.float64},
    ]  # fmt: skip
    assert sum(map(len, groups)) == len(tensors)
    for group in groups:
        before, flat = [t.clone() for t in group], flatten(group)
        assert flat.shape == (sum(t.numel() for t in group),)
        copy_flat(group, 2 * flat)
        for tensor, old in zip(group, before, strict=True):
            assert torch.equal(tensor, 2 * old)
            assert tensor.stride() == old.stride()


@pytest.mark.parametrize("sizes", [[], [1], [8], [3, 3, 3, 3, 3], [9, 1, 1, 9], [4, 4, 4, 4]])
def test_every_gradient_is_in_one_bucket_and_a_full_bucket_is_sent(sizes):
    """A bucket is full at 32 bytes, which are 8 numbers. Its last tensor may exceed the limit."""
    tensors = [torch.full((size,), float(i)) for i, size in enumerate(sizes)]
    buckets = list(_buckets(tensors, limit=32))
    assert [t.data_ptr() for bucket in buckets for t in bucket] == [t.data_ptr() for t in tensors]
    for number, bucket in enumerate(buckets):
        *others, last = (t.nbytes for t in bucket)
        assert sum(others) < 32
        assert sum(others) + last >= 32 or number == len(buckets) - 1


class Store:
    """A stand-in for torch's store, in which only some ranks have reported."""

    def __init__(self, *reported: int) -> None:
        self.values = {f"host/{rank}": f"node{rank // 2}" for rank in range(4)}
        self.values |= {f"lost/{rank}": "step 7" for rank in reported}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


def test_silent_ranks_are_named_with_their_machines(monkeypatch):
    monkeypatch.setattr("bdkd.distributed.context._REPORT_SECONDS", 0.01)
    for rank, silent, named in (
        (2, (0, 3), "rank 0 on node0, rank 3 on node1"),
        (3, (2,), "rank 2 on node1"),
        (0, (), "a network connection (all ranks still report)"),
    ):
        store = Store(*({0, 1, 2, 3} - {rank, *silent}))
        ranks = DistributedContext(rank, 4, store=store, timeout=30)  # type: ignore[arg-type]
        ranks.location = "step 7"
        assert ranks.describe_missing_ranks() == (
            f"{named}: ended, or no answer for 30 s (distributed.timeout), while rank {rank} was "
            "at step 7"
        )


def test_one_process_does_not_communicate():
    ranks, tensor = DistributedContext(), torch.tensor([1.0])
    ranks.all_reduce_sum(tensor)
    ranks.average_gradients([tensor])
    ranks.broadcast_tensors([tensor])
    assert tensor.item() == 1
    assert ranks.gather_objects("mine") == ["mine"]
    assert ranks.broadcast_from_rank0(lambda: "made") == "made"
    assert ranks.async_all_reduce_max(3, 0) == (3, 0)  # at once, and not one step later
    assert ranks.shard == (0, 1)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    "error", [UsageError("no such recipe"), SystemExit(7)], ids=["refused", "exits"]
)
def test_an_error_on_all_ranks_is_printed_only_by_rank_0(
    rank, error, environment, monkeypatch, capsys
):
    monkeypatch.setattr("bdkd.distributed.launch._SPEAK_SECONDS", 0.0)
    for name, value in {**LAUNCHED, "RANK": rank}.items():
        environment(name, value)

    @only_rank0_prints()
    def command() -> None:
        print("said")
        raise error

    with pytest.raises((UsageError, SystemExit)) as raised:
        command()
    said = capsys.readouterr().out
    if rank == "0":
        assert raised.value is error
        assert said == "said\n"
    else:
        assert raised.value.code == (7 if isinstance(error, SystemExit) else 2)
        assert said == ""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_rank_0_reports_a_failure_on_the_terminal(rank, environment, monkeypatch):
    """Once a run has started, other ranks write failures to their own log files."""
    monkeypatch.setattr("bdkd.distributed.launch._SPEAK_SECONDS", 0.0)
    monkeypatch.setattr("bdkd.distributed.launch._FIRST_SECONDS", 0.0)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    for name, value in {**LAUNCHED, "RANK": rank}.items():
        environment(name, value)
    assert report_failure(RunError("the disk is full")) is (rank == "0")
