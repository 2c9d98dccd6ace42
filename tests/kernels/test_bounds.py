"""The documented ranges of the options are closed: both ends are valid values."""

import pytest
import torch
from bdkd_kernels import BDKDLoss, bdkd_loss, bdkd_loss_and_grad
from bdkd_kernels.compat import DistillKL, LigerJSD, kd_loss

S, T = torch.zeros(4, 5), torch.ones(4, 5)
Y = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": value} for value in (1e-4, 1e4)),
        *({"gamma": value} for value in (1, 1e9)),
        *({name: value} for name in ("student_ce", "student_kd", "teacher_ce", "teacher_kd")
          for value in (0, 1e-30, 1e9)),
        *({"label_smoothing": value} for value in (0, 1)),
        *({"ignore_index": value} for value in (-(2**63), 2**63 - 1)),
        *({"grad_scale": value} for value in (0, -3.4e38, 3.4e38, torch.finfo(torch.float32).max)),
    ],
    ids=str,
)  # fmt: skip
def test_the_documented_bounds_are_accepted(options):
    for function in (bdkd_loss, bdkd_loss_and_grad):
        out = function(S, T, Y, **options)
        assert (out if function is bdkd_loss else out[0]).student.isfinite()
    BDKDLoss(**{name: x for name, x in options.items() if name != "grad_scale"})


def test_the_bounds_of_compat_losses_are_accepted():
    for tau in (1e-4, 1e4):
        assert DistillKL(tau)(S, T).isfinite()
        assert kd_loss(S, T, tau).isfinite()
    for beta in (0, 1, 0.0, 1.0):
        assert LigerJSD(beta, -(2**63))(S, T).isfinite()
