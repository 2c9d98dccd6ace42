"""The code that the fused backends share: torch.library operators, autograd, and the eager path.

A backend provides two functions over rows and registers them once::

    _fused = ops.FusedBackend("native", forward, backward, state_rows=0)
    loss, loss_and_grad = _fused.loss, _fused.loss_and_grad

    forward(problem, grad_scale, ds, dt, check_labels)
        -> student_loss, teacher_loss, stats (12, N), state (state_rows, N) or None
    backward(problem, state, student_upstream, teacher_upstream, ds, dt, announced) -> None

``forward`` returns losses reduced as ``reduction`` says, in ``compute_dtype``. It writes ``ds`` and
``dt`` (N, C), where given: each network's gradient times ``grad_scale`` (a float, or a 0-dim tensor
on the device). If ``check_labels`` is True it raises ``ValueError`` for a bad label. Otherwise, and
where the labels cannot be read, the row of a bad label is NaN. ``state`` holds what ``backward``
needs of each row.

``backward`` writes, for each network with a buffer, its gradient times its upstream gradient
(0-dim, or (N,) for ``"none"``). ``announced`` (float or 0-dim tensor) says that the buffer already
holds the gradient times that scale, which stays if the upstream is the same. None: the buffer holds
nothing.

Logits and buffers have unit stride in the class dimension, any row stride, and at least one row;
``target`` and ``sample_weight`` (in ``compute_dtype``) are contiguous; a network without a term
never has a buffer. A buffer may share the memory of its own network's logits, and no other.

There are three paths:

- A plain eager call bypasses the dispatcher. ``forward`` computes the gradients, and each network
  gets its own autograd node, so that the two losses can go backward apart and in any order.
- A compiled call goes through one operator whose backward computes both gradients from the logits:
  6 units of traffic, where gradients in the forward and a functional copy would take 8.
- An eager call under a dispatch mode or with a tensor subclass goes through that operator too, once
  for each network.
"""

from collections.abc import Callable, Sequence
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import define, impl, register_autograd, register_fake

from . import buffers
from ._torch_compat import has_memory
from .checks import check_labels, in_memory, labels_can_be_read
from .reference import compute_dtype, savable, write, zero_with_graph
from .types import BDKDStats, LossInputs, LossOptions

Losses = tuple[Tensor, Tensor, BDKDStats]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None]  # losses, statistics, state
Forward = Callable[
    [LossInputs, float | Tensor, Tensor | None, Tensor | None, bool],
    Outputs,
]
Backward = Callable[
    [
        LossInputs, Any, Tensor | None, Tensor | None, Tensor | None, Tensor | None,
        float | Tensor | None,
    ],
    None,
]  # fmt: skip

_INPUT_NAMES = ("student_logits", "teacher_logits", "target", "sample_weight")
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


class FusedBackend:
    """One backend's ``loss`` and ``loss_and_grad``, and its operators ``bdkd::NAME_forward`` and
    ``bdkd::NAME_backward``."""

    def __init__(self, name: str, forward: Forward, backward: Backward, state_rows: int) -> None:
        self.name, self.state_rows = name, state_rows
        self._forward, self._backward = forward, backward
        self._register()
        self.forward_op = getattr(torch.ops.bdkd, f"{name}_forward").default
        self.backward_op = getattr(torch.ops.bdkd, f"{name}_backward").default

    def loss(self, problem: LossInputs, grad_scale: float | Tensor = 1.0) -> Losses:
        """Return the student's loss, the teacher's loss and the statistics.

        The losses are connected to autograd.
        """
        with_student, with_teacher = problem.has_terms()
        train_student = train_teacher = False
        if torch.is_grad_enabled():
            train_student = problem.student.requires_grad
            train_teacher = problem.teacher.requires_grad
        want_student, want_teacher = with_student and train_student, with_teacher and train_teacher
        if problem.plain:
            losses = self._plain_loss(problem, grad_scale, want_student, want_teacher)
        else:
            losses = self._loss_through_operator(problem, want_student, want_teacher)
        if train_student == want_student and train_teacher == want_teacher:
            return losses
        student, teacher, stats = losses
        if train_student and not with_student:
            student = student + _zero_with_graph(problem.student, problem.options)
        if train_teacher and not with_teacher:
            teacher = teacher + _zero_with_graph(problem.teacher, problem.options)
        return student, teacher, stats

    def _plain_loss(
        self,
        problem: LossInputs,
        grad_scale: float | Tensor,
        want_student: bool,
        want_teacher: bool,
    ) -> Losses:
        ds = buffers.empty_rows(problem.student, problem.dense) if want_student else None  # (N, C)
        dt = buffers.empty_rows(problem.teacher, problem.dense) if want_teacher else None  # (N, C)
        student, teacher, stats, state = self.forward(problem, grad_scale, ds, dt, True)
        if want_student or want_teacher:
            call = _SavedGradients(self, problem.options, grad_scale, ds, dt)
            saved: tuple[Tensor | None, ...] = (*problem[:4], state)
            try:
                # The student's node comes last, so that it is the first to go backward.
                if want_teacher:
                    teacher = _NetworkLoss.apply(problem.teacher, (teacher, saved, call, 1))
                if want_student:
                    student = _NetworkLoss.apply(problem.student, (student, saved, call, 0))
            except RuntimeError:
                # Autograd saves no inference tensors. They need no watch: nothing tracks their
                # version, and only inference mode can change their values.
                saved = call.keep_inference_tensors(saved)
                if not any(x is not None for x in call.inference or ()):
                    raise
                if want_teacher:
                    teacher = _NetworkLoss.apply(problem.teacher, (teacher, saved, call, 1))
                if want_student:
                    student = _NetworkLoss.apply(problem.student, (student, saved, call, 0))
        return student, teacher, BDKDStats(stats)

    def loss_and_grad(
        self, problem: LossInputs, grad_scale: float | Tensor, ds: Tensor | None, dt: Tensor | None
    ) -> Losses:
        """Return :meth:`loss`, detached, and write both gradients, times ``grad_scale``.

        They go into ``ds`` and ``dt`` where these are given.
        """
        with_student, with_teacher = problem.has_terms()
        ds_made, dt_made = ds_into, dt_into = (
            ds if with_student else None, dt if with_teacher else None,
        )  # fmt: skip
        if problem.plain:
            ds_made, dt_made = _unit_stride_buffer(ds_into), _unit_stride_buffer(dt_into)
            student, teacher, stats, _ = self.forward(problem, grad_scale, ds_made, dt_made, True)
        else:
            with torch.no_grad():
                student, teacher, stats, ds_made, dt_made = self._call_forward_op(
                    problem, grad_scale, ds_into is not None, dt_into is not None
                )
        written = []
        for buffer, gradient in ((ds_into, ds_made), (dt_into, dt_made)):
            if buffer is not None and gradient is buffer:
                written.append(buffer)
            elif buffer is not None and gradient is not None:
                write(buffer, gradient)
        if written:
            # A kernel wrote past torch: autograd must notice if it saved this memory.
            _raise_versions(written)
        # Only now, since a buffer may be the logits.
        if ds is not None and not with_student:
            write(ds, 0.0)
        if dt is not None and not with_teacher:
            write(dt, 0.0)
        return student, teacher, BDKDStats(stats)

    def forward(
        self,
        problem: LossInputs,
        grad_scale: float | Tensor,
        ds: Tensor | None,
        dt: Tensor | None,
        check: bool,
    ) -> Outputs:
        """Call the backend's forward on contiguous rows; see the module's docstring."""
        if not problem.dense:
            if problem.student.shape[0] == 0:
                return self._empty_outputs(problem)
            problem = _laid_out(problem)
        return self._forward(problem, grad_scale, ds, dt, check)

    def backward(
        self,
        problem: LossInputs,
        state: Tensor | None,
        upstreams: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
        announced: float | Tensor | None,
    ) -> None:
        """Call the backend's backward on contiguous rows; see the module's docstring."""
        if problem.student.shape[0]:
            for name, x in zip(_INPUT_NAMES, problem[:4], strict=True):
                if x is not None:
                    in_memory(name, x)  # its storage may have been freed since
            student, teacher = (
                None if x is None else in_memory("the gradient of the loss", x) for x in upstreams
            )
            self._backward(
                _laid_out(problem), state, student, teacher, gradients[0], gradients[1], announced
            )

    def _empty_outputs(self, problem: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        self, problem: LossInputs, want_student: bool, want_teacher: bool
    ) -> Losses:
        if labels_can_be_read(problem.target):
            check_labels(problem.target, problem.student.shape[-1], problem.options.ignore_index)
        both = want_student and want_teacher
        student, teacher, stats = self._call_once(
            problem, want_student, want_teacher and (torch.compiler.is_compiling() or not both)
        )
        if both and not torch.compiler.is_compiling():
            # One node for both would free the other's saved tensors in an eager backward.
            teacher = self._call_once(problem, False, True)[1]
        return student, teacher, BDKDStats(stats)

    def _call_once(self, problem: LossInputs, want_student: bool, want_teacher: bool):
        if want_student or want_teacher:
            problem = savable(problem, logits=True)
        connected = problem.with_tensors(
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
        self,
        problem: LossInputs,
        grad_scale: float | Tensor,
        student_grad: bool,
        teacher_grad: bool,
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
            problem = LossInputs(student, teacher, target, weight, LossOptions(*options))
            with_student, with_teacher = problem.has_terms()
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
            problem = LossInputs(student, teacher, target, weight, LossOptions(*options))
            ds, dt = _gradients(problem, student_grad, teacher_grad)
            return *self._empty_outputs(problem), ds, dt

        @impl(backward, "default")
        def _(student_up, teacher_up, student, teacher, target, weight, state, *options):
            problem = LossInputs(student, teacher, target, weight, LossOptions(*options))
            ds, dt = _gradients(problem, student_up is not None, teacher_up is not None)
            self.backward(
                problem, state, (student_up, teacher_up),
                (None if student_up is None else ds,
                 None if teacher_up is None else dt), None,
            )  # fmt: skip
            return ds, dt

        @register_fake(backward)
        def _(student_up, teacher_up, student, teacher, target, weight, state, *options):
            problem = LossInputs(student, teacher, target, weight, LossOptions(*options))
            return _gradients(problem, student_up is not None, teacher_up is not None)

        def keep(ctx, inputs, output):
            student, teacher, target, weight, *_ = inputs
            ctx.save_for_backward(student, teacher, target, weight, output[3])
            ctx.options = inputs[8:]

        def forward_backward(ctx, student_upstream, teacher_upstream, *_):
            student, teacher, target, weight, state = ctx.saved_tensors
            problem = LossInputs(student, teacher, target, weight, LossOptions(*ctx.options))
            with_student, with_teacher = problem.has_terms()
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


class _SavedGradients:
    """What the two nodes of one call share: the gradients computed and not handed out yet.

    A node whose upstream gradient is not the announced one computes both networks' gradients with
    it, in one pass: a loss scale that is applied late applies to both. The other node then finds
    the upstream that its gradient was computed with, and computes it again only if its own is yet
    another.
    """

    __slots__ = ("fused", "gradients", "inference", "made_with", "options")
    inference: Sequence[Tensor | None] | None  # tensors that autograd refuses to save, by place

    def __init__(
        self,
        fused: FusedBackend,
        options: LossOptions,
        announced: float | Tensor,
        ds: Tensor | None,
        dt: Tensor | None,
    ) -> None:
        self.fused, self.options, self.inference = fused, options, None
        made_with = _GradScale(announced)
        self.gradients, self.made_with = [ds, dt], [made_with, made_with]

    def keep_inference_tensors(self, saved: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Keep the inference tensors among them; return the others, in their places.

        Called when autograd has refused to save them: to ask every call's tensors takes 0.6 us.
        """
        self.inference = [x if x is not None and x.is_inference() else None for x in saved]
        pairs = zip(saved, self.inference, strict=True)
        return tuple(None if kept is not None else x for x, kept in pairs)

    def problem(self, ctx: Any) -> tuple[LossInputs, Tensor | None]:
        """The inputs and the state, from a node's saved tensors."""
        saved = ctx.saved_tensors
        if self.inference is not None:
            saved = [x if k is None else k for x, k in zip(saved, self.inference, strict=True)]
        student, teacher, target, weight, state = saved
        return LossInputs(student, teacher, target, weight, self.options), state

    def gradient(self, network: int, upstream: Tensor, ctx: Any) -> Tensor:
        """One network's gradient, which is the caller's alone from now on."""
        # Out of every other thread's reach before anything is written into it.
        gradient, self.gradients[network] = self.gradients[network], None
        made_with = self.made_with[network]
        try:
            if gradient is not None and made_with.is_like(upstream):
                return gradient
            batched = not has_memory(upstream)
        except RuntimeError:  # it is not one number
            batched = not has_memory(upstream)
            if not batched:
                raise
        if batched:  # is_grads_batched=True, jacobian(vectorize=True)
            self.gradients[network] = gradient
            return self._batched_gradient(network, upstream, ctx)
        problem, state = self.problem(ctx)
        gradients: list[Tensor | None] = [None, None]
        upstreams: list[Tensor | None] = [None, None]
        partner = announced = None
        if gradient is None:
            gradient = buffers.empty_rows((problem.student, problem.teacher)[network], False)
        else:
            announced = made_with.scale()
            partner, self.gradients[1 - network] = self.gradients[1 - network], None
            if partner is not None:
                gradients[1 - network], upstreams[1 - network] = partner, upstream
        gradients[network], upstreams[network] = gradient, upstream
        with torch.no_grad():
            self.fused.backward(problem, state, upstreams, gradients, announced)
        if partner is not None:
            self.made_with[1 - network] = _GradScale(upstream)
            self.gradients[1 - network] = partner
        return gradient

    def _batched_gradient(self, network: int, upstream: Tensor, ctx: Any) -> Tensor:
        """The gradient of a batch of upstream gradients, which a kernel cannot see into.

        It is linear in the upstream: the gradient of 1 is computed in ``compute_dtype``, multiplied
        and rounded once.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(_double_backward(self.fused.name))
        problem, state = self.problem(ctx)
        dtype = compute_dtype(problem.student, problem.teacher)
        storage = (problem.student, problem.teacher)[network].dtype
        wide = problem.student.to(dtype), problem.teacher.to(dtype)
        problem = problem.with_tensors(student=wide[0], teacher=wide[1])
        rows = problem.student.shape[:1] if problem.options.reduction == "none" else ()
        gradient = torch.empty_like(wide[network], memory_format=torch.contiguous_format)
        gradients: list[Tensor | None] = [None, None]
        upstreams: list[Tensor | None] = [None, None]
        gradients[network] = gradient
        upstreams[network] = gradient.new_ones(rows)
        self.fused.backward(problem, state, upstreams, gradients, None)
        return (upstream[..., None] * gradient).to(storage)


class _GradScale:
    """What a gradient was made with, as it was then."""

    __slots__ = ("value", "version")

    def __init__(self, value: float | Tensor) -> None:
        self.value = value
        self.version = 0 if type(value) is float else _version(value)

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
        if value != announced:
            return False
        # Most often the other network's upstream is this very tensor.
        self.version = _version(upstream)
        self.value = upstream
        return True


def _version(scale: float | Tensor) -> int:
    """It changes where the tensor is written to; an inference tensor has none."""
    return scale._version if isinstance(scale, Tensor) and not scale.is_inference() else 0


def _raise_versions(written: list[Tensor]) -> None:
    try:
        increment_version(written)
    except RuntimeError:  # one is an inference tensor, which has none
        increment_version([x for x in written if not x.is_inference()])


class _NetworkLoss(torch.autograd.Function):
    """Connects one network's loss to its logits and to the gradient that the forward pass computed.

    Each network has its own node: a common one would lead the backward pass of one loss into the
    other's network and free what that network saved. The gradient is handed out at the first
    backward and forgotten, because ``AccumulateGrad`` clones a gradient that anything else refers
    to. A second backward (``retain_graph=True``) computes it again from the saved logits.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, known: tuple[Tensor, tuple, _SavedGradients, int]) -> Tensor:
        # In a tuple: a loss that is an argument itself would be returned as a view.
        loss, saved, ctx.call, ctx.network = known
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        call = ctx.call
        gradient = call.gradient(ctx.network, upstream, ctx)
        if torch.is_grad_enabled():  # create_graph=True: an error, but only if it is followed
            problem, _ = call.problem(ctx)
            gradient = _NoDoubleBackward.apply(
                problem.student, problem.teacher, upstream, gradient, call.fused.name
            )
        return gradient, None


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


def _zero_with_graph(logits: Tensor, o: LossOptions) -> Tensor:
    """Zero of the shape of a loss, whose gradient is 0 for every logit."""
    rows = zero_with_graph(logits)
    return rows if o.reduction == "none" else rows.sum()


def _gradients(problem: LossInputs, student: bool, teacher: bool) -> tuple[Tensor, Tensor]:
    """(N, C) each, zero where the network has no term; (0,) where no gradient is wanted."""

    def make(logits: Tensor, wanted: bool, has_term: bool) -> Tensor:
        if not wanted:
            return logits.new_empty(0)
        return logits.new_empty(logits.shape) if has_term else logits.new_zeros(logits.shape)

    with_student, with_teacher = problem.has_terms()
    return make(problem.student, student, with_student), make(
        problem.teacher, teacher, with_teacher
    )


def _laid_out(problem: LossInputs) -> LossInputs:
    """The problem with unit stride in the class dimension and contiguous labels and weights. Copies
    only what is not."""
    student, teacher, target, weight, options, plain, _ = problem
    if weight is not None:
        weight = weight.to(compute_dtype(student, teacher)).contiguous()
    elif _is_dense(student) and _is_dense(teacher) and (target is None or target.is_contiguous()):
        return problem
    if target is not None:
        target = target.contiguous()
    return LossInputs(_unit_stride(student), _unit_stride(teacher), target, weight, options, plain)


def _is_dense(rows: Tensor) -> bool:
    # The first question is the cheapest, and settles most calls.
    return rows.is_contiguous() or rows.stride(1) == 1 or rows.shape[1] == 1


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if _is_dense(rows) else rows.contiguous()


def _unit_stride_buffer(buffer: Tensor | None) -> Tensor | None:
    """The buffer, or if its classes are strided a dense one, to be copied into it later."""
    return buffer if buffer is None or _is_dense(buffer) else buffers.empty_like(buffer)
