"""The optimizers LAMB and NovoGrad of NVIDIA's apex.

apex must be built from source for a GPU. Here a stand-in with its interface (constructor, groups,
``step`` without ``found_inf``) replaces it.
"""

import io
import sys
from pathlib import Path

import pytest
import torch
from small_runs import tiny_state
from test_step import a_batch, everything, run_steps

from bdkd.engine import optim
from bdkd.engine.optim import AdamConfig
from bdkd.errors import RunError, UsageError
from bdkd.registry import OPTIMIZERS

# As in apex, moments are in the state of each parameter, the step count is in the group, and
# gradients that are not finite get no special treatment.
TWIN = """
import torch

class _Twin(torch.optim.Optimizer):
    def __init__(self, params, defaults):
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad**2, 1 - beta2)
                first = state["exp_avg"] / (1 - beta1 ** group["step"])
                second = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
                update = first / (second.sqrt() + group["eps"]) + group["weight_decay"] * p
                ratio = p.norm() / update.norm() if p.norm() > 0 else 1.0
                p -= group["lr"] * ratio * update

class FusedLAMB(_Twin):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6,
                 weight_decay=0.01, amsgrad=False, adam_w_mode=True, grad_averaging=True,
                 set_grad_none=True, max_grad_norm=1.0, use_nvlamb=False):
        assert max_grad_norm > 1e30  # its own clipping is over all networks at once
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      max_grad_norm=max_grad_norm))

class FusedNovoGrad(_Twin):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8,
                 weight_decay=0., amsgrad=False, reg_inside_moment=False, grad_averaging=True,
                 norm_type=2, init_zero=False, set_grad_none=True):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return an empty folder ``apex`` on the import path, in which a test writes the package."""
    (tmp_path / "apex").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("apex", "apex.optimizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path / "apex"
    for name in ("apex", "apex.optimizers"):
        sys.modules.pop(name, None)


@pytest.fixture
def apex(package: Path, monkeypatch):
    (package / "__init__.py").write_text("")
    (package / "optimizers.py").write_text(TWIN)
    monkeypatch.setattr(optim, "APEX_DEVICES", ("cpu",))


@pytest.mark.parametrize("name", ["lamb", "novograd"])
def test_a_step_with_a_nan_changes_nothing_and_is_not_counted(apex, name):
    state = tiny_state(optimizer=OPTIMIZERS.configure(name, learning_rate=1e-3), ema_decay=0.9)
    assert (
        type(state.optimizer).__name__ == {"lamb": "FusedLAMB", "novograd": "FusedNovoGrad"}[name]
    )
    run_steps(state, [a_batch(seed=1), a_batch(seed=2)])
    before = everything(state)
    run_steps(state, [a_batch(poisoned=True)])
    for key, value in everything(state).items():
        assert torch.equal(value, before[key]), key
    assert {group["step"] for group in state.optimizer.param_groups} == {2}
    assert state.skipped.tolist() == [1, 1, 1]
    run_steps(state, [a_batch(seed=3)])
    after = everything(state)
    assert not torch.equal(after["members.student.0.weight"], before["members.student.0.weight"])
    assert all(value.isfinite().all() for value in after.values())


def test_the_optimizer_has_the_options_of_the_recipe(apex):
    config = AdamConfig("lamb", learning_rate=0.02, betas=(0.8, 0.9), weight_decay=0.1)
    groups = tiny_state(optimizer=config).optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}
    assert {group["network"] for group in groups} == {"teacher", "student"}


def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(apex):
    config = AdamConfig("lamb", learning_rate=1e-3)
    whole, first, second = (tiny_state(optimizer=config) for _ in range(3))
    run_steps(whole, [a_batch(seed=seed) for seed in range(5)])
    run_steps(first, [a_batch(seed=seed) for seed in range(3)])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    run_steps(second, [a_batch(seed=seed) for seed in range(3, 5)])
    expected = everything(whole)
    for key, value in everything(second).items():
        assert torch.equal(value, expected[key]), key


def test_a_cpu_is_refused_before_anything_is_trained(package):
    (package / "__init__.py").write_text("")
    (package / "optimizers.py").write_text(TWIN)
    with pytest.raises(UsageError, match="must be sgd or adamw on a CPU, got novograd"):
        tiny_state(optimizer=AdamConfig("novograd"))


def test_the_unrelated_apex_of_pypi_is_recognised(package, monkeypatch):
    monkeypatch.setattr(optim, "APEX_DEVICES", ("cpu",))
    (package / "__init__.py").write_text("from pyramid.session import nothing")
    with pytest.raises(RunError, match=r"PyPI's unrelated package: .* -m pip uninstall apex"):
        tiny_state(optimizer=AdamConfig("lamb"))


def test_a_missing_apex_says_how_to_install_it(package, monkeypatch):
    monkeypatch.setattr(optim, "APEX_DEVICES", ("cpu",))
    package.rmdir()
    with pytest.raises(RunError, match="not installed: build NVIDIA's"):
        tiny_state(optimizer=AdamConfig("lamb"))


def test_apex_without_its_extensions_says_so(package, monkeypatch):
    (package / "__init__.py").write_text("")
    refuse = 'raise RuntimeError("apex.optimizers.FusedLAMB requires cuda extensions")'
    (package / "optimizers.py").write_text(f"def FusedLAMB(*_, **__):\n    {refuse}\n")
    monkeypatch.setattr(optim, "APEX_DEVICES", ("cpu",))
    with pytest.raises(RunError, match="requires cuda extensions: build apex with"):
        tiny_state(optimizer=AdamConfig("lamb"))
