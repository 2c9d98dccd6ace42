"""The interface of the loss: bad input, defaults, the module, the output, imports."""

import copy
import pickle
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bdkd_kernels import BDKDLoss, available_backends, bdkd_loss, bdkd_loss_and_grad
from compiler import COMPILER
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import bdkd

S, T = torch.zeros(4, 5), torch.ones(4, 5)
Y = torch.tensor([0, 1, 2, 3])
NAN, INF = float("nan"), float("inf")

# Wrong arguments, the error, and the words that its one-line message must contain: the name of the
# argument, the value, and what is needed.
BAD = [
    ({"student_logits": S.numpy()}, TypeError, ["student_logits", "ndarray", "tensor"]),
    ({"student_logits": [1.0, 2.0]}, TypeError, ["student_logits", "list", "tensor"]),
    ({"teacher_logits": None}, TypeError, ["teacher_logits", "NoneType", "tensor"]),
    ({"student_logits": S.int()}, TypeError, ["student_logits", "int32", "float32"]),
    ({"teacher_logits": T.to(torch.complex64)}, TypeError, ["teacher_logits", "complex64"]),
    ({"teacher_logits": T.to(torch.float8_e4m3fn)}, TypeError, ["teacher_logits", "float8"]),
    ({"student_logits": S.to_sparse()}, TypeError, ["student_logits", "sparse", "dense"]),
    ({"teacher_logits": T[:3]}, ValueError, ["teacher_logits", "(4, 5)", "(3, 5)"]),
    ({"teacher_logits": T[:, :4]}, ValueError, ["teacher_logits", "(4, 5)", "(4, 4)"]),
    ({"teacher_logits": T[0]}, ValueError, ["teacher_logits", "(4, 5)", "(5,)"]),
    ({"student_logits": S[0, 0]}, ValueError, ["student_logits", "()", "(..., C)"]),
    ({"student_logits": S[:, :0]}, ValueError, ["student_logits", "(4, 0)", "C >= 1"]),
    ({"teacher_logits": T.to("meta")}, ValueError, ["teacher_logits", "meta", "cpu"]),
    ({"target": [0, 1, 2, 3]}, TypeError, ["target", "list", "tensor or None"]),
    ({"target": 3}, TypeError, ["target", "int", "tensor or None"]),
    ({"target": Y.bool()}, TypeError, ["target", "bool", "integer"]),
    ({"target": Y.to(torch.complex64)}, TypeError, ["target", "complex64", "integer"]),
    ({"target": S.to(torch.float8_e4m3fn)}, TypeError, ["target", "float8", "soft labels"]),
    ({"target": Y[:3]}, ValueError, ["target", "(3,)", "(4,)"]),
    ({"target": Y[:, None]}, ValueError, ["target", "(4, 1)", "(4,)"]),
    ({"target": S.long()}, ValueError, ["target", "(4, 5)", "(4,)"]),
    ({"target": Y.float()}, ValueError, ["target", "(4,)", "(4, 5)", "soft labels", "integer"]),
    ({"target": S[:, :4]}, ValueError, ["target", "(4, 4)", "(4, 5)"]),
    ({"target": Y.to("meta")}, ValueError, ["target", "meta", "cpu"]),
    ({"target": Y + 2}, ValueError, ["target[3]", "5", "[0, 5)", "ignore_index (-100)"]),
    ({"target": Y - 1}, ValueError, ["target[0]", "-1", "[0, 5)"]),
    ({"sample_weight": [1.0] * 4}, TypeError, ["sample_weight", "list", "tensor"]),
    ({"sample_weight": 2.0}, TypeError, ["sample_weight", "float", "tensor"]),
    ({"sample_weight": Y}, TypeError, ["sample_weight", "int64", "float32"]),
    ({"sample_weight": torch.ones(5)}, ValueError, ["sample_weight", "(5,)", "(4,)"]),
    ({"sample_weight": torch.ones(4, 1)}, ValueError, ["sample_weight", "(4, 1)", "(4,)"]),
    ({"sample_weight": torch.ones(4, device="meta")}, ValueError, ["sample_weight", "meta", "cpu"]),
    *(
        ({"temperature": value}, ValueError, ["temperature", repr(value), "[0.0001, 10000]"])
        for value in (0.0, -1.5, NAN, INF, 1e-46, 9.9e-5, 1.01e4, 1e308)
    ),
    ({"temperature": 10**400}, ValueError, ["temperature", "100000", "[0.0001, 10000]"]),
    ({"temperature": "4"}, TypeError, ["temperature", "'4'", "str", "number"]),
    ({"temperature": None}, TypeError, ["temperature", "None", "number"]),
    ({"temperature": True}, TypeError, ["temperature", "True", "number"]),
    ({"temperature": torch.tensor(4.0)}, TypeError, ["temperature", "tensor(4.)", "number"]),
    *(
        ({"gamma": value}, ValueError, ["gamma", repr(value), "[1, 1e9]"])
        for value in (0.99, NAN, INF, 1.1e9)
    ),
    ({"gamma": 10**400}, ValueError, ["gamma", "100000", "[1, 1e9]"]),
    ({"gamma": 2j}, TypeError, ["gamma", "2j", "number"]),
    *(
        ({name: value}, error, [name, repr(value), "0 or a number in [1e-30, 1e9]"])
        for name in ("student_ce", "student_kd", "teacher_ce", "teacher_kd")
        for value, error in (
            (-0.1, ValueError), (NAN, ValueError), (INF, ValueError), ("1", TypeError),
            (9.9e-31, ValueError), (1.1e9, ValueError),
        )
    ),
    ({"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1", "[0, 1]"]),
    ({"label_smoothing": 1.1}, ValueError, ["label_smoothing", "1.1", "[0, 1]"]),
    ({"label_smoothing": NAN}, ValueError, ["label_smoothing", "nan", "[0, 1]"]),
    ({"label_smoothing": None}, TypeError, ["label_smoothing", "None", "[0, 1]"]),
    ({"teacher_divergence": "backward"}, ValueError, ["teacher_divergence", "backward", "forward"]),
    ({"teacher_divergence": None}, ValueError, ["teacher_divergence", "None", "'reverse'"]),
    ({"reduction": "avg"}, ValueError, ["reduction", "avg", "'mean', 'sum' or 'none'"]),
    ({"reduction": None}, ValueError, ["reduction", "None", "'none'"]),
    ({"reduction": ["mean"]}, ValueError, ["reduction", "['mean']", "'mean'"]),
    ({"soften_entropy": 1}, TypeError, ["soften_entropy", "1", "bool"]),
    ({"soften_entropy": "no"}, TypeError, ["soften_entropy", "'no'", "bool"]),
    ({"ignore_index": 1.0}, TypeError, ["ignore_index", "1.0", "int"]),
    ({"ignore_index": None}, TypeError, ["ignore_index", "None", "int"]),
    ({"ignore_index": False}, TypeError, ["ignore_index", "False", "int"]),
    ({"ignore_index": 2**63}, ValueError, ["ignore_index", "9223372036854775808", "64 bits"]),
    ({"ignore_index": -(2**63) - 1}, ValueError, ["ignore_index", "-9223372036854775809", "64"]),
    ({"grad_scale": "64"}, TypeError, ["grad_scale", "str", "number"]),
    ({"grad_scale": None}, TypeError, ["grad_scale", "NoneType", "number"]),
    ({"grad_scale": INF}, ValueError, ["grad_scale", "inf", "finite"]),
    ({"grad_scale": 1e39}, ValueError, ["grad_scale", "1e+39", "float32"]),
    ({"grad_scale": -1e39}, ValueError, ["grad_scale", "-1e+39", "float32"]),
    ({"grad_scale": NAN}, ValueError, ["grad_scale", "nan", "finite"]),
    ({"grad_scale": 10**400}, ValueError, ["grad_scale", "100000", "float32"]),
    ({"grad_scale": torch.ones(1)}, ValueError, ["grad_scale", "(1,)", "0-dim"]),
    ({"grad_scale": torch.tensor(2)}, ValueError, ["grad_scale", "int64", "floating"]),
    ({"grad_scale": torch.tensor(2.0, device="meta")}, ValueError, ["grad_scale", "meta", "cpu"]),
    *(
        ({name: make(tensor)}, TypeError, [name, "dense", layout])
        for name, tensor in (
            ("student_logits", S), ("teacher_logits", T), ("target", T.softmax(-1)),
            ("sample_weight", torch.ones(4)),
        )
        for make, layout in (
            (torch.Tensor.to_sparse, "sparse_coo"), (torch.Tensor.to_mkldnn, "mkldnn"),
            (lambda x: torch.nested.nested_tensor([x, x]), "nested"),
        )
    ),
    ({"grad_scale": torch.tensor(2.0).to_sparse()}, TypeError, ["grad_scale", "sparse", "dense"]),
    ({"backend": "cuda"}, ValueError, ["backend", "cuda", "auto, triton, native, reference"]),
    ({"backend": None}, ValueError, ["backend", "None", "reference"]),
]  # fmt: skip
TENSORS = {"student_logits", "teacher_logits", "target"}
PER_CALL = TENSORS | {"sample_weight", "grad_scale"}


def assert_one_line(raised, words: list[str]) -> None:
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 200
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def describe(wrong: object) -> str:
    if not isinstance(wrong, dict):
        return ""
    ((name, value),) = wrong.items()
    if isinstance(value, torch.Tensor) and value.is_nested:
        return f"{name}=nested"
    tensor = isinstance(value, torch.Tensor)
    return f"{name}={tuple(value.shape)}-{value.dtype}" if tensor else f"{name}={value!r:.30}"


@pytest.mark.parametrize(("wrong", "error", "words"), BAD, ids=describe)
def test_bad_input_is_named(wrong, error, words):
    arguments = {"student_logits": S, "teacher_logits": T, "target": Y, "backend": "reference"}
    for function in (bdkd_loss, bdkd_loss_and_grad):
        with pytest.raises(error) as raised:
            function(**{**arguments, **wrong})
        assert_one_line(raised, words)
    if wrong.keys() & PER_CALL:  # arguments of the module's call, others are of its constructor
        tensors = {**arguments, **wrong}
        del tensors["backend"]
        with pytest.raises(error) as raised:
            BDKDLoss(backend="reference")(**tensors)
    else:
        with pytest.raises(error) as raised:
            BDKDLoss(**wrong)
    assert_one_line(raised, words)


@pytest.mark.parametrize(
    ("grads", "error", "words"),
    [
        (S, TypeError, ["grads", "Tensor", "pair"]),
        ((S,), TypeError, ["grads", "tuple of 1", "pair"]),
        ((S, T, S), TypeError, ["grads", "tuple of 3", "pair"]),
        ((S.numpy(), T), TypeError, ["grads[0]", "ndarray", "tensor"]),
        ((S, T[:3].clone()), ValueError, ["grads[1]", "(3, 5)", "(4, 5)"]),
        ((S, T.half()), ValueError, ["grads[1]", "float16", "float32"]),
        ((S, T.clone().view(2, 10)), ValueError, ["grads[1]", "(2, 10)", "(4, 5)"]),
        ((S.view(5, 4), T), ValueError, ["grads[0]", "(5, 4)", "(4, 5)"]),
        ((S.to("meta"), T), ValueError, ["grads[0]", "meta", "cpu"]),
        ((S, T[:1].expand(4, 5)), ValueError, ["grads[1]", "(0, 1)", "each element once"]),
        ((S, S), ValueError, ["grads[1]", "overlap", "grads[0]"]),
        ((S.to_sparse(), T), TypeError, ["grads[0]", "sparse", "dense"]),
        ((S.clone(), torch.nested.nested_tensor([T, T])), TypeError, ["grads[1]", "nested"]),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else "",
)
def test_a_bad_gradient_buffer_is_named(grads, error, words):
    with pytest.raises(error) as raised:
        bdkd_loss_and_grad(S.clone(), T.clone(), Y, grads=grads, backend="reference")
    assert_one_line(raised, words)


def test_each_gradient_buffer_must_match_its_own_logits():
    ds, dt = torch.empty(4, 5), torch.empty(4, 5, dtype=torch.float16)
    for grads in ((ds, dt), (ds, None), (None, dt)):
        bdkd_loss_and_grad(S, T.half(), Y, grads=grads)
    for grads, name in (((ds.half(), dt), 0), ((ds, dt.float()), 1)):
        with pytest.raises(ValueError, match=rf"grads\[{name}\] must have its logits' shape"):
            bdkd_loss_and_grad(S, T.half(), Y, grads=grads)


def test_a_gradient_buffer_that_cannot_be_flattened_is_named():
    s, t = torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)
    columns = torch.zeros(3, 2, 5).transpose(0, 1)
    with pytest.raises(ValueError, match=r"grads\[1\].*flatten to rows.*\(2, 3, 5\)"):
        bdkd_loss_and_grad(s, t, None, grads=(None, columns), backend="reference")


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"student_logits": SimpleNamespace(logits=S)}, "pass its .logits"),
        ({"student_logits": S.numpy()}, "torch.as_tensor(student_logits)"),
        ({"student_logits": Y}, "labels go into target"),
        ({"student_logits": S.bool()}, ".float()"),
        ({"teacher_logits": T[:3]}, "give both networks the same samples"),
        ({"teacher_logits": T[:, :4]}, "both networks must have the same classes"),
        ({"target": Y[:, None]}, "target.squeeze(-1)"),
        ({"target": torch.nn.functional.one_hot(Y, 5)}, "target.float()"),
        ({"target": Y.float()}, "target.long()"),
        ({"sample_weight": Y}, "sample_weight.float()"),
        ({"sample_weight": torch.ones(4, device="meta")}, "sample_weight.to('cpu')"),
        ({"gamma": torch.tensor(2.0)}, "gamma.item()"),
        ({"teacher_logits": T.to_sparse()}, ".to_dense()"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_an_error_names_its_remedy(wrong, remedy):
    arguments = {"student_logits": S, "teacher_logits": T, "target": Y, **wrong}
    with pytest.raises((TypeError, ValueError)) as raised:
        bdkd_loss(**arguments)
    assert_one_line(raised, [remedy])


def test_options_accept_numbers_of_any_type():
    want = bdkd_loss(S, T, Y, temperature=2.0, gamma=3.0, label_smoothing=0.5, ignore_index=1)
    for kind in (np.float16, np.float32, np.float64, Fraction, np.int64, int):
        half = kind(0.5) if kind(0.5) else 0.5
        got = bdkd_loss(S, T, Y, temperature=kind(2), gamma=kind(3), label_smoothing=half,
                        ignore_index=np.int64(1))  # fmt: skip
        assert torch.equal(got.student, want.student)
        assert torch.equal(got.teacher, want.teacher)
        options = BDKDLoss(temperature=kind(2), gamma=kind(3), ignore_index=np.int64(1)).options
        types = [type(x) for x in (options.temperature, options.gamma, options.ignore_index)]
        assert types == [float, float, int]  # operators of torch.library accept only these


OTHER = {"temperature": 4.0, "gamma": 3.0, "student_ce": 0.5, "student_kd": 0.7, "teacher_ce": 0.2,
         "teacher_kd": 0.9, "teacher_divergence": "forward", "soften_entropy": False,
         "label_smoothing": 0.1, "ignore_index": 2, "reduction": "none"}  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_module_equals_the_function(reduction):
    rng = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 2, 2, 5, generator=rng)  # a batch of sequences
    s.requires_grad_()
    w, y = torch.rand(2, 2, generator=rng), Y.reshape(2, 2)
    options = {**OTHER, "reduction": reduction}
    module = BDKDLoss(**options, backend="reference")
    out = module(s, t, y, sample_weight=w, grad_scale=2.0)
    want = bdkd_loss(s, t, y, sample_weight=w, grad_scale=2.0, backend="reference", **options)
    for x, z in zip((*out[:2], *out.stats), (*want[:2], *want.stats), strict=True):
        assert torch.equal(x, z)
    assert out.student.shape == ((2, 2) if reduction == "none" else ())
    out.student.sum().backward()
    assert torch.equal(s.grad, torch.autograd.grad(want.student.sum(), s)[0])

    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(s, t, y, w).student, want.student)
    assert module.state_dict() == {}


def test_the_repr_of_a_module_can_be_evaluated():
    module = BDKDLoss(**OTHER, backend="reference")
    text = repr(module)
    for name, value in {**OTHER, "backend": "reference"}.items():
        assert f"{name}={value!r}" in text
    again = eval(text, {"BDKDLoss": BDKDLoss})
    assert again.options == module.options
    assert again.backend == module.backend


def test_the_output_is_a_named_tuple():
    out = bdkd_loss(S, T, Y)
    student, teacher, stats = out
    assert student is out.student
    assert teacher is out.teacher
    assert stats is out.stats
    assert type(out) is bdkd.BDKDOutput
    assert tuple(stats._asdict()) == (  # written out, because these names are public
        "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "student_ce",
        "teacher_ce", "forward_weight", "reverse_weight", "student_confidence",
        "teacher_confidence", "student_correct", "teacher_correct",
    )  # fmt: skip
    for name, row in stats._asdict().items():
        assert torch.equal(getattr(stats, name), row)


def test_loss_and_grad_is_detached_and_equals_autograd():
    s, t = S.clone().requires_grad_(), T.clone().requires_grad_()
    net = torch.nn.Linear(5, 5)
    out, (ds, dt) = bdkd_loss_and_grad(net(s), net(t), Y)
    assert not any(x.requires_grad for x in (*out[:2], *out.stats, ds, dt))
    a, b = net(s), net(t)
    torch.autograd.backward([a, b], [ds, dt])
    got, net.weight.grad = net.weight.grad, None
    out = bdkd_loss(net(s), net(t), Y)
    (out.student + out.teacher).backward()
    torch.testing.assert_close(got, net.weight.grad)


CALLED_ON_THE_OUTPUT = "'BDKDOutput' object has no attribute 'backward': "


def test_backward_of_the_output_names_the_call_that_works():
    s, t = (x.clone().requires_grad_() for x in (S, T))
    for options, hint in (
        ({}, "call (out.student + out.teacher).backward()"),
        ({"reduction": "none"}, "call (out.student + out.teacher).sum().backward()"),
    ):
        out = bdkd_loss(s, t, Y, **options)
        with pytest.raises(AttributeError) as raised:
            out.backward()
        assert str(raised.value) == CALLED_ON_THE_OUTPUT + hint
        eval(hint.removeprefix("call "))
    assert s.grad.abs().sum() > 0
    hint = (
        "no loss requires a gradient; pass logits that do, or after bdkd_loss_and_grad call "
        "torch.autograd.backward([student_logits, teacher_logits], [ds, dt])"
    )
    for out in (bdkd_loss_and_grad(s, t, Y)[0], bdkd_loss(S, T, Y)):
        with pytest.raises(AttributeError) as raised:
            out.backward()
        assert str(raised.value) == CALLED_ON_THE_OUTPUT + hint


def test_tensor_methods_of_the_output_hint_at_the_losses():
    out = bdkd_loss(S, T, Y)
    with pytest.raises(AttributeError, match=r"'item': the tensors are out\.student and out"):
        out.item()
    with pytest.raises(AttributeError, match=r"no attribute 'loss'$"):
        _ = out.loss
    assert not hasattr(out, "backward")  # libraries ask before they call
    assert not hasattr(out, "__array__")


def test_the_output_is_pickled_copied_and_replaced():
    out = bdkd_loss(S, T, Y)
    for other in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out), copy.copy(out)):
        assert type(other) is bdkd.BDKDOutput
        assert torch.equal(other.student, out.student)
        assert torch.equal(other.stats.table, out.stats.table)
    assert out._replace(teacher=None).student is out.student


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_function_returns_the_output(dynamic):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=COMPILER)
    def step(s, t):
        out = bdkd_loss(2 * s, t, Y)
        return out, out.student + out.teacher

    s, t = (x.clone().requires_grad_() for x in (S, T))
    out, total = step(s, t)
    assert type(out) is bdkd.BDKDOutput
    total.backward()
    assert repr(out) == repr(step(s, t)[0])
    with pytest.raises(AttributeError, match=r"call \(out.student \+ out.teacher\)"):
        out.backward()


def test_a_compiled_function_that_calls_backward_of_the_output_gets_the_hint():
    torch.compiler.reset()
    step = torch.compile(lambda s: bdkd_loss(s, T, Y).backward(), backend=COMPILER)
    with pytest.raises(AttributeError, match=r"call \(out.student \+ out.teacher\)"):
        step(S.clone().requires_grad_())


def test_the_repr_is_a_few_lines_however_large_the_batch():
    """It shows the losses and each statistic by name, with the first values."""
    rng = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 1000, 50, generator=rng)
    y = torch.randint(50, (1000,), generator=rng)
    for reduction in ("mean", "none"):
        out = bdkd_loss(s.requires_grad_(), t, y, reduction=reduction)
        lines = repr(out).splitlines()
        assert len(lines) <= 12
        assert all(len(line) <= 100 for line in lines)
        for name, row in out.stats._asdict().items():
            first = ", ".join(f"{x:.3g}" for x in row[:3].tolist())
            assert f"{name}=[{first}, ...]" in repr(out)
        shape = tuple(out.student.shape)
        assert f"of shape {shape}, float32 on cpu, requires_grad=True" in lines[1]
        assert "of shape (1000,)" in repr(out.stats)
    assert f"student={bdkd_loss(s, t, y).student.item():.5g} of shape ()" in repr(
        bdkd_loss(s, t, y)
    )


def test_the_repr_of_values_that_cannot_be_read():
    shown = []

    def loss(s):
        out = bdkd_loss(s, T, Y)
        shown.append(repr(out))
        return out.student

    torch.func.grad(loss)(S)
    torch.func.vmap(loss)(S[None])
    meta = [x.to("meta") for x in (S, T, Y)]
    shown.append(repr(bdkd_loss(*meta)))
    with FakeTensorMode():
        shown.append(repr(bdkd_loss(torch.empty(4, 5), torch.empty(4, 5), None)))
    out = bdkd_loss(S, T, Y)
    shown.append(repr(tree_map(torch.Tensor.tolist, out)))
    shown.append(repr(bdkd_loss(S[0], T[0], Y[0])))
    shown.append(repr(bdkd_loss(S[:0], T[:0], None)))
    for text in shown:
        assert len(text.splitlines()) <= 12
        assert "teacher_correct=" in text
    assert "student=1.6094" in shown[0]
    assert "student=Tensor of shape ()" in shown[1]
    assert "on meta" in shown[2]
    assert "forward_kl=FakeTensor" in shown[3]


def test_available_backends_describes_each_backend():
    backends = available_backends()
    assert list(backends) == ["triton", "native", "reference"]
    assert backends["reference"]
    for name, availability in backends.items():
        assert str(availability), name
        assert "\n" not in str(availability)
    assert bdkd_loss(S, T, Y, backend="auto").student.isfinite()


def test_bdkd_exports_the_names_of_bdkd_kernels():
    for name in ("bdkd_loss", "bdkd_loss_and_grad", "BDKDLoss", "BDKDOutput", "BDKDStats",
                 "available_backends"):  # fmt: skip
        assert getattr(bdkd, name) is getattr(sys.modules["bdkd_kernels"], name)
        assert name in bdkd.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bdkd.nothing


def test_importing_bdkd_imports_torch_and_nothing_heavier():
    """Only a few modules are new, and all of them are our own or of the standard library.

    The test counts modules, because timings vary.
    """
    code = (
        "import sys, torch; torchs = {*sys.modules}; import bdkd; print(*{*sys.modules} - torchs)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = run.stdout.split()
    ours = {"bdkd", "bdkd_kernels", *sys.stdlib_module_names}
    foreign = [name for name in new if name.split(".")[0] not in ours]
    assert not foreign
    assert len(new) < 40, new
    assert "bdkd.engine" not in new


def test_statistics_are_used_as_a_named_tuple():
    s, t = torch.randn(2, 3, 4, 5)
    stats = bdkd_loss(s, t, None).stats
    assert stats._fields[0] == "forward_kl"
    assert len(stats) == len(stats._fields) == 12
    forward_kl, reverse_kl, *_ = stats
    assert forward_kl.shape == (3, 4)
    assert torch.equal(stats[1], reverse_kl)
    assert torch.equal(stats[:2][0], forward_kl)
    assert isinstance(stats[:2], tuple)
    assert len(stats[3:]) == 9
    assert torch.equal(stats[-1], stats.teacher_correct)
    assert list(stats._asdict()) == list(stats._fields)
    for name, value in stats._asdict().items():
        assert torch.equal(value, getattr(stats, name))
        assert name in repr(stats)


def test_statistics_pass_through_torch_func():
    s, t = torch.randn(2, 4, 5)

    def student_loss(logits):
        out = bdkd_loss(logits, t, None)
        return out.student, out.stats

    gradient, stats = torch.func.grad(student_loss, has_aux=True)(s)
    assert gradient.shape == s.shape
    assert torch.allclose(stats.forward_kl, bdkd_loss(s, t, None).stats.forward_kl)
    lists = tree_map(torch.Tensor.tolist, stats)
    assert lists.reverse_kl == stats.reverse_kl.tolist()
