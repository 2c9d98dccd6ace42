"""The choice of a backend, the message if it cannot run, and calls that must not wait for a GPU.

The tests need no GPU: they use tensors that only report a GPU as their device.
"""

import sys
import warnings

import pytest
import torch
from bdkd_kernels import available_backends, backends, bdkd_loss, bdkd_loss_and_grad, native
from bdkd_kernels.checks import prepare
from bdkd_kernels.options import LossOptions
from bdkd_kernels.types import Availability

S, T = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
Y = torch.tensor([0, 3, 2, 1])
ABSENT = Availability(False, "there is none here: do this")


class OnGPU(torch.Tensor):
    """A CPU tensor that reports a GPU as its device. Records the functions that are called."""

    called: list[str] = []  # noqa: RUF012  # shared by all instances

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        says = {"device": torch.device("cuda:0"), "is_cuda": True, "is_cpu": False}
        for name, answer in says.items():
            if func == getattr(torch.Tensor, name).__get__:
                return answer
        cls.called.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture
def gpu(monkeypatch):
    """Return logits and labels on a GPU, without triton."""
    monkeypatch.setattr(backends, "_triton", ABSENT)
    monkeypatch.setattr(backends, "_warned", False)
    monkeypatch.delenv("BDKD_CHECK_LABELS", raising=False)
    OnGPU.called.clear()
    return [x.clone().as_subclass(OnGPU) for x in (S, T, Y)]


def test_without_triton_a_gpu_runs_the_reference_and_warns_once(gpu):
    want = bdkd_loss(S, T, Y, backend="reference")
    with pytest.warns(UserWarning, match=r"reference on the GPU.*there is none here: do this"):
        out = bdkd_loss(*gpu)
    torch.testing.assert_close(out.student.as_subclass(torch.Tensor), want.student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = bdkd_loss(*gpu)
    torch.testing.assert_close(out.teacher.as_subclass(torch.Tensor), want.teacher)
    with pytest.raises(RuntimeError, match=r"'triton' is not available: there is none here"):
        bdkd_loss(*gpu, backend="triton")
    with pytest.raises(RuntimeError, match=r"'native' takes CPU tensors, got cuda"):
        bdkd_loss(*gpu, backend="native")


def test_a_call_does_not_wait_for_the_gpu(gpu):
    """The host reads no values, because that would synchronize with the GPU.

    So a wrong label makes its row NaN. With ``BDKD_CHECK_LABELS=1``, labels are read and an error
    names the label.
    """
    s, t, y = gpu
    y[2] = 5
    for weight in (None, torch.ones(4).as_subclass(OnGPU)):
        OnGPU.called.clear()
        out = bdkd_loss(s, t, y, sample_weight=weight, reduction="none", backend="reference",
                        grad_scale=torch.tensor(2.0).as_subclass(OnGPU))  # fmt: skip
        assert out.student.as_subclass(torch.Tensor).isnan().tolist() == [False, False, True, False]
        read = {"__bool__", "__int__", "__float__", "item", "tolist", "nonzero", "cpu", "numpy"}
        assert not read & {*OnGPU.called}


def test_labels_on_a_gpu_are_checked_on_request(gpu, monkeypatch):
    s, t, y = gpu
    y[2] = 5
    monkeypatch.setenv("BDKD_CHECK_LABELS", "0")
    assert bdkd_loss(s, t, y, backend="reference").student.isnan()
    monkeypatch.setenv("BDKD_CHECK_LABELS", "1")
    with pytest.raises(ValueError, match=r"target\[2\] is 5"):
        bdkd_loss(s, t, y, backend="reference")


def test_gpu_tensors_use_triton(gpu, monkeypatch):
    pytest.importorskip("triton", minversion="3.6", reason="no triton here: nothing to choose")
    monkeypatch.setattr(backends, "_triton", Availability(True, "here"))
    problem = prepare(*gpu[:2], None, None, LossOptions(), 1.0)
    for backend in ("auto", "triton"):
        assert backends.choose(backend, problem).__name__ == "bdkd_kernels.triton.backend"
    assert backends.choose("reference", problem).__name__ == "bdkd_kernels.reference"


def test_auto_is_the_reference_without_the_native_kernel(monkeypatch):
    monkeypatch.setattr(native, "AVAILABILITY", ABSENT)
    s = S.clone().requires_grad_()
    out = bdkd_loss(s, T, Y)
    want = bdkd_loss(S, T, Y, backend="reference")
    assert torch.equal(out.student, want.student)
    (ds,) = torch.autograd.grad(out.student, s, create_graph=True)
    ds.square().sum().backward()  # a double backward, which the native kernel refuses
    for function in (bdkd_loss, bdkd_loss_and_grad):
        with pytest.raises(RuntimeError, match=r"'native' is not available: there is none here"):
            function(S, T, Y, backend="native")
    assert not available_backends()["native"]
    assert str(available_backends()["native"]) == str(ABSENT)


def test_a_device_without_a_kernel_runs_the_reference(monkeypatch):
    monkeypatch.setenv("BDKD_CHECK_LABELS", "1")  # labels on the meta device have no values
    s, t = S.to("meta"), T.to("meta")
    out = bdkd_loss(s, t, None)
    assert out.student.device.type == "meta"
    assert out.stats.forward_kl.shape == (4,)
    bdkd_loss(s, t, Y.to("meta"), backend="reference")
    with pytest.raises(RuntimeError, match=r"takes (CPU|CUDA or ROCm) tensors, got meta"):
        bdkd_loss(s, t, None, backend="native" if native.AVAILABILITY else "triton")


@pytest.mark.parametrize("value", ["0", ""])
def test_triton_refuses_cpu_tensors_without_the_interpreter(value, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(RuntimeError, match=r"takes CUDA or ROCm tensors, got cpu.*INTERPRET=1"):
        bdkd_loss(S, T, Y, backend="triton")


def test_an_unknown_backend_raises_even_if_the_reference_runs_anyway():
    for call in (
        lambda: torch.func.grad(lambda s: bdkd_loss(s, T, Y, backend="cuda").student)(S),
        lambda: bdkd_loss(S.as_subclass(OnGPU), T.as_subclass(OnGPU), None, backend="cuda"),
    ):
        with pytest.raises(ValueError, match=r"backend must be one of auto.*got 'cuda'"):
            call()


def test_a_failed_triton_import_gives_its_reason(monkeypatch):
    pytest.importorskip("triton", reason="no triton for this platform: it says that instead")

    def broken():
        raise ImportError("it lacks a symbol")

    monkeypatch.setattr(backends, "_triton", None)
    monkeypatch.setattr(backends, "_too_old_triton", lambda: None)
    monkeypatch.setattr(backends, "_triton_module", broken)
    availability = available_backends()["triton"]
    assert not availability
    assert "it lacks a symbol" in str(availability)


def test_an_old_triton_is_unavailable_and_not_imported(monkeypatch):
    triton = pytest.importorskip("triton", reason="no triton for this platform: none is too old")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    monkeypatch.setattr(backends, "_triton", None)
    monkeypatch.setattr(backends, "_triton_module", None)  # not called
    availability = available_backends()["triton"]
    assert not availability
    assert str(availability).startswith("triton 3.5.1 is too old: 3.6 is needed")
    for version in ("3.6.0", "3.10.0+git1", "4.0.0"):
        monkeypatch.setattr(triton, "__version__", version)
        assert backends._too_old_triton() is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ["was not built", "pip install"]),
        (lambda path: path.write_bytes(b"no library"), ["does not load", "pip install"]),
    ],
    ids=["missing", "broken"],
)
def test_a_native_kernel_that_does_not_load_says_what_to_do(make, words, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "library.so")
    monkeypatch.setattr(native, "_sources_hash", lambda: None)  # installed, without its sources
    make(tmp_path / "library.so")
    library, availability = native._load()
    assert library is None
    assert not availability
    for word in words:
        assert word in str(availability)


def test_an_outdated_kernel_is_not_loaded_if_its_rebuild_fails(monkeypatch, tmp_path):
    """A kernel that was built from other sources may expect its arguments in another order."""
    monkeypatch.setattr(native, "_sources_hash", lambda: "0" * 64)
    monkeypatch.setattr(native, "_rebuild", lambda sources: "cmake was not found")
    library, availability = native._load()
    assert library is None
    assert "older than kernels/csrc (cmake was not found)" in str(availability)


CMAKE = """#!/bin/sh
[ -e {folder}/broken ] && {{ echo "a line" >&2; echo "the last line" >&2; exit 1; }}
echo "$*" >> {folder}/calls
[ "$1" = --build ] && echo "built from new sources" > "$2/{library}"
exit 0
"""


def test_changed_sources_are_built_once(tmp_path, monkeypatch):
    """The test replaces cmake with a script in the folder of the Python interpreter."""
    library = tmp_path / "package" / native._LIBRARY.name
    library.parent.mkdir()
    library.write_text("built from old sources")
    cmake = tmp_path / "cmake"
    cmake.write_text(CMAKE.format(folder=tmp_path, library=library.name))
    monkeypatch.setattr(native, "_LIBRARY", library)
    monkeypatch.setattr(native, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/usr/bin/nowhere")
    assert native._rebuild("new") == "cmake was not found"  # it cannot be executed
    cmake.chmod(0o755)
    (tmp_path / "broken").touch()
    assert native._rebuild("new") == "the last line"
    assert library.read_text() == "built from old sources"
    (tmp_path / "broken").unlink()
    for _ in range(2):
        assert native._rebuild("new") == ""
        assert library.read_text() == "built from new sources\n"
    folder = tmp_path / "build" / "native"
    configured, built = (tmp_path / "calls").read_text().splitlines()
    assert configured == f"-S {tmp_path} -B {folder} -DPython3_EXECUTABLE={tmp_path / 'python'}"
    assert built == f"--build {folder}"
    assert [path.name for path in library.parent.iterdir()] == [library.name]


@pytest.mark.parametrize(
    ("version", "hip", "seen", "capability", "words"),
    [
        ("3.6.0", None, True, (9, 0), ""),
        ("3.10.0+git1", None, True, (8, 0), ""),
        ("4.0.0", None, True, (12, 0), ""),
        ("3.6.0", None, False, (9, 0), "no CUDA or ROCm device"),
        ("3.6.0", None, True, (7, 5), "sm_75: sm_80 or newer is needed"),
        ("3.6.0", "6.4", True, (7, 5), ""),  # AMD has other version numbers
    ],
)
def test_which_gpus_triton_supports(version, hip, seen, capability, words, monkeypatch):
    pytest.importorskip("triton", minversion="3.6", reason="no triton here: it serves none")
    from bdkd_kernels.triton import arguments
    from bdkd_kernels.triton import backend as triton_backend

    monkeypatch.setattr(triton_backend.triton, "__version__", version)
    monkeypatch.setattr(arguments, "PLATFORM", arguments.Platform(False, False))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    availability = triton_backend.availability()
    assert bool(availability) == (not words)
    assert words in str(availability)
    if availability:
        assert version in str(availability)
        assert "A GPU" in str(availability)
