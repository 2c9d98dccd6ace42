"""Copies of the package in one process, such as ours and one that another project vendors."""

import io
import os
from types import SimpleNamespace

import bdkd_kernels
import pytest
import torch
from compiler import COMPILER
from copies import copy_package, import_copy

# In the interpreter, Triton supports CPU tensors. This needs TRITON_INTERPRET=1 at the start.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    name
    for name, available in bdkd_kernels.available_backends().items()
    if available and (name != "triton" or INTERPRETED)
]
S, T = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).unbind()
Y = torch.tensor([0, 3, 2, 1, 4, 4])


@pytest.fixture(scope="module")
def vendored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vendored")
    copy_package("acme.vendored.bdkd_kernels", folder)
    return import_copy("acme.vendored.bdkd_kernels", folder)


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("renamed")
    copy_package("bdkd_kernels_abc123", folder)
    return import_copy("bdkd_kernels_abc123", folder)


def step(package, backend, compiled=False):
    """Return the losses, statistics and gradients of one step."""

    def loss(s, t, y):
        return package.bdkd_loss(s, t, y, temperature=2.0, backend=backend)

    if compiled:
        loss = torch.compile(loss, fullgraph=True, backend=COMPILER)
    s, t = S.clone().requires_grad_(), T.clone().requires_grad_()
    out = loss(s, t, Y)
    (out.student + 3 * out.teacher).backward()
    return SimpleNamespace(losses=out[:2], stats=out.stats, grads=(s.grad, t.grad))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_do_not_disturb_each_other(vendored, renamed, backend, compiled):
    torch.compiler.reset()
    packages = (bdkd_kernels, vendored, renamed)
    assert len({package.BDKDStats for package in packages}) == 3
    for _ in range(2):  # so that each copy runs before and after the others
        ours, *others = (step(package, backend, compiled) for package in packages)
        for package, other in zip(packages[1:], others, strict=True):
            assert type(other.stats) is package.BDKDStats
            for name in ("losses", "grads"):
                for a, b in zip(getattr(ours, name), getattr(other, name), strict=True):
                    assert torch.equal(a, b)
            assert torch.equal(ours.stats.table, other.stats.table)


def test_each_copy_has_its_own_names(vendored, renamed):
    """Our own copy keeps the names that exported programs contain."""
    for package, namespace in (
        (bdkd_kernels, "bdkd"),
        (vendored, "acme_vendored_bdkd_kernels"),
        (renamed, "bdkd_kernels_abc123"),
    ):
        assert namespace == package.library.NAMESPACE
        operators = getattr(torch.ops, namespace)
        assert operators.copies.default
        if package.available_backends()["native"]:
            assert operators.native_forward.default
            assert package.native._fused.forward_op is operators.native_forward.default
            assert package.native.__file__ != bdkd_kernels.native.__file__ or namespace == "bdkd"


def test_statistics_of_both_are_in_one_exported_program(vendored):
    class Both(torch.nn.Module):
        def forward(self, s, t, y):
            return bdkd_kernels.bdkd_loss(s, t, y).stats, vendored.bdkd_loss(s, t, y).stats

    file = io.BytesIO()
    torch.export.save(torch.export.export(Both(), (S, T, Y)), file)
    file.seek(0)
    ours, theirs = torch.export.load(file).module()(S, T, Y)
    assert type(ours) is bdkd_kernels.BDKDStats
    assert type(theirs) is vendored.BDKDStats
    assert torch.equal(ours.forward_kl, theirs.forward_kl)


def test_a_new_option_needs_only_a_table_entry_and_its_mathematics(tmp_path):
    """The test adds an option and a statistic to a copy of the package.

    The signature, the checks, the operators' schema and the rows of the statistics follow.
    """
    package = copy_package("bdkd_kernels_developed", tmp_path)
    edit(
        package / "options.py",
        ("    ignore_index: Annotated[",
         '    margin: Annotated[float, "A new option.", FRACTION] = 0.25\n'
         "    ignore_index: Annotated["),
        ("    ignore_index: int\n", "    margin: float\n    ignore_index: int\n"),
        ('    "student_correct":', '    "student_margin": "A new statistic.",\n'
         '    "student_correct":'),
    )  # fmt: skip
    edit(
        package / "reference.py",
        ('        "student_correct":', '        "student_margin": zero + o.margin,\n'
         '        "student_correct":'),
    )  # fmt: skip
    new = import_copy("bdkd_kernels_developed", tmp_path)
    stats = new.bdkd_loss(S, T, Y, margin=0.75, backend="reference").stats
    assert stats.student_margin.tolist() == [0.75] * 6
    assert torch.equal(stats.student_correct, bdkd_kernels.bdkd_loss(S, T, Y).stats.student_correct)
    assert new.bdkd_loss(S[None], T[None], Y[None], backend="reference").stats.table.shape == (
        13, 1, 6,
    )  # fmt: skip
    assert "margin=0.5" in repr(new.BDKDLoss(margin=0.5))
    assert "margin: A new option." in new.bdkd_loss.__doc__
    assert "margin: float = 0.25" in str(new.bdkd_loss.__signature__)
    with pytest.raises(ValueError, match=r"margin must be a number in \[0, 1\], got 2.0"):
        new.bdkd_loss(S, T, Y, margin=2.0)
    assert "float label_smoothing, float margin, int ignore_index" in new.ops._FORWARD_SCHEMA
    assert "double margin;" in new.options.cpp_header()
    assert "kStudentMargin, kStudentCorrect" in new.options.cpp_header()


def edit(path, *changes):
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
