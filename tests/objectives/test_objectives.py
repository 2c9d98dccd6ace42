"""The methods: values by hand, and who may learn from whom."""

import pytest
import torch
from torch.nn import functional as F

from bdkd.config import NetworkConfig, ObjectiveConfig
from bdkd.errors import UsageError
from bdkd.objectives import OBJECTIVES, create_objective

PAIR = {"t": NetworkConfig("x", "teacher"), "s": NetworkConfig("x", "student")}


def logits(seed: int = 0, classes: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(12, classes, dtype=torch.float64, generator=generator) * scale)
        .requires_grad_()
        for name, scale in (("t", 3.0), ("s", 1.0))
    }  # fmt: skip


TARGET = torch.arange(12) % 7


def test_bdkd_is_its_equations():
    x = logits()
    config = ObjectiveConfig(temperature=2.0, gamma=3.0, teacher_kd=0.5, backend="reference")
    out = create_objective(config, PAIR)(x, TARGET, 24.0, 1.0)
    log_s, log_t = F.log_softmax(x["s"] / 2, -1), F.log_softmax(x["t"] / 2, -1)
    forward = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    reverse = F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(-1)
    entropy = {k: -(v.exp() * v).sum(-1) for k, v in (("s", log_s), ("t", log_t))}
    d1 = torch.where(entropy["t"] > entropy["s"], 3.0, 1.0).double()
    d2 = torch.where(entropy["s"] > entropy["t"], 3.0, 1.0).double()
    student = (
        F.cross_entropy(x["s"], TARGET, reduction="sum") + 4 * (d1 * forward + d2 * reverse).sum()
    )
    teacher = F.cross_entropy(x["t"], TARGET, reduction="sum") + 0.5 * 4 * reverse.sum()
    torch.testing.assert_close(out.losses["s"], student / 24)
    torch.testing.assert_close(out.losses["t"], teacher / 24)
    torch.testing.assert_close(out.statistics["forward_weight"], d1)
    torch.testing.assert_close(out.statistics["reverse_kl"], reverse)


def test_independent_is_cross_entropy():
    x = logits()
    out = create_objective(ObjectiveConfig("independent", label_smoothing=0.1), PAIR)(
        x, TARGET, 12.0, 1.0
    )
    for name, loss in out.losses.items():
        torch.testing.assert_close(loss, F.cross_entropy(x[name], TARGET, label_smoothing=0.1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_loss_trains_its_own_network_only(name):
    x = logits()
    out = create_objective(ObjectiveConfig(name), PAIR)(x, TARGET, 12.0, 1.0)
    assert out.losses.keys() == PAIR.keys()
    for mine, other in (("s", "t"), ("t", "s")):
        gradients = torch.autograd.grad(
            out.losses[mine], [x[mine], x[other]], retain_graph=True, allow_unused=True
        )
        assert gradients[0].abs().sum() > 0
        assert gradients[1] is None or gradients[1].abs().sum() == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_a_batch_add_up(name):
    x = {k: v.detach() for k, v in logits().items()}
    objective = create_objective(ObjectiveConfig(name), PAIR)
    whole = objective(x, TARGET, 12.0, 1.0).losses
    parts = [
        objective({k: v[i : i + 4] for k, v in x.items()}, TARGET[i : i + 4], 12.0, 1.0).losses
        for i in (0, 4, 8)
    ]
    for network, loss in whole.items():
        torch.testing.assert_close(sum(part[network] for part in parts), loss)


def test_what_does_not_suit_a_method_is_named():
    third = PAIR | {"u": NetworkConfig("x", "student")}
    with pytest.raises(UsageError, match=r"one student, got 2 \(s, u\)"):
        create_objective(ObjectiveConfig(), third)
    with pytest.raises(UsageError, match=r"objective\.gamma must be .*>= 1.*0\.5"):
        create_objective(ObjectiveConfig(gamma=0.5), PAIR)
    with pytest.raises(UsageError, match=r"objective\.temperature is not an option"):
        create_objective(ObjectiveConfig("independent", temperature=2.0), PAIR)
    assert set(create_objective(ObjectiveConfig("independent"), third)(
        logits(), TARGET, 1.0, 1.0).losses) == {"t", "s"}  # fmt: skip
