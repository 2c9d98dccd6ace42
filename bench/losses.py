"""The computations of the loss suites, their contenders and their float64 references.

They are the same on CPU and GPU. There are five computations. Each has a contender of ours that
does only this computation, as nearly as it can:

``both``      both losses and both gradients, as in a training step of BD-KD
``forward``   both losses without gradients, as in validation
``kd``        the student's divergence from a fixed teacher, one gradient, as in Liger's KLDiv, JSD
``ce``        the cross entropies of both networks, both gradients, as in Quack and apex
``heads``     ``both``, from hidden states through two linear heads, as in orda-kernel
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from bdkd_kernels import BDKDOutput, bdkd_loss, bdkd_loss_and_grad, buffers
from harness import Case, Contender, MakeCase
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
WORKS = ("both", "forward", "kd", "ce", "heads")
GAMMA = 2.0  # the default of bdkd_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student, teacher, labels -> one number


@dataclass(frozen=True)
class Size:
    rows: int
    classes: int
    dtype: str = "fp32"
    temperature: float = 4.0

    def __str__(self) -> str:
        return f"{self.rows} x {self.classes} {self.dtype} tau {self.temperature:g}"


class Inputs(NamedTuple):
    student: Tensor  # (N, C), a leaf tensor, as is the teacher
    teacher: Tensor
    labels: Tensor  # (N,)
    into: tuple[Tensor, Tensor]  # gradient buffers


def buffer_sets(bytes_a_set: int, cache: int) -> int:
    """Return the number of buffer sets, so that all sets together have twice the size of the
    last-level cache. At least 2 and at most 512."""
    return min(512, max(2, -(-2 * cache // bytes_a_set)))


def draw(size: Size, device: str, seed: int, teacher_learns: bool) -> Inputs:
    """Return inputs as in training: related logits of both networks with a spread of 2."""
    rng = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[size.dtype]
    shape = (size.rows, size.classes)
    s = torch.randn(shape, generator=rng, device=device).mul_(2.0)
    t = torch.randn(shape, generator=rng, device=device).mul_(2.0).add_(s, alpha=0.5)
    y = torch.randint(size.classes, (size.rows,), generator=rng, device=device)
    s, t = s.to(dtype), t.to(dtype)
    buffers = (torch.empty_like(s), torch.empty_like(t))
    return Inputs(s.requires_grad_(), t.requires_grad_(teacher_learns), y, buffers)


# Eager PyTorch with torch.nn.functional, as in other distillation repositories.


def plain_rows(
    s: Tensor, t: Tensor, y: Tensor, temperature: float, gamma: float = GAMMA
) -> tuple[Tensor, Tensor]:
    """Return BD-KD's two losses of every sample, in eager PyTorch."""
    s, t = s.float(), t.float()
    log_s, log_t = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    fixed_s, fixed_t = log_s.detach(), log_t.detach()
    entropy_s = -(fixed_s.exp() * fixed_s).sum(-1)
    entropy_t = -(fixed_t.exp() * fixed_t).sum(-1)
    d1 = torch.where(entropy_t > entropy_s, gamma, 1.0)
    d2 = torch.where(entropy_s > entropy_t, gamma, 1.0)
    forward = F.kl_div(log_s, fixed_t, reduction="none", log_target=True).sum(-1)
    reverse = F.kl_div(fixed_t, log_s, reduction="none", log_target=True).sum(-1)
    regulariser = F.kl_div(log_t, fixed_s, reduction="none", log_target=True).sum(-1)
    student = F.cross_entropy(s, y, reduction="none") + temperature**2 * (
        d1 * forward + d2 * reverse
    )
    teacher = F.cross_entropy(t, y, reduction="none") + temperature**2 * regulariser
    return student, teacher


def plain(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> Tensor:
    student, teacher = plain_rows(s, t, y, temperature)
    return student.mean() + teacher.mean()


def plain_kl(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Return Hinton's term KL(p_t || p_s), in eager PyTorch."""
    log_s = F.log_softmax(s.float() / temperature, -1)
    log_t = F.log_softmax(t.float() / temperature, -1)
    kl = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    return temperature**2 * kl


def plain_jsd(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Return the Jensen-Shannon divergence as Liger defines it (beta 0.5), in eager PyTorch."""
    log_s = F.log_softmax(s.float() if s.dtype != torch.float64 else s, -1)
    log_t = F.log_softmax(t.float() if t.dtype != torch.float64 else t, -1)
    log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0, device=s.device))
    to_m = [(x.exp() * (x - log_m)).sum(-1).mean() for x in (log_s, log_t)]
    return 0.5 * (to_m[0] + to_m[1])


def plain_ce(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(s.float(), y) + F.cross_entropy(t.float(), y)


def ours(temperature: float, backend: str = "auto", **weights: float) -> Loss:
    def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = bdkd_loss(s, t, y, temperature=temperature, gamma=GAMMA, backend=backend, **weights)
        return out.student + out.teacher

    return loss


_NO_CE = {"student_ce": 0.0, "teacher_ce": 0.0, "teacher_kd": 0.0}
_NO_KD = {"student_kd": 0.0, "teacher_kd": 0.0}


class Race:
    """The contenders of one computation at one size, with rotating buffer sets."""

    def __init__(self, size: Size, work: str, device: str, cache: int, sweep: bool = False) -> None:
        self.size, self.work, self.device, self.sweep = size, work, device, sweep
        unit = size.rows * size.classes * DTYPES[size.dtype].itemsize
        self.unit = unit
        learns = work in ("both", "ce")
        # One set for the heads: their time is dominated by matrix products, not memory traffic.
        count = 1 if work == "heads" else buffer_sets(4 * unit, cache)
        self.inputs = [draw(size, device, seed, learns) for seed in range(count)]
        self.leaves: list[Tensor] = []  # other leaf tensors that accumulate gradients

    def drop(self) -> None:
        """Drop the gradients that calls have left."""
        for x in (*(x for set_ in self.inputs for x in set_[:2]), *self.leaves):
            x.grad = None

    def forget(self) -> None:
        """Drop the gradients and return their memory to the device. Otherwise the next call would
        reuse it, and its bytes would not be counted."""
        self.drop()
        buffers.release()

    def step(self, loss: Loss) -> Callable[[int], object]:
        """Return a call that computes the loss and ``backward()`` with new gradients."""

        def call(i: int) -> Tensor:
            s, t, y, _ = self.inputs[i]
            s.grad = t.grad = None
            total = loss(s, t, y)
            total.backward()
            return total.detach()

        return call

    def at_once(self, i: int) -> BDKDOutput:
        s, t, y, into = self.inputs[i]
        out, _ = bdkd_loss_and_grad(s, t, y, temperature=self.size.temperature, gamma=GAMMA,
                                    grads=into)  # fmt: skip
        return out  # the losses are not added, because that would be one more launch

    def copy(self, i: int) -> None:
        s, t, _, into = self.inputs[i]
        into[0].copy_(s.detach())
        into[1].copy_(t.detach())

    def without_gradient(self, loss: Loss) -> Callable[[int], object]:
        def call(i: int) -> Tensor:
            s, t, y, _ = self.inputs[i]
            with torch.no_grad():
                return loss(s, t, y)

        return call

    def error(self, call: Callable[[int], object], truth: Loss) -> Callable[[], Mapping]:
        """Return a function that measures the relative error of the loss, and the largest error of
        a gradient over its largest entry."""

        def measure() -> dict[str, float]:
            self.forget()
            total = call(0)
            if isinstance(total, BDKDOutput):
                total = total.student + total.teacher
            assert isinstance(total, Tensor)
            x = self.inputs[0]
            got = [x.student.grad, x.teacher.grad]
            if got == [None, None] and call == self.at_once:
                got = list(x.into)
            # In parts, because float64 autograd of a large batch does not fit into memory.
            exact, worst = 0.0, [0.0, 0.0]
            largest = [0.0, 0.0]
            rows = max(1, 2**23 // self.size.classes)
            for part in torch.arange(self.size.rows, device=self.device).split(rows):
                logits = [v[part].detach().double() for v in x[:2]]
                for v, gradient in zip(logits, got, strict=True):
                    v.requires_grad_(gradient is not None)
                right = truth(*logits, x.labels[part]) * (len(part) / self.size.rows)
                exact += right.item()
                if right.requires_grad:
                    right.backward()
                for i, (v, gradient) in enumerate(zip(logits, got, strict=True)):
                    if gradient is not None and v.grad is not None:
                        off = (gradient[part].double() - v.grad).abs().max().item()
                        worst[i] = max(worst[i], off)
                        largest[i] = max(largest[i], v.grad.abs().max().item())
            errors = {"loss": abs(total.item() - exact) / abs(exact)}
            if any(largest):
                errors["gradient"] = max(
                    off / most for off, most in zip(worst, largest, strict=True) if most
                )
            self.forget()
            return errors

        return measure

    def contender(
        self, name: str, loss: Loss, truth: Loss, kind="peer", note: str = "", units: int = 4,
        capturable: bool = True,
    ) -> Contender:  # fmt: skip
        gradient = self.work != "forward"
        call = self.step(loss) if gradient else self.without_gradient(loss)
        return Contender(name, call, kind, units * self.unit, note, self.error(call, truth),
                         capturable)  # fmt: skip

    def limit(self) -> Contender:
        return Contender("copy of both logits", self.copy, "limit", 4 * self.unit)


def cases(
    sizes: Mapping[str, list[Size]],
    device: str,
    cache: int,
    modes: tuple[str, ...] = MODES[:1],
    sweep: bool = False,
) -> list[MakeCase]:
    """Return a case for each computation and size.

    Args:
        modes: modes of torch.compile.
        sweep: whether the cases are a sweep over the number of classes, to be drawn as a picture.
    """
    return [
        functools.partial(_case, work, size, device, cache, modes, sweep)
        for work, its_sizes in sizes.items()
        for size in its_sizes
    ]


def _case(
    work: str, size: Size, device: str, cache: int, modes: tuple[str, ...], sweep: bool
) -> Case:
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
    race = Race(size, work, device, cache, sweep)
    contenders, absent = _MAKERS[work](race, modes)
    return Case(
        f"{work}: {size}",
        {"work": work, "rows": size.rows, "classes": size.classes, "dtype": size.dtype,
         "temperature": size.temperature, "sweep": sweep},
        tuple(contenders), len(race.inputs), absent, race.forget, race.drop, device=device,
        caches=caches(len(race.inputs), 4 * race.unit, cache),
    )  # fmt: skip


def caches(sets: int, set_bytes: int, cache: int) -> dict[str, str]:
    """Return the measurements of a case by name, and where each one's inputs are."""
    if sets == 1:  # "heads", which uses the same weights in every call
        return {"hot": "the same inputs and weights in every call"}
    from_memory = sets * set_bytes >= 2 * cache
    return {
        "cold": "inputs from memory" if from_memory else f"inputs of {sets} sets in turn",
        "hot": "inputs in cache"
        if set_bytes <= cache
        else "the same inputs, larger than the cache",
    }


def _compiled(loss: Loss, mode: str) -> Loss:
    return torch.compile(loss, mode=mode, fullgraph=True, dynamic=False)


def _compiles(race: Race, loss: Loss, truth: Loss, modes: tuple[str, ...], units: int = 4, note=""):
    # A CUDA graph cannot be captured into another one, and a CPU has no CUDA graphs.
    return [
        race.contender(
            f"torch.compile {mode}",
            _compiled(loss, mode),
            truth,
            units=units,
            note=note,
            capturable=mode != "reduce-overhead",
        )
        for mode in modes
    ]


def _both(race: Race, modes: tuple[str, ...]):
    tau = race.size.temperature
    truth = ours(tau, "reference")
    eager = functools.partial(plain, temperature=tau)
    no_stats = "no statistics of the samples"
    found = [
        race.limit(),
        race.contender("bdkd_loss, backward", ours(tau), truth, "ours"),
        Contender("bdkd_loss_and_grad", race.at_once, "ours", 4 * race.unit, "no autograd",
                  race.error(race.at_once, truth)),
        race.contender("eager", eager, truth, note=no_stats),
        race.contender("eager, our reference", ours(tau, "reference"), truth),
        *_compiles(race, eager, truth, modes, note=no_stats),
    ]  # fmt: skip
    if race.size.dtype == "fp32" and not race.sweep:  # each compilation takes seconds
        compiled = _compiled(ours(tau, "reference"), "default")
        found.append(race.contender("torch.compile of our reference", compiled, truth))
    return found, {}


def _forward(race: Race, modes: tuple[str, ...]):
    tau = race.size.temperature
    truth = ours(tau, "reference")
    eager = functools.partial(plain, temperature=tau)
    found = [
        race.limit(),
        race.contender("bdkd_loss", ours(tau), truth, "ours", units=2),
        race.contender("eager", eager, truth, units=2, note="no statistics of the samples"),
        *_compiles(race, eager, truth, modes, 2, "no statistics of the samples"),
    ]
    return found, {}


def _kd(race: Race, modes: tuple[str, ...]):
    tau = race.size.temperature
    eager = functools.partial(plain_kl, temperature=tau)
    kl = functools.partial(_kl_in_float64, temperature=tau)
    found = [
        race.limit(),
        race.contender("bdkd_loss, student's KD alone", ours(tau, **_NO_CE),
                       ours(tau, "reference", **_NO_CE), "ours", units=3,
                       note="computes both divergences, weighted; the peers compute one"),
        race.contender("eager KL", eager, kl, units=3),
        *_compiles(race, eager, kl, modes, 3, "one divergence"),
    ]  # fmt: skip
    absent = {}
    if reason := _no_triton_peer("liger_kernel", race.device):
        absent = dict.fromkeys(("Liger KLDiv", "Liger JSD"), reason)
    else:
        from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

        kl_div, jsd = LigerKLDIVLoss(reduction="batchmean", log_target=True), LigerJSD()

        def liger_kl(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return tau**2 * kl_div(F.log_softmax(s.float() / tau, -1),
                                   F.log_softmax(t.float() / tau, -1))  # fmt: skip

        def liger_jsd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return jsd(F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1))

        found += [
            race.contender("Liger KLDiv", liger_kl, kl, units=3,
                           note="one divergence; torch's log-softmaxes before it"),
            race.contender("Liger JSD", liger_jsd, functools.partial(plain_jsd, temperature=1.0),
                           units=3, capturable=False,  # it reads values from the device
                           note="JSD at temperature 1; torch's log-softmaxes before it"),
        ]  # fmt: skip
    return found, absent


def _kl_in_float64(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> Tensor:
    log_s, log_t = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    kl = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    return temperature**2 * kl


def _ce_in_float64(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(s, y) + F.cross_entropy(t, y)


def _ce(race: Race, modes: tuple[str, ...]):
    eager = functools.partial(plain_ce, temperature=1.0)
    found = [
        race.limit(),
        race.contender("bdkd_loss, cross entropies alone", ours(1.0, **_NO_KD), _ce_in_float64,
                       "ours"),
        race.contender("eager", eager, _ce_in_float64),
        *_compiles(race, eager, _ce_in_float64, modes),
    ]  # fmt: skip
    absent = {}
    if reason := _no_triton_peer("quack", race.device):
        absent["Quack cross entropy"] = reason
    else:
        from quack.cross_entropy import cross_entropy

        def quack(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(s, y, reduction="mean") + cross_entropy(t, y, reduction="mean")

        found.append(race.contender("Quack cross entropy", quack, _ce_in_float64))
    if reason := _no_triton_peer("apex.contrib.xentropy", race.device):
        absent["apex xentropy"] = reason
    else:
        from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

        def apex(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            # No label smoothing, no padding label (-1 disables it), losses in float32.
            return sum(
                SoftmaxCrossEntropyLoss.apply(x, y, 0.0, -1, x.dtype != torch.float32).mean()
                for x in (s, t)
            )

        found.append(race.contender("apex xentropy", apex, _ce_in_float64))
    return found, absent


def _no_triton_peer(module: str, device: str) -> str | None:
    """Return why a package with GPU kernels cannot run on this machine, or None if it can."""
    if device != "cuda":
        return "its kernels need a GPU"
    try:
        found = find_spec(module)
    except ModuleNotFoundError:  # its parent package is missing
        found = None
    return None if found else f"{module.split('.')[0]} is not installed"


def _heads(race: Race, modes: tuple[str, ...]):
    """Return contenders that compute gradients of the hidden states (N, H) and of the weights of
    the heads (C, H) of both networks."""
    size, device = race.size, race.device
    tau, dtype = size.temperature, DTYPES[size.dtype]
    hidden = max(64, min(1024, size.classes // 4))
    rng = torch.Generator(device).manual_seed(0)

    def leaf(*shape: int, scale: float) -> Tensor:
        x = torch.randn(shape, generator=rng, device=device).mul_(scale)
        return x.to(dtype).requires_grad_()

    leaves = race.leaves = [
        leaf(size.rows, hidden, scale=1.0), leaf(size.classes, hidden, scale=2 / hidden**0.5),
        leaf(size.rows, hidden, scale=1.0), leaf(size.classes, hidden, scale=2 / hidden**0.5),
    ]  # fmt: skip
    labels = race.inputs[0].labels

    def step(loss: Callable[..., Tensor]) -> Callable[[int], object]:
        def call(i: int) -> Tensor:
            for x in leaves:
                x.grad = None
            total = loss(*leaves)
            total.backward()
            return total.detach()

        return call

    def through(loss: Loss):
        return lambda h_s, w_s, h_t, w_t: loss(F.linear(h_s, w_s), F.linear(h_t, w_t), labels)

    note = f"with two heads from {hidden} hidden"
    found = [
        Contender("two linear, bdkd_loss", step(through(ours(tau))), "ours", note=note),
        Contender("two linear, eager", step(through(functools.partial(plain, temperature=tau))),
                  note=note),
    ]  # fmt: skip
    absent = {}
    if find_spec("orda_kernel") is None:
        absent["orda-kernel"] = "orda-kernel is not installed"
    else:
        from orda_kernel import SeparateTeacher, distillation_loss

        def orda(h_s, w_s, h_t, w_t):
            return distillation_loss(
                h_s, w_s, labels, SeparateTeacher(h_t, w_t), student_ce_weight=1.0,
                teacher_ce_weight=1.0, kl_weight=1.0, kl_temperature=tau, kl_divergence="mutual",
                backend="triton" if device == "cuda" else "torch",
            ).loss  # fmt: skip

        fallback = "" if device == "cuda" else "its eager fallback: its kernels need a GPU; "
        found.append(
            Contender("orda-kernel, mutual", step(orda), capturable=False,
                      note=fallback + "no reverse KL of the student, no weights, no statistics")
        )  # fmt: skip
    return found, absent


_MAKERS = {"both": _both, "forward": _forward, "kd": _kd, "ce": _ce, "heads": _heads}
