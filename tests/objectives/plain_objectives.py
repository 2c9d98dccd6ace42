"""Independent float64 implementations of all objectives in plain PyTorch, written from the papers.

Sources: BD-KD arXiv 2212.12965 (with several partners: their mean); KD arXiv 1503.02531; DML
arXiv 1706.00384; KDCL, CVPR 2020; SwitOKD arXiv 2209.04996; logit standardisation arXiv 2403.01427;
DKD arXiv 2203.08679.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Logits = dict[str, Tensor]

_WEIGHTS = {"student_ce": 1.0, "student_kd": 1.0, "teacher_ce": 1.0, "teacher_kd": 1.0}
_ONLINE = {"temperature": 1.0, "label_smoothing": 0.0, **_WEIGHTS}
DEFAULTS = {
    "bdkd": {
        **_ONLINE, "gamma": 2.0, "soften_entropy": True, "teacher_divergence": "reverse",
        "student_divergence": "both", "weighting": "entropy",
    },
    "dml": _ONLINE,
    "dkd": {
        "temperature": 4.0, "student_ce": 1.0, "target_kd": 1.0, "other_kd": 8.0, "warmup": 20.0,
        "label_smoothing": 0.0,
    },
    "independent": {"label_smoothing": 0.0},
    "kd": {"temperature": 4.0, "label_smoothing": 0.0, "student_ce": 0.1, "student_kd": 0.9},
    "kdcl": {**_ONLINE, "ensemble": "minlogit"},
    "lskd": {"temperature": 2.0, "label_smoothing": 0.0, "student_ce": 0.1, "student_kd": 9.0},
    "switokd": _ONLINE,
}  # fmt: skip


def probabilities(target: Tensor, classes: int) -> Tensor:
    """Return labels (B,) or soft labels (B, C) as probabilities (B, C)."""
    return target if target.ndim == 2 else torch.eye(classes, dtype=torch.float64)[target]


def cross_entropy(x: Tensor, target: Tensor, smoothing: float) -> Tensor:  # (B,)
    q = probabilities(target, x.shape[-1])
    q = (1 - smoothing) * q + smoothing / x.shape[-1]
    return -(q * F.log_softmax(x, -1)).sum(-1)


def kl(p: Tensor, q: Tensor, tau: float) -> Tensor:  # (B,)
    """Return KL(softmax(p / tau) || softmax(q / tau))."""
    log_p, log_q = F.log_softmax(p / tau, -1), F.log_softmax(q / tau, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def entropy(x: Tensor, tau: float) -> Tensor:  # (B,)
    p = F.softmax(x / tau, -1)
    return -(p * p.log()).sum(-1)


def weights(s: Tensor, t: Tensor, o: dict) -> tuple[Tensor, Tensor]:
    """Return the weights of each sample's forward and reverse KL, from the entropy gap."""
    tau = o["temperature"] if o["soften_entropy"] else 1.0
    gap = entropy(t, tau) - entropy(s, tau)
    gap[gap.abs() < 1e-12] = 0.0
    forward = torch.ones_like(gap).masked_fill(gap > 0, o["gamma"])
    reverse = torch.ones_like(gap).masked_fill(gap < 0, o["gamma"])
    return forward.detach(), reverse.detach()


def bdkd(x: Logits, target: Tensor, o: dict) -> Logits:
    students = [name for name in x if name[0] == "s"]
    teachers = [name for name in x if name[0] == "t"]
    tau, losses = o["temperature"], {}
    for student in students:
        rows = []
        for partner in teachers or [peer for peer in students if peer != student]:
            s, t = x[student], x[partner].detach()
            d1, d2 = weights(s, t, o)
            if o["weighting"] == "swapped":
                d1, d2 = d2, d1
            divergence = torch.zeros_like(d1)
            if o["student_divergence"] in ("both", "forward"):
                divergence = divergence + d1 * kl(t, s, tau)
            if o["student_divergence"] in ("both", "reverse"):
                divergence = divergence + d2 * kl(s, t, tau)
            hard = cross_entropy(s, target, o["label_smoothing"])
            rows.append(o["student_ce"] * hard + o["student_kd"] * tau**2 * divergence)
        losses[student] = torch.stack(rows).mean(0)
    for teacher in teachers:
        rows = []
        for student in students:
            t, s = x[teacher], x[student].detach()
            soft = kl(s, t, tau) if o["teacher_divergence"] == "reverse" else kl(t, s, tau)
            hard = cross_entropy(t, target, o["label_smoothing"])
            rows.append(o["teacher_ce"] * hard + o["teacher_kd"] * tau**2 * soft)
        losses[teacher] = torch.stack(rows).mean(0)
    return losses


def learns_from(name: str, partners: list[Tensor], x: Logits, target: Tensor, o: dict) -> Tensor:
    """Return the cross entropy of a network plus its mean divergence from its partners, with the
    weights of the network's role."""
    role = {"s": "student", "t": "teacher"}[name[0]]
    tau = o["temperature"]
    soft = torch.stack([kl(partner.detach(), x[name], tau) for partner in partners]).mean(0)
    hard = cross_entropy(x[name], target, o["label_smoothing"])
    return o[f"{role}_ce"] * hard + o[f"{role}_kd"] * tau**2 * soft


def kd(x: Logits, target: Tensor, o: dict) -> Logits:
    teachers = [logits for name, logits in x.items() if name[0] == "t"]
    return {name: learns_from(name, teachers, x, target, o) for name in x if name[0] == "s"}


def standardised(x: Tensor) -> Tensor:
    """Return the z-scores of each row."""
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)
    return centred / (variance.sqrt() + 1e-7)


def lskd(x: Logits, target: Tensor, o: dict) -> Logits:
    teachers = [standardised(logits.detach()) for name, logits in x.items() if name[0] == "t"]
    losses = {}
    for name in (name for name in x if name[0] == "s"):
        rows = [kl(teacher, standardised(x[name]), o["temperature"]) for teacher in teachers]
        hard = cross_entropy(x[name], target, o["label_smoothing"])
        soft = o["temperature"] ** 2 * torch.stack(rows).mean(0)
        losses[name] = o["student_ce"] * hard + o["student_kd"] * soft
    return losses


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of two distributions (K,)."""
    return (p * (p / q).log()).sum()


def decoupled(s: Tensor, t: Tensor, label: int, tau: float) -> tuple[Tensor, Tensor]:
    """Return TCKD and NCKD of one sample with logits (C,): equations 1 to 6 of DKD."""
    p_s, p_t = F.softmax(s / tau, -1), F.softmax(t / tau, -1)
    others = [c for c in range(len(s)) if c != label]
    b_s, b_t = (torch.stack([p[label], p[others].sum()]) for p in (p_s, p_t))
    q_s, q_t = (p[others] / p[others].sum() for p in (p_s, p_t))
    return divergence(b_t, b_s), divergence(q_t, q_s)


def dkd(x: Logits, target: Tensor, o: dict) -> Logits:
    """Return the loss after the warm-up."""
    teachers = [logits.detach() for name, logits in x.items() if name[0] == "t"]
    labels = (target.argmax(-1) if target.ndim == 2 else target).tolist()
    losses = {}
    for name in (name for name in x if name[0] == "s"):
        rows = []
        for t in teachers:
            pairs = zip(x[name], t, labels, strict=True)
            parts = [decoupled(s, own, label, o["temperature"]) for s, own, label in pairs]
            rows.append(torch.stack([o["target_kd"] * a + o["other_kd"] * b for a, b in parts]))
        hard = cross_entropy(x[name], target, o["label_smoothing"])
        soft = o["temperature"] ** 2 * torch.stack(rows).mean(0)
        losses[name] = o["student_ce"] * hard + soft
    return losses


def dml(x: Logits, target: Tensor, o: dict) -> Logits:
    return {
        name: learns_from(name, [x[peer] for peer in x if peer != name], x, target, o) for name in x
    }


def kdcl(x: Logits, target: Tensor, o: dict) -> Logits:
    ensemble = []
    for i, q in enumerate(probabilities(target, next(iter(x.values())).shape[-1])):
        rows = [logits[i] for logits in x.values()]
        if o["ensemble"] == "naive":
            ensemble.append(min(rows, key=lambda row: -(q * F.log_softmax(row, -1)).sum().item()))
        else:
            label = int(q.argmax())
            ensemble.append(torch.stack([row - row[label] for row in rows]).min(0).values)
    target_logits = torch.stack(ensemble)
    return {name: learns_from(name, [target_logits], x, target, o) for name in x}


def independent(x: Logits, target: Tensor, o: dict) -> Logits:
    return {name: cross_entropy(logits, target, o["label_smoothing"]) for name, logits in x.items()}


def switokd_distances(x: Logits, target: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return L1 distances (B,): student to label, teacher to label, student to teacher."""
    (s,), (t,) = ([v for name, v in x.items() if name[0] == role] for role in "st")
    p_s, p_t = F.softmax(s / tau, -1), F.softmax(t / tau, -1)
    y = probabilities(target, s.shape[-1])
    return (p_s - y).abs().sum(-1), (p_t - y).abs().sum(-1), (p_s - p_t).abs().sum(-1)


def switokd_teacher_pauses(a: float, b: float, g: float) -> bool:
    """Return whether the teacher pauses, as section 3 of the paper defines: it is better than the
    student, and the gap exceeds the adaptive threshold."""
    return b < a and g > a - math.exp(-b / (a + b)) * b


METHODS: dict[str, Callable[[Logits, Tensor, dict], Logits]] = {
    "bdkd": bdkd, "dkd": dkd, "dml": dml, "independent": independent, "kd": kd, "kdcl": kdcl,
    "lskd": lskd,
    "switokd": dml,  # without pauses: each of two networks learns from the other
}  # fmt: skip
