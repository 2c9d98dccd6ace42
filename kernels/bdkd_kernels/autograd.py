"""The autograd nodes of plain eager calls. They return gradients that the forward pass computed."""

from collections.abc import Sequence
from ctypes import c_float
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import buffers
from ._torch_compat import version
from .options import LossOptions
from .reference import compute_dtype
from .types import LossInputs, Pair, fast_new

if TYPE_CHECKING:
    from .ops import FusedBackend

STUDENT, TEACHER = 0, 1  # indices of a Pair


def connect(
    losses: Pair[Tensor],
    inputs: LossInputs,
    saved: tuple[Tensor | None, ...],  # the first four inputs and the state
    call: "SavedGradients",
    needs_grad: Pair[bool],
) -> Pair[Tensor]:
    """Return the losses, connected to the logits of the networks in ``needs_grad``."""
    student, teacher = losses
    try:
        # Autograd runs the node that was created last first. This is the student's node.
        if needs_grad.teacher:
            teacher = _NetworkLoss.apply(inputs.teacher, (teacher, saved, call, TEACHER))
        if needs_grad.student:
            student = _NetworkLoss.apply(inputs.student, (student, saved, call, STUDENT))
    except RuntimeError:
        # Autograd cannot save inference tensors. They do not need its version check, because only
        # inference mode can change their values.
        if not call.keep_inference_tensors(saved):
            raise
        saved = tuple(None if x is None or x.is_inference() else x for x in saved)
        return connect(losses, inputs, saved, call, needs_grad)
    return fast_new(Pair, (student, teacher))


class SavedGradients:
    """The gradients of one call that are computed but not yet returned. Both nodes share them.

    The forward pass assumes an upstream gradient. If a node receives another one, it recomputes the
    gradients of both networks with it in one pass, because a loss scale that is applied after the
    forward pass usually multiplies both losses. The other node then recomputes its gradient only if
    its own upstream gradient differs from that one.
    """

    __slots__ = ("fused", "gradients", "inference", "made_with", "options")
    gradients: list[Tensor | None]  # of the student and of the teacher
    made_with: list["GradScale"]  # the upstream gradient that each was computed with
    inference: Sequence[Tensor | None] | None  # tensors that autograd cannot save

    def __init__(
        self,
        fused: "FusedBackend",
        options: LossOptions,
        assumed: float | Tensor,
        gradients: Pair[Tensor | None],
    ) -> None:
        self.fused, self.options, self.inference = fused, options, None
        made_with = GradScale(assumed)
        self.gradients, self.made_with = [*gradients], [made_with, made_with]

    def keep_inference_tensors(self, saved: tuple[Tensor | None, ...]) -> bool:
        """Keep the inference tensors among the tensors to save. Return False if there are none.

        Called only after autograd has failed to save the tensors, because checking them takes
        0.6 us per call.
        """
        self.inference = [x if x is not None and x.is_inference() else None for x in saved]
        return any(x is not None for x in self.inference)

    def inputs(self, ctx: Any) -> tuple[LossInputs, Tensor | None]:
        """Return the inputs and the state from the saved tensors of a node."""
        saved = ctx.saved_tensors
        if self.inference is not None:
            saved = [x if k is None else k for x, k in zip(saved, self.inference, strict=True)]
        student, teacher, target, weight, state = saved
        return LossInputs(student, teacher, target, weight, self.options), state

    def gradient(
        self,
        network: int,
        upstream: Tensor,
        ctx: Any,
        unpacked: tuple[LossInputs, Tensor | None] | None = None,  # inputs(ctx), if known
    ) -> Tensor:
        """Return the gradient of one network, and keep no reference to it."""
        # Take the gradient before writing into it, so that no other thread uses it.
        gradient, self.gradients[network] = self.gradients[network], None
        made_with = self.made_with[network]
        try:
            if gradient is not None and made_with.is_like(upstream):
                return gradient
            batched = _is_batched(upstream)
        except RuntimeError:  # .item() of a batched tensor
            batched = _is_batched(upstream)
            if not batched:
                raise
        if batched:  # is_grads_batched=True, jacobian(vectorize=True)
            self.gradients[network] = gradient
            return self._batched_gradient(network, upstream, ctx)
        inputs, state = unpacked or self.inputs(ctx)
        other = 1 - network
        gradients: list[Tensor | None] = [None, None]
        upstreams: list[Tensor | None] = [None, None]
        partner = assumed = None
        if gradient is None:
            gradient = buffers.empty_rows(inputs.logits[network], False)
        else:
            assumed = made_with.scale()
            partner, self.gradients[other] = self.gradients[other], None
            if partner is not None:
                gradients[other], upstreams[other] = partner, upstream
        gradients[network], upstreams[network] = gradient, upstream
        with torch.no_grad():
            self.fused.backward(inputs, state, Pair(*upstreams), Pair(*gradients), assumed)
        if partner is not None:
            self.made_with[other] = GradScale(upstream)
            self.gradients[other] = partner
        return gradient

    def _batched_gradient(self, network: int, upstream: Tensor, ctx: Any) -> Tensor:
        """Return the gradient for a batch of upstream gradients, which a kernel cannot read.

        The gradient is linear in the upstream gradient. So it is computed in ``compute_dtype`` for
        an upstream gradient of 1, multiplied by the batch, and rounded once.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(double_backward_error(self.fused.name))
        inputs, state = self.inputs(ctx)
        dtype = compute_dtype(inputs.student, inputs.teacher)
        storage = inputs.logits[network].dtype
        student, teacher = inputs.student.to(dtype), inputs.teacher.to(dtype)
        inputs = inputs.with_tensors(student=student, teacher=teacher)
        rows = inputs.student.shape[:1] if self.options.reduction == "none" else ()
        gradient = torch.empty_like(inputs.logits[network], memory_format=torch.contiguous_format)
        one = gradient.new_ones(rows)
        pairs = (
            (Pair(one, None), Pair(gradient, None))
            if network == STUDENT
            else (Pair(None, one), Pair(None, gradient))
        )
        self.fused.backward(inputs, state, *pairs, None)
        return (upstream[..., None] * gradient).to(storage)


def _is_batched(upstream: Tensor) -> bool:
    """Whether this is a batch of upstream gradients, whose memory a kernel cannot read."""
    try:
        upstream.untyped_storage()
    except NotImplementedError:
        return True
    return False


class GradScale:
    """The upstream gradient that a gradient was computed with, and its version at that time."""

    __slots__ = ("value", "version")

    def __init__(self, value: float | Tensor) -> None:
        self.value = value
        self.version = 0 if type(value) is float else version(value)

    def scale(self) -> float | Tensor | None:
        """Return the number that a backend may compare with an upstream gradient.

        None if the value is a tensor that was changed later, or a tensor with one number per row.
        """
        if not isinstance(self.value, Tensor):
            return self.value
        return self.value if self.value.ndim == 0 and version(self.value) == self.version else None

    def is_like(self, upstream: Tensor) -> bool:
        """Whether ``upstream`` is this value. Also False if a comparison needs a device sync."""
        if upstream is self.value:  # for example after backward of the sum of both losses
            return version(upstream) == self.version
        scale = self.value if type(self.value) is float else self.scale()
        if scale is None or upstream.ndim != 0 or not upstream.is_cpu:
            return False
        value, assumed = upstream.item(), float(scale)
        if value != assumed and upstream.dtype == torch.float32:
            assumed = c_float(assumed).value  # the loss scale, such as 0.1, was rounded to float32
        if value != assumed:
            return False
        # The upstream gradient of the other network is usually the same tensor.
        self.version = version(upstream)
        self.value = upstream
        return True


class _NetworkLoss(torch.autograd.Function):
    """Connect the loss of one network to its logits.

    The backward pass returns the gradient that the forward pass computed. Each network has its own
    node: with a common node, the backward pass of one loss would also run through the other network
    and free its saved tensors. The first backward returns the gradient and drops its reference,
    because ``AccumulateGrad`` clones a gradient that has other references. A second backward
    (``retain_graph=True``) recomputes the gradient from the saved logits.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, known: tuple[Tensor, tuple, SavedGradients, int]) -> Tensor:
        # The loss is in a tuple, because autograd would return a tensor argument as a view.
        loss, saved, ctx.call, ctx.network = known
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        call = ctx.call
        if not torch.is_grad_enabled():
            return call.gradient(ctx.network, upstream, ctx), None
        # create_graph=True: raise an error only if the second derivative is computed. Unpack the
        # saved tensors once, because checkpointing does not allow it twice.
        unpacked = call.inputs(ctx)
        gradient = call.gradient(ctx.network, upstream, ctx, unpacked)
        gradient = _NoDoubleBackward.apply(*unpacked[0].logits, upstream, gradient, call.fused.name)
        return gradient, None


class _NoDoubleBackward(torch.autograd.Function):
    """Return the gradient, and raise an error if it is differentiated again."""

    @staticmethod
    def forward(
        ctx, student: Tensor, teacher: Tensor, upstream: Tensor, gradient: Tensor, backend: str
    ) -> Tensor:
        ctx.backend = backend
        return gradient.detach()

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(double_backward_error(ctx.backend))


def double_backward_error(backend: str) -> str:
    return f"the {backend} backend has no double backward: use backend='reference' for it"
