"""The cards of docs/how-to/migrate.md change at most three lines and no value and no gradient.

Libraries that are not installed here are replaced by modules with their public formulas.
"""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from vision import mended_torchvision

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "migrate.md").read_text("utf-8")
CARDS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.split("(then-change")[0], re.M | re.S)
DIFFS = [
    pytest.param(title, diff, id=f"{title}-{number}")
    for title, text in CARDS
    for number, diff in enumerate(re.findall(r"^```diff\n(.*?)^```", text, re.M | re.S))
]


class DistillKL(nn.Module):
    """RepDistiller's formula: the sum of all terms, times T^2, divided by the number of rows."""

    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, y_s, y_t):
        p = F.softmax(y_t / self.T, dim=1)
        return self.T**2 * (p * (p.log() - F.log_softmax(y_s / self.T, dim=1))).sum() / len(y_s)


def kd_loss(logits_student, logits_teacher, temperature):
    """mdistiller's formula: the mean over the rows."""
    p = F.softmax(logits_teacher / temperature, dim=1)
    log_q = F.log_softmax(logits_student / temperature, dim=1)
    return (p * (p.log() - log_q)).sum(1).mean() * temperature**2


def jsd(log_q, log_p, beta):
    """The generalised Jensen-Shannon divergence of each row, as Liger and TRL define it."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return (p * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (q * (log_q - log_p)).sum(-1)
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)


class LigerJSD(nn.Module):
    def __init__(self, beta, ignore_index):
        super().__init__()
        self.beta, self.ignore_index = beta, ignore_index

    def forward(self, log_q, log_p, labels):
        return jsd(log_q, log_p, self.beta)[labels != self.ignore_index].mean()


class LigerKLDIVLoss(nn.KLDivLoss):
    """Liger's module has the arguments of torch's, for these options."""


class KDLoss(nn.Module):
    """torchdistill's formula."""

    def __init__(self, student, student_io, teacher, teacher_io, temperature, alpha):
        super().__init__()
        self.paths = (student, student_io), (teacher, teacher_io)
        self.temperature, self.alpha = temperature, alpha

    def forward(self, student_io_dict, teacher_io_dict, targets):
        (student, student_io), (teacher, teacher_io) = self.paths
        s, t = student_io_dict[student][student_io], teacher_io_dict[teacher][teacher_io]
        soft = kd_loss(s, t, self.temperature)
        return self.alpha * F.cross_entropy(s, targets) + (1 - self.alpha) * soft


class GKDTrainer:
    @staticmethod
    def generalized_jsd_loss(student_logits, teacher_logits, labels, beta):
        """TRL's formula: the sum over the vocabulary, the mean over the tokens with a label."""
        rows = jsd(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), beta)
        return rows[labels != -100].mean()


MODULES = {
    "distiller_zoo": {"DistillKL": DistillKL},
    "mdistiller": {}, "mdistiller.distillers": {}, "mdistiller.distillers.KD": {"kd_loss": kd_loss},
    "liger_kernel": {},
    "liger_kernel.transformers": {"LigerJSD": LigerJSD, "LigerKLDIVLoss": LigerKLDIVLoss},
}  # fmt: skip


@pytest.fixture
def peers(monkeypatch):
    for name, content in MODULES.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def timm_task(student, teacher):
    """timm's own task, on networks that only flatten the image and multiply it by a matrix."""
    mended_torchvision()
    from timm.task import LogitDistillationTask

    for network in (student, teacher):
        network.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
        network.num_classes, network.in_chans = 11, 1
    return LogitDistillationTask(
        student, teacher, criterion=nn.CrossEntropyLoss(), task_loss_weight=0.1,
        distill_loss_weight=0.9, temperature=4.0, verbose=False,
    )  # fmt: skip


def run(title: str, lines: list[str]) -> tuple[float, torch.Tensor]:
    """Run one version of a card; return its loss and the gradient of the student."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 5) if title == "TRL" else (15,)
    images = torch.randn(*shape, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, shape, generator=generator)
    if title in ("TRL", "Liger-Kernel"):
        labels.flatten()[::4] = -100
    student, teacher = (nn.Linear(6, 11, dtype=torch.float64) for _ in range(2))
    for network in (student, teacher):
        weights = torch.randn(11, 6, generator=generator, dtype=torch.float64)
        network.load_state_dict({"weight": weights, "bias": weights.sum(1)})
    s, t = student(images), teacher(images).detach()
    names = {
        "torch": torch, "F": F, "s": s, "t": t, "y": labels, "images": images,
        "student_io_dict": {".": {"output": s}}, "teacher_io_dict": {".": {"output": t}},
        "GKDTrainer": GKDTrainer, "KDLoss": KDLoss,
    }  # fmt: skip
    if title == "torchdistill":
        exec("from bdkd import kd_loss", names)
    if title == "timm":
        names["task"] = timm_task(student, teacher)
    exec("\n".join(lines), names)
    loss = names["loss"]
    (gradient,) = torch.autograd.grad(loss, student.weight)
    return loss.item(), gradient


@pytest.mark.parametrize(("title", "diff"), DIFFS)
def test_a_card_changes_at_most_three_lines_and_no_value(title, diff, peers):
    lines = diff.splitlines()
    assert {line[0] for line in lines} <= set(" +-")
    removed, added = (sum(line[0] == sign for line in lines) for sign in "-+")
    assert 1 <= removed <= 3
    assert 1 <= added <= 3
    before, after = (
        run(title, [line[1:] for line in lines if line[0] in (" ", sign)]) for sign in "-+"
    )
    assert before[0] > 0.1
    assert after[0] == pytest.approx(before[0], rel=1e-9)
    torch.testing.assert_close(after[1], before[1], rtol=1e-7, atol=1e-9)


def test_the_page_has_a_card_for_every_peer():
    titles = [title for title, _ in CARDS]
    assert titles == [
        "RepDistiller", "mdistiller", "Liger-Kernel", "F.kl_div", "timm", "torchdistill", "TRL",
    ]  # fmt: skip
    assert len(DIFFS) == 8


def test_the_step_to_bdkd_runs_and_changes_the_value(peers):
    (diff,) = re.findall(r"^```diff\n(.*?)^```", PAGE.split("(then-change")[1], re.M | re.S)
    lines = diff.splitlines()
    before = run("torchdistill", [line[1:] for line in lines if line[0] in " -"])
    after = run("torchdistill", [line[1:] for line in lines if line[0] in " +"])
    assert after[0] > before[0]  # the reverse KL and a weight of 2 are added
