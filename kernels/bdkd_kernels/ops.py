"""What the fused backends share: torch.library operators, autograd, and the eager way round both.

A backend brings two functions over rows and registers them once::

    _fused = ops.Fused("native", forward, backward, state_rows=0)
    loss, loss_and_grad = _fused.loss, _fused.loss_and_grad

    forward(problem, grad_scale, ds, dt, check_labels)
        -> student_loss, teacher_loss, stats (12, N), state (state_rows, N) or None
    backward(problem, state, student_upstream, teacher_upstream, ds, dt, announced) -> None

``forward`` returns losses as ``reduction`` says, in ``compute_dtype``, and writes ``ds`` and ``dt``
(N, C), where given: each network's gradient times ``grad_scale`` (a float, or a 0-dim tensor on
the device). It raises ``ValueError`` for a bad label if ``check_labels``; otherwise, and where the
labels cannot be read, such a row is NaN. ``state`` is whatever ``backward`` wants per row.

``backward`` writes, for each network with a buffer, its gradient times its upstream (0-dim, or
(N,) for ``"none"``). ``announced`` (float or 0-dim tensor) says that the buffer already holds the
gradient times that scale: where the upstream is the same, it stays. None: it holds nothing.

Logits and buffers arrive with unit stride in the class dimension, any row stride, and at least one
row; ``target`` and ``sample_weight`` (in ``compute_dtype``) contiguous; a network without a term
never has a buffer. A buffer may share the logits' memory.

Three ways in. Plain eager calls go round the dispatcher: gradients come out of ``forward``, and one
autograd node lets the two losses go backward together, or apart and in any order.
Compiled calls go through one operator whose backward makes both gradients from the logits (6 units
of traffic; gradients in the forward and a functional copy in the backward would be 8). Eager calls
under a dispatch mode or with a tensor subclass go through that operator too, once a network.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake

from .checks import check_labels, labels_can_be_read
from .reference import compute_dtype
from .types import BDKDStats, LossOptions, Problem

Losses = tuple[Tensor, Tensor, BDKDStats]
Pair = tuple[Tensor | None, Tensor | None]  # the student's, the teacher's
Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None]  # losses, statistics, state
Forward = Callable[
    [Problem, float | Tensor, Tensor | None, Tensor | None, bool],
    Outputs,
]
Backward = Callable[
    [
        Problem, Any, Tensor | None, Tensor | None, Tensor | None, Tensor | None,
        float | Tensor | None,
    ],
    None,
]  # fmt: skip

_INPUTS = "Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight"
_OPTIONS = (
    "float temperature, float gamma, float student_ce, float student_kd, float teacher_ce, "
    "float teacher_kd, str teacher_divergence, bool soften_entropy, float label_smoothing, "
    "int ignore_index, str reduction"
)
_FORWARD_SCHEMA = (
    f"({_INPUTS}, Tensor? grad_scale, float grad_scale_value, bool student_grad, "
    f"bool teacher_grad, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    f"(Tensor? student_upstream, Tensor? teacher_upstream, {_INPUTS}, Tensor state, {_OPTIONS})"
    " -> (Tensor, Tensor)"
)
_PLAIN = (Tensor, torch.nn.Parameter)


def flat_options(o: LossOptions) -> tuple[Any, ...]:
    """The options in the order of the operators' schema and of ``LossOptions``' constructor."""
    return (
        o.temperature, o.gamma, o.student_ce, o.student_kd, o.teacher_ce, o.teacher_kd,
        o.teacher_divergence, o.soften_entropy, o.label_smoothing, o.ignore_index, o.reduction,
    )  # fmt: skip


def terms(problem: Problem) -> tuple[bool, bool]:
    """Whether the student's and the teacher's loss have a term; one without is a constant 0."""
    o, labelled = problem.options, problem.target is not None
    student = o.student_kd != 0 or (o.student_ce != 0 and labelled)
    teacher = o.teacher_kd != 0 or (o.teacher_ce != 0 and labelled)
    return student, teacher


class Fused:
    """One backend's ``loss`` and ``loss_and_grad``, and its operators ``bdkd::NAME_forward`` and
    ``bdkd::NAME_backward``."""

    def __init__(self, name: str, forward: Forward, backward: Backward, state_rows: int) -> None:
        self.name, self.state_rows = name, state_rows
        self._forward, self._backward = forward, backward
        self._register()
        self.forward_op = getattr(torch.ops.bdkd, f"{name}_forward").default
        self.backward_op = getattr(torch.ops.bdkd, f"{name}_backward").default

    def loss(self, problem: Problem, grad_scale: float | Tensor = 1.0) -> Losses:
        """Student loss, teacher loss, statistics; the losses connected to autograd."""
        with_student, with_teacher = terms(problem)
        grad_mode = torch.is_grad_enabled()
        want_student = with_student and grad_mode and problem.student.requires_grad
        want_teacher = with_teacher and grad_mode and problem.teacher.requires_grad
        if not _is_plain(problem):
            return self._loss_through_operator(problem, want_student, want_teacher)

        ds = _empty_like(problem.student) if want_student else None  # (N, C)
        dt = _empty_like(problem.teacher) if want_teacher else None  # (N, C)
        student, teacher, stats, state = self.forward(problem, grad_scale, ds, dt, True)
        if want_student or want_teacher:
            call = _Call(self, problem, state, (student, teacher), (ds, dt), grad_scale)
            connected = _Losses.apply(problem.student, problem.teacher, call)
            if want_student and want_teacher:
                student, teacher = connected
            elif want_student:
                student = connected
            else:
                teacher = connected
        return student, teacher, BDKDStats._make(stats.unbind())

    def loss_and_grad(
        self, problem: Problem, grad_scale: float | Tensor, ds: Tensor | None, dt: Tensor | None
    ) -> Losses:
        """:meth:`loss`, detached; both gradients, times ``grad_scale``, go into ``ds``, ``dt``."""
        with torch.no_grad():
            for buffer, has_term in zip((ds, dt), terms(problem), strict=True):
                if buffer is not None and not has_term:
                    buffer.zero_()
            with_student, with_teacher = terms(problem)
            ds, dt = ds if with_student else None, dt if with_teacher else None
            if _is_plain(problem):
                student, teacher, stats, _ = self.forward(problem, grad_scale, ds, dt, True)
            else:
                student, teacher, stats, new_ds, new_dt = self._call_forward_op(
                    problem, grad_scale, ds is not None, dt is not None
                )
                if ds is not None:
                    ds.copy_(new_ds)
                if dt is not None:
                    dt.copy_(new_dt)
            return student, teacher, BDKDStats._make(stats.unbind())

    def forward(
        self,
        problem: Problem,
        grad_scale: float | Tensor,
        ds: Tensor | None,
        dt: Tensor | None,
        check: bool,
    ) -> Outputs:
        """The backend's forward on rows as it wants them; see the module's docstring."""
        student = problem.student
        if len(student) == 0:
            return self._empty_outputs(problem)
        problem = _laid_out(problem)
        into_ds, into_dt = _unit_stride_buffer(ds), _unit_stride_buffer(dt)
        outputs = self._forward(problem, grad_scale, into_ds, into_dt, check)
        for buffer, written in ((ds, into_ds), (dt, into_dt)):
            if buffer is not None and written is not None and written is not buffer:
                buffer.copy_(written)
        return outputs

    def backward(
        self,
        problem: Problem,
        state: Tensor | None,
        upstreams: tuple[Tensor | None, Tensor | None],
        gradients: tuple[Tensor | None, Tensor | None],
        announced: float | Tensor | None,
    ) -> None:
        """The backend's backward, likewise."""
        if len(problem.student):
            self._backward(_laid_out(problem), state, *upstreams, *gradients, announced)

    def _empty_outputs(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s = problem.student
        rows, dtype = s.shape[0], compute_dtype(s, problem.teacher)
        shape = (rows,) if problem.options.reduction == "none" else ()
        return (
            s.new_zeros(shape, dtype=dtype),
            s.new_zeros(shape, dtype=dtype),
            s.new_empty((12, rows), dtype=dtype),
            s.new_empty((self.state_rows, rows), dtype=dtype),
        )

    # -- through torch.library ------------------------------------------------------------------

    def _loss_through_operator(
        self, problem: Problem, want_student: bool, want_teacher: bool
    ) -> Losses:
        if type(problem.target) is Tensor and labels_can_be_read(problem.target):
            check_labels(problem.target, problem.student.shape[-1], problem.options.ignore_index)
        both = want_student and want_teacher
        student, teacher, stats = self._call_once(
            problem, want_student, want_teacher and (torch.compiler.is_compiling() or not both)
        )
        if both and not torch.compiler.is_compiling():
            # One node for both would free the other's saved tensors in an eager backward.
            teacher = self._call_once(problem, False, True)[1]
        return student, teacher, BDKDStats._make(stats.unbind())

    def _call_once(self, problem: Problem, want_student: bool, want_teacher: bool):
        connected = problem._replace(
            student=problem.student if want_student else problem.student.detach(),
            teacher=problem.teacher if want_teacher else problem.teacher.detach(),
        )
        student, teacher, stats, _, _ = self._call_forward_op(connected, 1.0, False, False)
        return (
            student if want_student else student.detach(),
            teacher if want_teacher else teacher.detach(),
            stats.detach(),
        )

    def _call_forward_op(
        self, problem: Problem, grad_scale: float | Tensor, student_grad: bool, teacher_grad: bool
    ):
        tensor = grad_scale if isinstance(grad_scale, Tensor) else None
        value = 1.0 if isinstance(grad_scale, Tensor) else float(grad_scale)
        student, teacher, stats, _, ds, dt = self.forward_op(
            problem.student, problem.teacher, problem.target, problem.sample_weight,
            tensor, value, student_grad, teacher_grad, *flat_options(problem.options),
        )  # fmt: skip
        return student, teacher, stats, ds, dt

    def _register(self) -> None:
        forward, backward = f"bdkd::{self.name}_forward", f"bdkd::{self.name}_backward"
        define(forward, _FORWARD_SCHEMA)
        define(backward, _BACKWARD_SCHEMA)

        @impl(forward, "default")
        def _(student, teacher, target, weight, scale, value, student_grad, teacher_grad, *options):
            problem = Problem(student, teacher, target, weight, LossOptions(*options))
            with_student, with_teacher = terms(problem)
            ds, dt = _gradients(problem, student_grad, teacher_grad)
            outputs = self.forward(
                problem, value if scale is None else scale,
                ds if student_grad and with_student else None,
                dt if teacher_grad and with_teacher else None, False,
            )  # fmt: skip
            student_loss, teacher_loss, stats, state = outputs
            if state is None:
                state = stats.new_empty((0, stats.shape[1]))
            stats = stats.clone(memory_format=torch.contiguous_format)  # no view of the state
            return student_loss, teacher_loss, stats, state.contiguous(), ds, dt

        @register_fake(forward)
        def _(student, teacher, target, weight, scale, value, student_grad, teacher_grad, *options):
            problem = Problem(student, teacher, target, weight, LossOptions(*options))
            ds, dt = _gradients(problem, student_grad, teacher_grad)
            return *self._empty_outputs(problem), ds, dt

        @impl(backward, "default")
        def _(student_up, teacher_up, student, teacher, target, weight, state, *options):
            problem = Problem(student, teacher, target, weight, LossOptions(*options))
            ds, dt = _gradients(problem, student_up is not None, teacher_up is not None)
            self.backward(
                problem, state, (student_up, teacher_up),
                (None if student_up is None else ds,
                 None if teacher_up is None else dt), None,
            )  # fmt: skip
            return ds, dt

        @register_fake(backward)
        def _(student_up, teacher_up, student, teacher, target, weight, state, *options):
            problem = Problem(student, teacher, target, weight, LossOptions(*options))
            return _gradients(problem, student_up is not None, teacher_up is not None)

        def keep(ctx, inputs, output):
            student, teacher, target, weight, *_ = inputs
            ctx.save_for_backward(student, teacher, target, weight, output[3])
            ctx.options = inputs[8:]

        def forward_backward(ctx, student_upstream, teacher_upstream, *_):
            student, teacher, target, weight, state = ctx.saved_tensors
            problem = Problem(student, teacher, target, weight, LossOptions(*ctx.options))
            with_student, with_teacher = terms(problem)
            if not (with_student and ctx.needs_input_grad[0]):
                student_upstream = None
            if not (with_teacher and ctx.needs_input_grad[1]):
                teacher_upstream = None
            ds, dt = self.backward_op(
                student_upstream, teacher_upstream, student, teacher, target, weight, state,
                *ctx.options,
            )  # fmt: skip
            rest = (None,) * (len(ctx.options) + 6)
            return (
                None if student_upstream is None else ds,
                None if teacher_upstream is None else dt,
                *rest,
            )

        def refuse(ctx, *_):
            raise RuntimeError(_double_backward(self.name))

        register_autograd(forward, forward_backward, setup_context=keep)
        register_autograd(backward, refuse)


class _Call:
    """What the autograd node of one call holds.

    In attributes, not by ``save_for_backward``, which frees after the first of two separate
    backward passes: so it looks itself whether logits have changed, and lets go of them itself.
    """

    __slots__ = ("announced", "fused", "gradients", "losses", "problem", "state", "versions")

    def __init__(self, fused, problem, state, losses, gradients, announced) -> None:
        self.fused, self.problem, self.state = fused, problem, state
        self.losses, self.gradients, self.announced = losses, gradients, announced
        self.versions = problem.student._version, problem.teacher._version

    def backward(self, upstreams: Pair) -> Pair:
        """The gradients for the upstreams that came."""
        problem, announced = self.problem, self.announced
        if problem is None:
            raise RuntimeError(
                "bdkd_loss has been backpropagated and its logits were freed: "
                "pass retain_graph=True to the first backward"
            )
        if self.versions != (problem.student._version, problem.teacher._version):
            raise RuntimeError("logits were modified in place between bdkd_loss and its backward")
        student_asked, teacher_asked = upstreams[0] is not None, upstreams[1] is not None
        ds = self.gradients[0] if student_asked else None
        dt = self.gradients[1] if teacher_asked else None
        if (student_asked and ds is None) or (teacher_asked and dt is None):
            announced = None  # one was handed out before: made again
            ds = _empty_like(problem.student) if student_asked else None
            dt = _empty_like(problem.teacher) if teacher_asked else None
        gradients = ds, dt
        self.gradients = (
            None if student_asked else self.gradients[0],
            None if teacher_asked else self.gradients[1],
        )
        with torch.no_grad():
            self.fused.backward(problem, self.state, upstreams, gradients, announced)
        if self.gradients == (None, None) and not _graph_is_kept():
            self.problem = self.state = None
        return gradients


_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


class _Losses(torch.autograd.Function):
    """Ties the losses to their logits and to the gradients that the forward pass left.

    A gradient is handed out at its first backward and forgotten: ``AccumulateGrad`` clones one that
    anything else still refers to. A second backward (``retain_graph=True``) makes it again from the
    logits. One node serves both losses, in one backward pass or in two: a node each costs more than
    the kernel at 128 x 100.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, call: _Call):
        ctx.set_materialize_grads(False)
        ctx.call = call
        losses, (ds, dt) = call.losses, call.gradients
        del call.losses
        ctx.network = None if ds is not None and dt is not None else 0 if ds is not None else 1
        return losses if ctx.network is None else losses[ctx.network]

    @staticmethod
    def backward(ctx, *above: Tensor | None):
        call, network = ctx.call, ctx.network
        upstreams = above
        if network is not None:
            upstreams = (above[0], None) if network == 0 else (None, above[0])
        problem = call.problem
        gradients = call.backward(upstreams)
        if torch.is_grad_enabled():  # create_graph=True: an error, but only if it is followed
            name = call.fused.name
            gradients = tuple(
                None if x is None else _NoDoubleBackward.apply(*problem[:2], *above, x, name)
                for x in gradients
            )
        return *gradients, None


class _NoDoubleBackward(torch.autograd.Function):
    """The gradient, as a function of all it depends on, which cannot be differentiated again."""

    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        *_, gradient, ctx.backend = inputs
        return gradient.detach()

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_double_backward(ctx.backend))


def _double_backward(backend: str) -> str:
    return f"the {backend} backend has no double backward: use backend='reference' for it"


def _is_plain(problem: Problem) -> bool:
    """Whether nothing watches the dispatcher, so that a call may go round it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or type(problem.student) not in _PLAIN
        or type(problem.teacher) not in _PLAIN
    )


def _empty_like(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _gradients(problem: Problem, student: bool, teacher: bool) -> tuple[Tensor, Tensor]:
    """(N, C) each, zero where the network has no term; (0,) where no gradient is wanted."""

    def make(logits: Tensor, wanted: bool, has_term: bool) -> Tensor:
        if not wanted:
            return logits.new_empty(0)
        return logits.new_empty(logits.shape) if has_term else logits.new_zeros(logits.shape)

    with_student, with_teacher = terms(problem)
    return make(problem.student, student, with_student), make(
        problem.teacher, teacher, with_teacher
    )


def _laid_out(problem: Problem) -> Problem:
    """Unit stride in the class dimension, labels and weights contiguous: a copy only where not."""
    student, teacher, target, weight, options = problem
    if weight is not None:
        weight = weight.to(compute_dtype(student, teacher)).contiguous()
    elif _is_dense(student) and _is_dense(teacher) and (target is None or target.is_contiguous()):
        return problem
    if target is not None:
        target = target.contiguous()
    return Problem(_unit_stride(student), _unit_stride(teacher), target, weight, options)


def _is_dense(rows: Tensor) -> bool:
    return rows.stride(1) == 1 or rows.shape[1] == 1


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if _is_dense(rows) else rows.contiguous()


def _unit_stride_buffer(buffer: Tensor | None) -> Tensor | None:
    """The buffer, or where its classes are strided a dense one to be copied into it."""
    return buffer if buffer is None or _is_dense(buffer) else _empty_like(buffer)
