"""The shared code of the fused backends: eager calls and torch.library operators.

A backend provides two functions over rows and registers them once::

    _fused = ops.FusedBackend("native", forward, backward, state_rows=0)
    loss, loss_and_grad = _fused.loss, _fused.loss_and_grad

    forward(inputs, grad_scale, gradients, check_labels) -> Outputs(losses, stats, state)
    backward(inputs, state, upstreams, gradients, assumed) -> None

``losses``, ``gradients`` and ``upstreams`` are pairs: student, teacher.

``forward`` returns losses reduced by ``reduction``, in ``compute_dtype``. It writes the gradients
that are not None, (N, C): each network's gradient times ``grad_scale`` (a float, or a 0-dim tensor
on the device). If ``check_labels`` is True, it raises ``ValueError`` for a bad label. If it is
False, or if the labels cannot be read, the row of a bad label is NaN. ``state`` holds the values of
each row that ``backward`` needs.

``backward`` writes the gradients that are not None: each network's gradient times its upstream
gradient (0-dim, or (N,) for ``"none"``). If ``assumed`` is a float or a 0-dim tensor, it is the
``grad_scale`` of the forward pass, and the buffers already hold the gradients times that number.
``backward`` can skip the rows whose upstream gradient equals it. If ``assumed`` is None, the
buffers are uninitialised.

Logits and gradients have unit stride in the class dimension, any row stride, and at least one row.
``target`` and ``sample_weight`` (in ``compute_dtype``) are contiguous. A network without a term
never has a gradient buffer. A buffer may be the logits of its own network. It shares no memory with
other tensors.

There are three paths:

- A plain eager call bypasses the dispatcher. ``forward`` computes the gradients. Each network has
  its own autograd node, so that users can call backward on the two losses separately, in any order.
- A compiled call uses one operator, whose backward computes both gradients from the logits. In
  total, it reads or writes 6 tensors of N x C. Computing the gradients in the forward pass and
  copying them in the backward pass would take 8.
- An eager call under a dispatch mode or with a tensor subclass also uses that operator, once for
  each network.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import define, impl, register_autograd, register_fake

from . import buffers
from .autograd import SavedGradients, connect, double_backward_error
from .checks import check_labels, labels_can_be_read
from .library import NAMESPACE
from .memory import in_memory
from .options import NAMES, STATISTICS, TABLE, LossOptions
from .reference import compute_dtype, savable, write, zero_with_graph
from .types import NONE, BDKDStats, LossInputs, Outputs, Pair, bools, fast_new

Losses = tuple[Pair[Tensor], BDKDStats]
Gradients = Pair[Tensor | None]
Forward = Callable[[LossInputs, float | Tensor, Gradients, bool], Outputs]
Backward = Callable[
    [LossInputs, Tensor | None, Gradients, Gradients, float | Tensor | None],
    None,
]

_INPUT_NAMES = ("student_logits", "teacher_logits", "target", "sample_weight")
_INPUTS = "Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight"
_OPTIONS = ", ".join(
    f"{'str' if option.choices else option.type.__name__} {option.name}" for option in TABLE
)
_FORWARD_SCHEMA = (
    f"({_INPUTS}, Tensor? grad_scale, float grad_scale_value, bool student_grad, "
    f"bool teacher_grad, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    f"(Tensor? student_upstream, Tensor? teacher_upstream, {_INPUTS}, Tensor state, {_OPTIONS})"
    " -> (Tensor, Tensor)"
)


def flat_options(options: LossOptions) -> tuple[Any, ...]:
    """Return the options in the order of the operators' schemas."""
    return tuple(getattr(options, name) for name in NAMES)


class FusedBackend:
    """The ``loss`` and ``loss_and_grad`` of one backend.

    Registers its operators, ``bdkd::NAME_forward`` and ``bdkd::NAME_backward``.
    """

    def __init__(self, name: str, forward: Forward, backward: Backward, state_rows: int) -> None:
        self.name, self.state_rows = name, state_rows
        self._forward, self._backward = forward, backward
        self._register_forward(f"{NAMESPACE}::{name}_forward")
        self._register_backward(f"{NAMESPACE}::{name}_backward")
        operators = getattr(torch.ops, NAMESPACE)
        self.forward_op = getattr(operators, f"{name}_forward").default
        self.backward_op = getattr(operators, f"{name}_backward").default
        self._register_autograd()

    def loss(self, inputs: LossInputs, grad_scale: float | Tensor = 1.0) -> Losses:
        """Return the losses, connected to autograd, and the statistics."""
        terms = inputs.has_terms()
        trained = bools(False, False)
        if torch.is_grad_enabled():
            trained = bools(inputs.student.requires_grad, inputs.teacher.requires_grad)
        needs_grad = bools(terms.student and trained.student, terms.teacher and trained.teacher)
        if inputs.plain:
            losses, stats = self._plain_loss(inputs, grad_scale, needs_grad)
        else:
            losses, stats = self._loss_through_operator(inputs, needs_grad)
        if needs_grad == trained:
            return losses, stats
        student, teacher = losses
        if trained.student and not terms.student:
            student = student + _zero_with_graph(inputs.student, inputs.options)
        if trained.teacher and not terms.teacher:
            teacher = teacher + _zero_with_graph(inputs.teacher, inputs.options)
        return Pair(student, teacher), stats

    def _plain_loss(
        self, inputs: LossInputs, grad_scale: float | Tensor, needs_grad: Pair[bool]
    ) -> Losses:
        if not (needs_grad.student or needs_grad.teacher):
            losses, stats, _ = self.forward(inputs, grad_scale, NONE, True)
            return losses, BDKDStats(stats)
        ds = dt = None  # (N, C)
        if needs_grad.student:
            ds = buffers.empty_rows(inputs.student, inputs.dense)
        if needs_grad.teacher:
            dt = buffers.empty_rows(inputs.teacher, inputs.dense)
        gradients = fast_new(Pair, (ds, dt))
        losses, stats, state = self.forward(inputs, grad_scale, gradients, True)
        call = SavedGradients(self, inputs.options, grad_scale, gradients)
        losses = connect(losses, inputs, (*inputs[:4], state), call, needs_grad)
        return losses, BDKDStats(stats)

    def loss_and_grad(
        self, inputs: LossInputs, grad_scale: float | Tensor, gradients: Gradients
    ) -> Losses:
        """Return the detached :meth:`loss`, and write the gradients, times ``grad_scale``.

        The gradients are written into the buffers that are not None.
        """
        terms, wanted = inputs.has_terms(), gradients
        if not (terms.student and terms.teacher):
            wanted = Pair(*(x if term else None for x, term in zip(gradients, terms, strict=True)))
        if inputs.plain:
            made = _with_unit_stride(wanted)
            losses, stats, _ = self.forward(inputs, grad_scale, made, True)
            # The kernel writes without torch. Raise the versions, so that autograd notices if it
            # has saved one of these tensors.
            _raise_versions([x for x in made if x is not None])
            if made is gradients:
                return losses, BDKDStats(stats)
        else:
            with torch.no_grad():
                losses, stats, made = self._call_forward_op(
                    inputs, grad_scale, Pair(*(x is not None for x in wanted))
                )
        # Write only after the kernel has read its inputs, because a buffer may be the logits.
        for buffer, value, term in zip(gradients, made, terms, strict=True):
            if buffer is not None and value is not buffer:
                write(buffer, value if term and value is not None else 0.0)
        return losses, BDKDStats(stats)

    def forward(
        self, inputs: LossInputs, grad_scale: float | Tensor, gradients: Gradients, check: bool
    ) -> Outputs:
        """Call the backend's forward on contiguous rows; see the docstring of the module."""
        if not inputs.dense:
            if inputs.student.shape[0] == 0:
                return self._empty_outputs(inputs)
            inputs = _laid_out(inputs)
        return self._forward(inputs, grad_scale, gradients, check)

    def backward(
        self,
        inputs: LossInputs,
        state: Tensor | None,
        upstreams: Gradients,
        gradients: Gradients,
        assumed: float | Tensor | None,
    ) -> None:
        """Call the backend's backward on contiguous rows; see the docstring of the module."""
        if inputs.student.shape[0] == 0:
            return
        for name, x in zip(_INPUT_NAMES, inputs[:4], strict=True):
            if x is not None:
                in_memory(name, x)  # the storage may have been freed since the forward pass
        above = (None if x is None else in_memory("the gradient of the loss", x) for x in upstreams)
        self._backward(_laid_out(inputs), state, Pair(*above), gradients, assumed)

    def _empty_outputs(self, inputs: LossInputs) -> Outputs:
        s = inputs.student
        rows, dtype = s.shape[0], compute_dtype(s, inputs.teacher)
        shape = (rows,) if inputs.options.reduction == "none" else ()
        return Outputs(
            Pair(s.new_zeros(shape, dtype=dtype), s.new_zeros(shape, dtype=dtype)),
            s.new_empty((len(STATISTICS), rows), dtype=dtype),
            s.new_empty((self.state_rows, rows), dtype=dtype),
        )

    # -- through torch.library ------------------------------------------------------------------

    def _loss_through_operator(self, inputs: LossInputs, needs_grad: Pair[bool]) -> Losses:
        if labels_can_be_read(inputs.target):
            check_labels(inputs.target, inputs.student.shape[-1], inputs.options.ignore_index)
        if torch.compiler.is_compiling() or not (needs_grad.student and needs_grad.teacher):
            return self._call_once(inputs, needs_grad)
        # Create two nodes: in eager mode, the backward pass of a common node would free the tensors
        # that the other network saved.
        losses, stats = self._call_once(inputs, Pair(True, False))
        (_, teacher), _ = self._call_once(inputs, Pair(False, True))
        return Pair(losses.student, teacher), stats

    def _call_once(self, inputs: LossInputs, needs_grad: Pair[bool]) -> Losses:
        if needs_grad.student or needs_grad.teacher:
            inputs = savable(inputs, logits=True)
        connected = inputs.with_tensors(
            student=inputs.student if needs_grad.student else inputs.student.detach(),
            teacher=inputs.teacher if needs_grad.teacher else inputs.teacher.detach(),
        )
        (student, teacher), stats, _ = self._call_forward_op(connected, 1.0, Pair(False, False))
        losses = Pair(
            student if needs_grad.student else student.detach(),
            teacher if needs_grad.teacher else teacher.detach(),
        )
        return losses, BDKDStats(stats.detach())

    def _call_forward_op(
        self, inputs: LossInputs, grad_scale: float | Tensor, with_gradients: Pair[bool]
    ) -> tuple[Pair[Tensor], Tensor, Gradients]:
        tensor = grad_scale if isinstance(grad_scale, Tensor) else None
        value = 1.0 if isinstance(grad_scale, Tensor) else float(grad_scale)
        student, teacher, stats, _, ds, dt = self.forward_op(
            inputs.student, inputs.teacher, inputs.target, inputs.sample_weight,
            tensor, value, *with_gradients, *flat_options(inputs.options),
        )  # fmt: skip
        return Pair(student, teacher), stats, Pair(ds, dt)

    def _register_forward(self, name: str) -> None:
        define(name, _FORWARD_SCHEMA)

        @impl(name, "default")
        def _(student, teacher, target, weight, scale, value, student_grad, teacher_grad, *options):
            inputs = LossInputs(student, teacher, target, weight, LossOptions(*options))
            terms = inputs.has_terms()
            ds, dt = _gradients(inputs, student_grad, teacher_grad)
            gradients = Pair(
                ds if student_grad and terms.student else None,
                dt if teacher_grad and terms.teacher else None,
            )
            losses, stats, state = self.forward(
                inputs, value if scale is None else scale, gradients, False
            )
            if state is None:
                state = stats.new_empty((0, stats.shape[1]))
            stats = stats.clone(memory_format=torch.contiguous_format)  # may be a view of the state
            return *losses, stats, state.contiguous(), ds, dt

        @register_fake(name)
        def _(student, teacher, target, weight, scale, value, student_grad, teacher_grad, *options):
            inputs = LossInputs(student, teacher, target, weight, LossOptions(*options))
            losses, stats, state = self._empty_outputs(inputs)
            return *losses, stats, state, *_gradients(inputs, student_grad, teacher_grad)

    def _register_backward(self, name: str) -> None:
        define(name, _BACKWARD_SCHEMA)

        @impl(name, "default")
        def _(student_up, teacher_up, student, teacher, target, weight, state, *options):
            inputs = LossInputs(student, teacher, target, weight, LossOptions(*options))
            ds, dt = _gradients(inputs, student_up is not None, teacher_up is not None)
            gradients = Pair(None if student_up is None else ds, None if teacher_up is None else dt)
            self.backward(inputs, state, Pair(student_up, teacher_up), gradients, None)
            return ds, dt

        @register_fake(name)
        def _(student_up, teacher_up, student, teacher, target, weight, state, *options):
            inputs = LossInputs(student, teacher, target, weight, LossOptions(*options))
            return tuple(_gradients(inputs, student_up is not None, teacher_up is not None))

    def _register_autograd(self) -> None:
        def keep(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:4], output[3])
            ctx.options = inputs[-len(NAMES) :]
            ctx.inputs = len(inputs)

        def backward(ctx, student_upstream, teacher_upstream, *_):
            saved = ctx.saved_tensors  # read once: checkpointing unpacks a tensor only once
            student, teacher, target, weight, _ = saved
            options = LossOptions(*ctx.options)
            terms = LossInputs(student, teacher, target, weight, options).has_terms()
            if not (terms.student and ctx.needs_input_grad[0]):
                student_upstream = None
            if not (terms.teacher and ctx.needs_input_grad[1]):
                teacher_upstream = None
            ds, dt = self.backward_op(student_upstream, teacher_upstream, *saved, *ctx.options)
            return (
                None if student_upstream is None else ds,
                None if teacher_upstream is None else dt,
                *(None,) * (ctx.inputs - 2),
            )

        def refuse(ctx, *_):
            raise RuntimeError(double_backward_error(self.name))

        register_autograd(self.forward_op, backward, setup_context=keep)
        register_autograd(self.backward_op, refuse)


def _raise_versions(written: list[Tensor]) -> None:
    try:
        increment_version(written)
    except RuntimeError:  # inference tensors have no version
        increment_version([x for x in written if not x.is_inference()])


def _zero_with_graph(logits: Tensor, options: LossOptions) -> Tensor:
    """Return zero of the shape of a loss, whose gradient is 0 for every logit."""
    rows = zero_with_graph(logits)
    return rows if options.reduction == "none" else rows.sum()


def _gradients(inputs: LossInputs, student: bool, teacher: bool) -> Pair[Tensor]:
    """Allocate the gradients of an operator: (N, C), or (0,) if a gradient is not requested.

    The gradient of a network without a term is zero.
    """

    def make(logits: Tensor, wanted: bool, has_term: bool) -> Tensor:
        if not wanted:
            return logits.new_empty(0)
        return logits.new_empty(logits.shape) if has_term else logits.new_zeros(logits.shape)

    terms = inputs.has_terms()
    return Pair(
        make(inputs.student, student, terms.student), make(inputs.teacher, teacher, terms.teacher)
    )


def _laid_out(inputs: LossInputs) -> LossInputs:
    """Return inputs with unit class stride and contiguous labels and weights, copied if needed."""
    student, teacher, target, weight, options, plain, _ = inputs
    if weight is not None:
        weight = weight.to(compute_dtype(student, teacher)).contiguous()
    elif (
        _has_unit_stride(student) and _has_unit_stride(teacher)
        and (target is None or target.is_contiguous())
    ):  # fmt: skip
        return inputs
    if target is not None:
        target = target.contiguous()
    return LossInputs(_unit_stride(student), _unit_stride(teacher), target, weight, options, plain)


def _has_unit_stride(rows: Tensor) -> bool:
    # The first check is the cheapest and is True in most calls.
    return rows.is_contiguous() or rows.stride(1) == 1 or rows.shape[1] == 1


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if _has_unit_stride(rows) else rows.contiguous()


def _with_unit_stride(gradients: Gradients) -> Gradients:
    """Return the buffers, but a new dense one in place of each with another class stride.

    The caller later copies the values of the new one.
    """
    student, teacher = gradients
    if (student is None or _has_unit_stride(student)) and (
        teacher is None or _has_unit_stride(teacher)
    ):
        return gradients
    return Pair(
        *(x if x is None or _has_unit_stride(x) else buffers.empty_like(x) for x in gradients)
    )
