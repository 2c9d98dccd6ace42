"""Several networks in one module: views of a batch, frozen networks, and restored buffers."""

import pytest
import torch
from torch import nn

from bdkd.config import NetworkConfig
from bdkd.engine.networks import Networks, SavedBuffers, build_networks
from bdkd.engine.optim import SGDConfig, build_optimizer
from bdkd.models import create_model


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        return self.factor * x


def three(frozen=frozenset()) -> Networks:
    # Not in alphabetical order, because the networks must keep the order of the recipe.
    return Networks({name: Times(f) for name, f in (("c", 2.0), ("a", 3.0), ("b", 5.0))}, frozen)


def test_each_network_gets_its_own_view_or_the_only_view():
    views = tuple(torch.tensor([[x]]) for x in (1.0, 10.0, 100.0))
    assert {k: v.item() for k, v in three()(views).items()} == {"c": 2, "a": 30, "b": 500}
    alike = three()(views[1:2])
    assert {k: v.item() for k, v in alike.items()} == {"c": 20, "a": 30, "b": 50}
    assert list(alike) == ["c", "a", "b"]
    with pytest.raises(ValueError, match="zip"):
        three()(views[:2])


def test_a_frozen_network_gets_no_gradient_and_stays_in_evaluation_mode():
    networks = three(frozenset({"a"}))
    assert list(networks.trained()) == ["c", "b"]
    assert [p.requires_grad for p in networks.members["a"].parameters()] == [False] * 3
    for mode in (True, False, True):
        networks.train(mode)
        modes = {name: network.training for name, network in networks.members.items()}
        assert modes == {"c": mode, "a": False, "b": mode}
        assert networks.members["a"].norm.training is False
    logits = networks((torch.ones(2, 1),))
    assert {k: v.requires_grad for k, v in logits.items()} == {"c": True, "a": False, "b": True}
    with torch.no_grad():
        assert not any(v.requires_grad for v in networks((torch.ones(2, 1),)).values())


def test_networks_are_built_from_the_recipe():
    """Classes and channels come from the data set, other options from each network's config."""
    configs = {
        "teacher": NetworkConfig("resnet8", "teacher", options={"width": 2.0}),
        "student": NetworkConfig("resnet8", "student"),
    }
    torch.manual_seed(0)
    networks = build_networks(configs, frozenset({"teacher"}), 7, 2)  # classes, channels
    torch.manual_seed(0)
    expected = {
        "teacher": create_model("resnet8", 7, in_channels=2, width=2.0),
        "student": create_model("resnet8", 7, in_channels=2),
    }
    assert networks.frozen == {"teacher"}
    for name, network in expected.items():
        came = networks.members[name].state_dict()
        for key, value in network.state_dict().items():
            assert torch.equal(came[key], value), (name, key)


def test_sgd_without_momentum_turns_nesterov_off():
    """torch refuses nesterov without momentum, and nesterov is the default of a recipe."""
    networks, configs = three(), {n: NetworkConfig("x", "student") for n in "cab"}
    for momentum, nesterov, expected in (
        (0.0, True, False),
        (0.5, True, True),
        (0.5, False, False),
    ):
        config = SGDConfig("sgd", momentum=momentum, nesterov=nesterov)
        optimizer = build_optimizer(networks, configs, config, lambda p: p)
        for group in optimizer.param_groups:
            assert (group["momentum"], group["nesterov"]) == (momentum, expected)
            assert group["fused"]  # a fused optimizer can skip a step on the device


@pytest.mark.parametrize("back", [True, False])
def test_saved_buffers_are_restored_only_if_the_condition_is_true(back):
    """The buffers have several dtypes, and one of the changed values is NaN."""
    buffers = [torch.tensor([1.0, 2.0]), torch.tensor(3), torch.tensor([[4.0]]), torch.tensor(5)]
    expected = [b.clone() for b in buffers]
    saved = SavedBuffers(iter(buffers))
    changed = [torch.tensor([torch.nan, 7.0]), torch.tensor(8), torch.tensor([[9.0]]),
               torch.tensor(6)]  # fmt: skip
    for buffer, value in zip(buffers, changed, strict=True):
        buffer.copy_(value)
    saved.restore(where=torch.tensor(back))
    for buffer, old, new in zip(buffers, expected, changed, strict=True):
        torch.testing.assert_close(buffer, old if back else new, rtol=0, atol=0, equal_nan=True)
