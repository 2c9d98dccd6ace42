"""Compare an evaluation with a plain loop: images, evaluation mode and precision."""

import dataclasses

import pytest
import torch
from torch import nn

from bdkd.data import WHOLE, Batch, DataInfo
from bdkd.errors import RunError
from bdkd.evaluation.calibration import Calibration
from bdkd.evaluation.predict import Evaluator


class Points:
    """2-D points in three splits, with two views. Evaluation must use the first view only."""

    def __init__(self, val: int = 23) -> None:
        generator = torch.Generator().manual_seed(0)
        counts = {"train": 40, "val": val, "test": 31}
        self.parts = {
            split: (torch.randn(n, 2, generator=generator),
                    torch.randint(3, (n,), generator=generator))
            for split, n in counts.items()
        }  # fmt: skip
        self.info = DataInfo("points", ("a", "b", "c"), 1, (1, 2), counts)  # type: ignore[arg-type]

    def eval_batches(self, split, batch_size, shard=WHOLE):
        images, target = self.parts[split]
        for start in range(0, len(target), batch_size):
            part = slice(start, start + batch_size)
            yield Batch((images[part], -images[part]), target[part])


def networks() -> dict[str, nn.Module]:
    """Return networks with batch norm and dropout, which behave differently in training mode."""
    torch.manual_seed(0)
    return {
        name: nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        for name in ("teacher", "student")
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_equals_a_plain_loop(split, precision):
    """Use batches of 7, which divide neither 23 nor 31 images. The plain loop uses the same
    batches: in bf16 a matrix product of another number of rows may round differently."""
    source, members = Points(), networks()
    members["teacher"].train()
    members["student"].eval()
    before = {
        name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in members.items()
    }
    drawn = torch.get_rng_state()
    results = Evaluator(members, source, 7, precision).evaluate(split)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (members["teacher"].training, members["student"].training) == (True, False)
    assert list(results) == ["teacher", "student"]
    images, target = source.parts[split]
    for name, network in members.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[name][key]), key
        network.eval()
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            logits = torch.cat([network(part) for part in images.split(7)])
        assert logits.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        meter = Calibration(3)
        meter.update(logits, target)
        came, by_hand = dataclasses.asdict(results[name]), dataclasses.asdict(meter.compute())
        for metric, value in by_hand.items():
            assert came[metric] == pytest.approx(value, rel=1e-6), metric
    assert results["teacher"].nll != results["student"].nll


def test_evaluation_without_validation_images_says_what_to_do():
    with pytest.raises(RunError, match=r"no val images .*data.validation is 0.*--split test"):
        Evaluator(networks(), Points(val=0), 8, "fp32").evaluate("val")  # type: ignore[arg-type]
