"""lskd and dkd: shapes, unusual logits and labels, and invariances of each loss."""

import math

import plain_objectives as plain
import pytest
import torch
import torch.nn.functional as F
from test_closed_forms import objective

from bdkd.objectives.dkd import decoupled
from bdkd.objectives.lskd import standardised
from bdkd.objectives.ramp import Ramp

METHODS = ["lskd", "dkd"]
CPU = torch.device("cpu")


def logits(shape: tuple[int, int], seed: int = 0, scale: float = 2.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t, s = scale * torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return {"t0": t, "s0": s.requires_grad_()}


def labels(shape: tuple[int, int]) -> torch.Tensor:
    return torch.arange(shape[0]) * 7 % shape[1]


def loss_and_gradient(method: str, x: dict, target: torch.Tensor, **options):
    """Return the student's loss, summed over the samples, and its gradient."""
    loss = objective(method, "t0 s0", **options)(x, target, 1.0, 1.0).losses["s0"]
    (gradient,) = torch.autograd.grad(loss, x["s0"])
    return loss.detach(), gradient


def with_student(x: dict, s: torch.Tensor) -> dict:
    return x | {"s0": s.detach().requires_grad_()}


# With 2 classes there is only one other class. ImageNet has 1,000 classes.
@pytest.mark.parametrize("shape", [(5, 2), (7, 3), (3, 1000), (1, 10)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_match_the_equation_for_all_shapes_and_temperatures(
    method, temperature, shape
):
    x, target = logits(shape), labels(shape)
    loss, gradient = loss_and_gradient(method, x, target, temperature=temperature)
    settings = plain.DEFAULTS[method] | {"temperature": temperature}
    wanted = plain.METHODS[method](x, target, settings)["s0"].sum()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-9, atol=1e-12)
    (needed,) = torch.autograd.grad(wanted, x["s0"])
    torch.testing.assert_close(gradient, needed, rtol=1e-8, atol=1e-11)
    single = {name: value.detach().float() for name, value in x.items()}
    single["s0"].requires_grad_()
    loss, gradient = loss_and_gradient(method, single, target, temperature=temperature)
    assert loss.dtype is gradient.dtype is torch.float32
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), needed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 2), (4, 7)])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_pass_gradcheck(method, shape):
    x, target = logits(shape), labels(shape)
    learner = objective(method, "t0 s0", label_smoothing=0.1)

    def loss(s: torch.Tensor) -> torch.Tensor:
        return learner({"t0": x["t0"], "s0": s}, target, 3.0, 1.0).losses["s0"]

    assert torch.autograd.gradcheck(loss, x["s0"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_logits_have_the_loss_of_the_same_values_in_float32(method, dtype):
    x, target = logits((6, 10)), labels((6, 10))
    low = {name: value.detach().to(dtype) for name, value in x.items()}
    single = {name: value.float() for name, value in low.items()}
    low["s0"].requires_grad_()
    single["s0"].requires_grad_()
    loss, gradient = loss_and_gradient(method, low, target)
    wanted, needed = loss_and_gradient(method, single, target)
    assert gradient.dtype is dtype
    assert torch.equal(loss, wanted)
    torch.testing.assert_close(gradient, needed.to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_micro_batches_add_up_to_the_loss_of_the_batch(method):
    """Micro-batches and the shards of ranks have different sizes and the normaliser of the step."""
    shape, parts = (9, 5), [slice(0, 4), slice(4, 5), slice(5, 9)]
    x, target, learner = logits(shape), labels(shape), objective(method, "t0 s0")
    whole = learner(x, target, 9.0, 1.0).losses["s0"]
    (wanted,) = torch.autograd.grad(whole, x["s0"])
    total = sum(
        learner({n: v[part] for n, v in x.items()}, target[part], 9.0, 1.0).losses["s0"]
        for part in parts
    )
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(total, x["s0"])
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("grad_scale", [512.0, torch.tensor(65536.0)])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_scale_changes_only_the_gradient(method, grad_scale):
    x, target, learner = logits((6, 5)), labels((6, 5)), objective(method, "t0 s0")
    plain_loss = learner(x, target, 6.0, 1.0).losses["s0"]
    (wanted,) = torch.autograd.grad(plain_loss, x["s0"])
    loss = learner(x, target, 6.0, grad_scale).losses["s0"]
    (gradient,) = torch.autograd.grad(loss * grad_scale, x["s0"])
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(gradient, wanted * grad_scale, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_samples_with_the_label_minus_100_are_ignored(method):
    shape = (6, 5)
    x, target = logits(shape), labels(shape)
    target[[1, 4]] = -100
    counted = target != -100
    loss, gradient = loss_and_gradient(method, x, target, label_smoothing=0.1)
    rest = {name: value.detach()[counted] for name, value in x.items()}
    rest["s0"].requires_grad_()
    wanted, needed = loss_and_gradient(method, rest, target[counted], label_smoothing=0.1)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[counted], needed, rtol=1e-12, atol=1e-15)
    assert not gradient[~counted].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_with_only_ignored_samples_has_loss_0(method):
    loss, gradient = loss_and_gradient(method, logits((3, 5)), torch.full((3,), -100))
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("off", ["student_kd", "target_kd and other_kd"])
def test_without_divergences_the_loss_is_the_cross_entropy(off):
    method = "lskd" if off == "student_kd" else "dkd"
    x, target = logits((6, 5)), labels((6, 5))
    weights = dict.fromkeys(off.split(" and "), 0.0)
    loss, gradient = loss_and_gradient(method, x, target, student_ce=0.5, **weights)
    wanted = 0.5 * F.cross_entropy(x["s0"], target, reduction="sum")
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, x["s0"])[0])


# --- lskd -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["t0", "s0"])
@pytest.mark.parametrize(("factor", "shift"), [(1.0, 30.0), (1e4, 0.0), (0.01, -7.0)])
def test_lskd_does_not_depend_on_the_shift_and_scale_of_logits(who, factor, shift):
    """This is true for each network and sample, except for the 1e-7 added to the deviation."""
    x, target = logits((6, 5)), labels((6, 5))
    rows = torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None]  # different for each sample
    changed = x | {who: (x[who].detach() * factor * rows + shift * rows).requires_grad_()}
    loss, gradient = loss_and_gradient("lskd", x, target, student_ce=0.0)
    other, moved = loss_and_gradient("lskd", changed, target, student_ce=0.0)
    torch.testing.assert_close(other, loss, rtol=1e-4, atol=0)
    scale = factor * rows if who == "s0" else 1.0
    torch.testing.assert_close(moved * scale, gradient, rtol=1e-4, atol=1e-4)
    # The gradient does not change the mean of a row, nor to first order its deviation.
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(6, dtype=torch.float64))
    along = (gradient * (x["s0"] - x["s0"].mean(-1, keepdim=True))).sum(-1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_standardised_logits_have_mean_0_and_deviation_1_in_single_precision(shift):
    x = standardised(logits((6, 100))["t0"].float() + shift)
    torch.testing.assert_close(x.mean(-1), torch.zeros(6), rtol=0, atol=1e-3)
    torch.testing.assert_close(x.std(-1), torch.ones(6))


def test_lskd_is_0_if_the_student_has_scaled_logits_of_the_teacher():
    x = logits((6, 5))
    x = with_student(x, 3 * x["t0"] - 8)
    loss, gradient = loss_and_gradient("lskd", x, labels((6, 5)), student_ce=0.0)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("equal", ["t0", "s0", "t0 s0"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_lskd_is_finite_if_all_logits_of_a_sample_are_equal(value, equal, dtype):
    """The standard deviation is then 0. This happens if the final layer is initialised to 0."""
    x = {name: own.detach().to(dtype) for name, own in logits((4, 10)).items()}
    for name in equal.split():
        x[name][1:3] = value
    x["s0"].requires_grad_()
    target = labels((4, 10))
    loss, gradient = loss_and_gradient("lskd", x, target)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    if equal == "t0 s0" and value == 0:  # the divergence from such a teacher has no gradient
        _, from_labels = loss_and_gradient("lskd", x, target, student_kd=0.0)
        torch.testing.assert_close(gradient[1:3], from_labels[1:3])


def test_lskd_is_nan_if_a_class_is_masked():
    """The mean of the row is not finite, so the trainer skips the step."""
    x = logits((4, 5))
    x["t0"][2, 1] = -math.inf
    loss, _ = loss_and_gradient("lskd", x, labels((4, 5)))
    assert loss.isnan()


# --- dkd ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(6, 2), (6, 7)])
def test_the_parts_of_dkd_add_up_to_kd(shape, temperature):
    """Equation 7 of the paper: KL(p_t || p_s) = TCKD + (1 - p_t of the target class) NCKD."""
    x, target = logits(shape), labels(shape)
    total, tau = torch.zeros((), dtype=torch.float64), temperature
    for row, label in enumerate(target):
        s, t = x["s0"][row : row + 1], x["t0"][row : row + 1]
        of_target, of_others = decoupled(s, t, label[None], tau)
        total = total + of_target + (1 - (t / tau).softmax(-1)[0, label]) * of_others
    wanted, needed = loss_and_gradient(
        "kd", x, target, temperature=tau, student_ce=0.0, student_kd=1.0
    )
    torch.testing.assert_close(total.detach(), wanted)
    torch.testing.assert_close(torch.autograd.grad(total, x["s0"])[0], needed)


def test_nckd_is_0_for_two_classes():
    x, target = logits((6, 2)), labels((6, 2))
    loss, gradient = loss_and_gradient("dkd", x, target, student_ce=0.0, target_kd=0.0)
    assert loss == 0
    assert not gradient.any()


def test_dkd_does_not_depend_on_a_shift_or_on_the_order_of_the_other_classes():
    x, target = logits((6, 5)), labels((6, 5))
    loss, _ = loss_and_gradient("dkd", x, target)
    shifted = with_student({"t0": x["t0"] - 9}, x["s0"] + 30)
    torch.testing.assert_close(loss_and_gradient("dkd", shifted, target)[0], loss)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = with_student({"t0": x["t0"][:, order]}, x["s0"][:, order])
    moved = torch.stack([(order == label).nonzero()[0, 0] for label in target])
    torch.testing.assert_close(loss_and_gradient("dkd", permuted, moved)[0], loss)


def test_other_kd_gives_no_gradient_to_the_target_class():
    x, target = logits((6, 5)), labels((6, 5))
    _, gradient = loss_and_gradient("dkd", x, target, student_ce=0.0, target_kd=0.0)
    at_target = gradient.gather(-1, target[:, None])
    torch.testing.assert_close(at_target, torch.zeros_like(at_target), rtol=0, atol=1e-12)
    assert gradient.abs().sum() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dkd_of_large_logits_does_not_underflow(dtype):
    """The student predicts the target class 0 and the teacher predicts class 1, each with a
    probability of almost 1. Therefore TCKD is -log(1 - p_s) = (3 - 1) 1e4 / tau. Among the other
    classes, both predict class 1."""
    s = (1e4 * torch.tensor([[3.0, 1.0, 0.0, -1.0]])).to(dtype).requires_grad_()
    t = (1e4 * torch.tensor([[0.0, 2.0, 1.0, -1.0]])).to(dtype)
    tau = 4.0
    of_target, of_others = decoupled(s, t, torch.tensor([0]), tau)
    torch.testing.assert_close(of_target, torch.tensor(2e4 * tau, dtype=dtype))
    assert of_others == 0
    (gradient,) = torch.autograd.grad(of_target + of_others, s)
    wanted = tau * torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_large_and_small_logits_have_finite_gradients_in_single_precision(method, scale):
    x = {name: own.detach().float() for name, own in logits((6, 10), scale=scale).items()}
    x["s0"].requires_grad_()
    loss, gradient = loss_and_gradient(method, x, labels((6, 10)))
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_a_class_that_is_masked_in_both_networks_adds_nothing_to_dkd():
    x, target = logits((6, 5)), labels((6, 4))
    rest = with_student({"t0": x["t0"][:, :4]}, x["s0"][:, :4])
    mask = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf], dtype=torch.float64)
    masked = with_student({"t0": x["t0"] + mask}, x["s0"] + mask)
    loss, gradient = loss_and_gradient("dkd", masked, target)
    wanted, needed = loss_and_gradient("dkd", rest, target)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient, F.pad(needed, (0, 1)))


def test_a_class_that_only_the_teacher_masks_has_probability_0():
    x, target = logits((6, 5)), labels((6, 4))
    low, masked = x["t0"].clone(), x["t0"].clone()
    low[:, 4], masked[:, 4] = -1e4, -math.inf
    wanted = loss_and_gradient("dkd", x | {"t0": low}, target)
    for came, needed in zip(
        loss_and_gradient("dkd", x | {"t0": masked}, target), wanted, strict=True
    ):
        torch.testing.assert_close(came, needed)


def test_tckd_of_a_teacher_that_masks_the_target_class():
    s = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    t = torch.tensor([[-math.inf, 2.0, 2.0]], dtype=torch.float64)
    of_target, _ = decoupled(s, t, torch.tensor([0]), 1.0)
    torch.testing.assert_close(of_target, -(1 - s.softmax(-1)[0, 0]).log())


def test_the_target_class_of_a_soft_label_is_its_most_likely_class():
    x, target = logits((6, 5)), labels((6, 5))
    soft = 0.6 * F.one_hot(target, 5).double() + 0.4 / 5
    for came, needed in zip(
        loss_and_gradient("dkd", x, soft, student_ce=0.0),
        loss_and_gradient("dkd", x, target, student_ce=0.0),
        strict=True,
    ):
        assert torch.equal(came, needed)


# --- the warm-up of dkd ---------------------------------------------------------------------------


def test_the_ramp_equals_mdistillers_warm_up_at_the_end_of_each_epoch():
    """mdistiller counts epochs from 1 and changes the weight once an epoch."""
    ramp = Ramp(20.0)
    for epoch in range(1, 41):
        ramp.advance(float(epoch), CPU)
        assert float(ramp.value) == pytest.approx(min(epoch / 20, 1.0))


def test_a_ramp_grows_within_an_epoch_and_changes_its_tensor_in_place():
    ramp = Ramp(2.0)
    assert ramp.value == 1.0
    ramp.advance(0.0, CPU)
    place = ramp.value.data_ptr()
    values = []
    for step in range(12):
        ramp.advance(step / 4, CPU)
        values.append(float(ramp.value))
    assert values == [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0, 1.0, 1.0]
    assert ramp.value.data_ptr() == place
    ramp.advance(0.5, CPU)  # a run that resumes from an earlier checkpoint
    assert float(ramp.value) == 0.25


def test_a_ramp_of_length_0_is_1_from_the_first_step():
    ramp = Ramp(0.0)
    ramp.advance(0.0, CPU)
    assert ramp.value == 1.0


@pytest.mark.parametrize(("epochs", "share"), [(0.0, 0.0), (2.5, 0.5), (5.0, 1.0), (50.0, 1.0)])
def test_the_warm_up_multiplies_the_divergences_and_not_the_cross_entropy(epochs, share):
    x, target = logits((6, 5)), labels((6, 5))
    learner = objective("dkd", "t0 s0", warmup=5.0)
    learner.advance(epochs, CPU)
    loss = learner(x, target, 1.0, 1.0).losses["s0"]
    divergences, _ = loss_and_gradient("dkd", x, target, student_ce=0.0)
    wanted = F.cross_entropy(x["s0"], target, reduction="sum") + share * divergences
    torch.testing.assert_close(loss, wanted)
