"""Without one of the private APIs in _torch_compat.py, the package works and computes the same.

A fixture removes an API, imports a copy of the package, and restores the API for torch itself.
"""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import bdkd_kernels
import pytest
import torch
from bdkd_kernels import _torch_compat, autograd, buffers
from copies import copy_package, import_copy
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch_features import FEATURES, REFERENCE, WORKS, S, T, Y

BACKEND = "native" if bdkd_kernels.available_backends()["native"] else "reference"
ROWS = [row for row in FEATURES if row.outcome(BACKEND) in (WORKS, REFERENCE)]
# The private APIs that are looked up at import.
REMOVED = {
    "transforms": [(torch._C, "_are_functorch_transforms_active")],
    "modes": [(torch._C, "_len_torch_dispatch_stack")],
    "levels": [(forward_ad, "_current_level")],
    "owners": [(torch._C, "_storage_Use_Count")],
    "pytree": [],
}
# The features that do not work without the pytree: functions that return BDKDStats.
NEEDS_PYTREE = {"func_vmap"}


@contextmanager
def without(name: str):
    with pytest.MonkeyPatch.context() as patch:
        for owner, attribute in REMOVED[name]:
            patch.delattr(owner, attribute)
        if name == "pytree":
            patch.setitem(sys.modules, "torch.utils._pytree", None)
        yield


@pytest.fixture(scope="module", params=REMOVED)
def package(request, tmp_path_factory):
    """A copy of the package that was imported without one of the APIs."""
    folder = tmp_path_factory.mktemp("copy")
    copy_package(f"bdkd_without_{request.param}", folder)
    with without(request.param):
        package = import_copy(f"bdkd_without_{request.param}", folder)
    package.removed = request.param
    return package


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning",
                            "ignore::UserWarning")  # fmt: skip
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.run.__name__)
def test_features_work_without_a_private_api(package, row, tmp_path):
    if package.removed == "pytree" and row.run.__name__ in NEEDS_PYTREE:
        with pytest.raises(ValueError, match=r"vmap.*must only return Tensors.*BDKDStats"):
            row.run(package, BACKEND, tmp_path)
    else:
        row.run(package, BACKEND, tmp_path)


def test_each_copy_uses_its_fallback(package):
    compat, ours = package._torch_compat, _torch_compat
    changed = {
        "transforms": compat._transforms_active is compat._has_transform,
        "modes": compat._dispatch_modes is not ours._dispatch_modes,
        "levels": isinstance(compat._levels, compat._Levels),
        "owners": compat.owners is None,
        "pytree": compat.__dict__.keys() == ours.__dict__.keys(),
    }
    assert changed[package.removed]
    assert ours._levels is forward_ad
    assert ours._dispatch_modes is torch._C._len_torch_dispatch_stack
    assert ours._transforms_active is torch._C._are_functorch_transforms_active
    assert ours.owners is not None


def test_without_owner_counts_no_memory_is_reused(package):
    like = torch.empty(300, 1000)
    package.buffers.release()
    package.buffers.empty_like(like)
    assert bool(package.buffers._kept) == (package.removed != "owners")


def test_without_a_check_for_transforms_torch_raises(monkeypatch):
    monkeypatch.setattr(_torch_compat, "_transforms_active", _torch_compat._has_transform)
    monkeypatch.setattr(_torch_compat, "_peek_transform", None)
    with pytest.raises(RuntimeError, match="Cannot access storage of TensorWrapper"):
        torch.func.grad(lambda s: bdkd_kernels.bdkd_loss(s, T, Y, backend=BACKEND).student)(S)


class Passing(TorchDispatchMode):
    """A dispatch mode that changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("known", [True, False])
def test_without_the_recording_mode_labels_are_not_checked_under_a_mode(known, monkeypatch):
    module = SimpleNamespace(get_proxy_mode=lambda: None) if known else SimpleNamespace()
    modules = {**sys.modules, "torch.fx.experimental.proxy_tensor": module}
    monkeypatch.setattr(_torch_compat, "sys", SimpleNamespace(modules=modules))
    bad = torch.where(Y == 0, 7, Y)
    with Passing():
        if known:
            with pytest.raises(ValueError, match=r"target\[\d\] is 7"):
                bdkd_kernels.bdkd_loss(S, T, bad)
        else:
            assert bdkd_kernels.bdkd_loss(S, T, bad).student.isnan()


def test_without_version_counters_gradients_are_computed_again(monkeypatch):
    monkeypatch.setattr(autograd, "version", _torch_compat._new_version)
    found = []
    for scale in (torch.tensor(8.0), 8.0):
        s, t = (x.clone().requires_grad_() for x in (S, T))
        out = bdkd_kernels.bdkd_loss(s, t, Y, grad_scale=scale)
        (8 * (out.student + out.teacher)).backward()
        found.append((s.grad, t.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_zero_tensor_that_is_not_recognised_raises(monkeypatch):
    """A zero tensor has no memory: a kernel would read address 0."""
    zeros = torch._efficientzerotensor(4, 5)
    assert _torch_compat.is_zero_tensor(zeros)
    assert not _torch_compat.is_zero_tensor(torch.zeros(4, 5))
    assert not _torch_compat.is_zero_tensor(SimpleNamespace())
    monkeypatch.setattr("bdkd_kernels.memory.is_zero_tensor", lambda tensor: False)
    with pytest.raises(ValueError, match="student_logits must have its values in memory"):
        bdkd_kernels.bdkd_loss(zeros, torch.ones(4, 5), None)


@pytest.mark.parametrize("count", [lambda cdata: 1, lambda cdata: None, lambda: 1])
def test_a_wrong_owner_count_is_not_used(count, monkeypatch):
    monkeypatch.setattr(torch._C, "_storage_Use_Count", count)
    assert _torch_compat._owner_counter() is None


def test_python_without_reference_counts_reuses_no_memory(monkeypatch):
    monkeypatch.delattr(sys, "getrefcount")
    assert _torch_compat._owner_counter() is None


def test_fake_tensors_are_recognised_by_name():
    assert buffers.owners is _torch_compat.owners
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(2)
    assert _torch_compat.is_fake(fake)
    assert not _torch_compat.is_fake(torch.empty(2))
    assert not _torch_compat.is_dtensor(fake)
