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

Three ways in. Plain eager calls go round the dispatcher: gradients come out of ``forward``, and
each network gets its own autograd node, so that the two losses go backward apart and in any order.
Compiled calls go through one operator whose backward makes both gradients from the logits (6 units
of traffic; gradients in the forward and a functional copy in the backward would be 8). Eager calls
under a dispatch mode or with a tensor subclass go through that operator too, once a network.
"""

from collections.abc import Callable, Sequence
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake

from . import buffers
from .checks import check_labels, labels_can_be_read
from .reference import compute_dtype
from .types import PLAIN, BDKDStats, LossOptions, Problem

Losses = tuple[Tensor, Tensor, BDKDStats]
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

        ds = buffers.empty_like(problem.student) if want_student else None  # (N, C)
        dt = buffers.empty_like(problem.teacher) if want_teacher else None  # (N, C)
        student, teacher, stats, state = self.forward(problem, grad_scale, ds, dt, True)
        if want_student or want_teacher:
            call = _Call(self, problem.options, grad_scale, ds, dt)
            saved = (*problem[:4], state)
            # The student's node comes last, so that it is the first to go backward.
            if want_teacher:
                teacher = _connect(problem.teacher, (teacher, saved, call, 1))
            if want_student:
                student = _connect(problem.student, (student, saved, call, 0))
        return student, teacher, BDKDStats(stats)

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
                made = _unit_stride_buffer(ds), _unit_stride_buffer(dt)
                student, teacher, stats, _ = self.forward(problem, grad_scale, *made, True)
            else:
                student, teacher, stats, *made = self._call_forward_op(
                    problem, grad_scale, ds is not None, dt is not None
                )
            for buffer, gradient in zip((ds, dt), made, strict=True):
                if buffer is not None and gradient is not None and gradient is not buffer:
                    buffer.copy_(gradient)
            return student, teacher, BDKDStats(stats)

    def forward(
        self,
        problem: Problem,
        grad_scale: float | Tensor,
        ds: Tensor | None,
        dt: Tensor | None,
        check: bool,
    ) -> Outputs:
        """The backend's forward on rows as it wants them; see the module's docstring."""
        if problem.student.shape[0] == 0:
            return self._empty_outputs(problem)
        return self._forward(_laid_out(problem), grad_scale, ds, dt, check)

    def backward(
        self,
        problem: Problem,
        state: Tensor | None,
        upstreams: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
        announced: float | Tensor | None,
    ) -> None:
        """The backend's backward, likewise."""
        if problem.student.shape[0]:
            self._backward(
                _laid_out(problem), state, upstreams[0], upstreams[1], gradients[0], gradients[1],
                announced,
            )  # fmt: skip

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
        return student, teacher, BDKDStats(stats)

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
    """What the nodes of one call share: the gradients that were made and not yet handed out.

    A node that meets another upstream than the announced one makes both networks' gradients with
    it in one pass: a loss scale that was put in late comes to both. Its partner then finds the
    upstream that its own was made with, and makes it once more only where it meets yet another.
    """

    __slots__ = ("fused", "gradients", "made_with", "options")

    def __init__(
        self,
        fused: Fused,
        options: LossOptions,
        announced: float | Tensor,
        ds: Tensor | None,
        dt: Tensor | None,
    ) -> None:
        self.fused, self.options = fused, options
        made_with = _Upstream(announced)
        self.gradients, self.made_with = [ds, dt], [made_with, made_with]

    def gradient(self, network: int, upstream: Tensor, ctx: Any) -> Tensor:
        """One network's, which is the caller's alone from now on."""
        # Out of every other thread's reach before anything is written into it.
        gradient, self.gradients[network] = self.gradients[network], None
        made_with = self.made_with[network]
        if gradient is not None and made_with.is_like(upstream):
            return gradient
        student, teacher, target, weight, state = ctx.saved_tensors
        gradients: list[Tensor | None] = [None, None]
        upstreams: list[Tensor | None] = [None, None]
        partner = announced = None
        if gradient is None:
            gradient = buffers.empty_like((student, teacher)[network])
        else:
            announced = made_with.scale()
            partner, self.gradients[1 - network] = self.gradients[1 - network], None
            if partner is not None:
                gradients[1 - network], upstreams[1 - network] = partner, upstream
        gradients[network], upstreams[network] = gradient, upstream
        problem = Problem(student, teacher, target, weight, self.options)
        with torch.no_grad():
            self.fused.backward(problem, state, upstreams, gradients, announced)
        if partner is not None:
            self.made_with[1 - network] = _Upstream(upstream)
            self.gradients[1 - network] = partner
        return gradient


class _Upstream:
    """What a gradient was made with, as it was then."""

    __slots__ = ("value", "version")

    def __init__(self, value: float | Tensor) -> None:
        self.value, self.version = value, _version(value)

    def scale(self) -> float | Tensor | None:
        """What a backend may compare an upstream with: one number, still the one that it was."""
        if not isinstance(self.value, Tensor):
            return self.value
        return self.value if self.value.ndim == 0 and _version(self.value) == self.version else None

    def is_like(self, upstream: Tensor) -> bool:
        """False also where only the device could tell."""
        if upstream is self.value:  # as from the sum of both losses
            return _version(upstream) == self.version
        scale = self.scale()
        if scale is None or upstream.ndim != 0 or not upstream.is_cpu:
            return False
        value, announced = upstream.item(), float(scale)
        if value != announced and upstream.dtype == torch.float32:
            announced = c_float(announced).value  # what a user's 0.1 has become on its way here
        return value == announced


def _version(scale: float | Tensor) -> int:
    """It changes where the tensor is written to; an inference tensor has none."""
    return scale._version if isinstance(scale, Tensor) and not scale.is_inference() else 0


class _NetworkLoss(torch.autograd.Function):
    """Ties one network's loss to its logits and to the gradient that the forward pass left.

    A node each: a common one would lead the backward pass of one loss into the other's network and
    free what that has saved. The gradient is handed out at the first backward and forgotten:
    ``AccumulateGrad`` clones one that anything else still refers to. A second backward
    (``retain_graph=True``) makes it again from the saved logits.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, known: tuple[Tensor, tuple, _Call, int]) -> Tensor:
        # In a tuple: a loss that is an argument itself would come out as a view.
        loss, saved, ctx.call, ctx.network = known
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gradient = ctx.call.gradient(ctx.network, upstream, ctx)
        if torch.is_grad_enabled():  # create_graph=True: an error, but only if it is followed
            student, teacher, *_ = ctx.saved_tensors
            gradient = _NoDoubleBackward.apply(
                student, teacher, upstream, gradient, ctx.call.fused.name
            )
        return gradient, None


# Past the Python of Function.apply, which looks for what a plain call has not, 2 us of 5; and past
# that of the node's own apply, which looks for the other ways to write a backward, 1 us of 4.
_connect = super(torch.autograd.Function, _NetworkLoss).apply
_NetworkLoss._backward_cls.apply = _NetworkLoss.backward  # type: ignore[attr-defined]


class _NoDoubleBackward(torch.autograd.Function):
    """The gradient, as a function of all it depends on, which cannot be differentiated again."""

    @staticmethod
    def forward(
        ctx, student: Tensor, teacher: Tensor, upstream: Tensor, gradient: Tensor, backend: str
    ) -> Tensor:
        ctx.backend = backend
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
        or type(problem.student) not in PLAIN
        or type(problem.teacher) not in PLAIN
    )


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
    # The first question is the cheapest, and settles most calls.
    return rows.is_contiguous() or rows.stride(1) == 1 or rows.shape[1] == 1


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if _is_dense(rows) else rows.contiguous()


def _unit_stride_buffer(buffer: Tensor | None) -> Tensor | None:
    """The buffer, or where its classes are strided a dense one to be copied into it."""
    return buffer if buffer is None or _is_dense(buffer) else buffers.empty_like(buffer)
