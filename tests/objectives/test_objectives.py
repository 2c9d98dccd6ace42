"""The methods: values by hand, and who may learn from whom."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bdkd.config import NetworkConfig, ObjectiveConfig
from bdkd.errors import UsageError
from bdkd.objectives import OBJECTIVES, create_objective

PAIR = {"t": NetworkConfig("x", "teacher"), "s": NetworkConfig("x", "student")}
TRAINED = {"t": NetworkConfig("x", "teacher", weights="t.pt"), "s": NetworkConfig("x", "student")}


def logits(seed: int = 0, classes: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(12, classes, dtype=torch.float64, generator=generator) * scale)
        .requires_grad_()
        for name, scale in (("t", 3.0), ("s", 1.0))
    }  # fmt: skip


TARGET = torch.arange(12) % 7


def test_bdkd_is_its_equations():
    x = logits()
    config = ObjectiveConfig(temperature=2.0, gamma=3.0, teacher_kd=0.5, backend="reference")
    out = create_objective(config, PAIR)(x, TARGET, 24.0, 1.0)
    log_s, log_t = F.log_softmax(x["s"] / 2, -1), F.log_softmax(x["t"] / 2, -1)
    forward = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    reverse = F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(-1)
    entropy = {k: -(v.exp() * v).sum(-1) for k, v in (("s", log_s), ("t", log_t))}
    d1 = torch.where(entropy["t"] > entropy["s"], 3.0, 1.0).double()
    d2 = torch.where(entropy["s"] > entropy["t"], 3.0, 1.0).double()
    student = (
        F.cross_entropy(x["s"], TARGET, reduction="sum") + 4 * (d1 * forward + d2 * reverse).sum()
    )
    teacher = F.cross_entropy(x["t"], TARGET, reduction="sum") + 0.5 * 4 * reverse.sum()
    torch.testing.assert_close(out.losses["s"], student / 24)
    torch.testing.assert_close(out.losses["t"], teacher / 24)
    torch.testing.assert_close(out.statistics["forward_weight"], d1)
    torch.testing.assert_close(out.statistics["reverse_kl"], reverse)


def test_independent_is_cross_entropy():
    x = logits()
    out = create_objective(ObjectiveConfig("independent", label_smoothing=0.1), PAIR)(
        x, TARGET, 12.0, 1.0
    )
    for name, loss in out.losses.items():
        torch.testing.assert_close(loss, F.cross_entropy(x[name], TARGET, label_smoothing=0.1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_loss_trains_its_own_network_only(name):
    x = logits()
    objective = create_objective(ObjectiveConfig(name), TRAINED)
    out = objective(x, TARGET, 12.0, 1.0)
    assert out.losses.keys() == PAIR.keys() - objective.frozen
    for mine, other in (("s", "t"), ("t", "s")):
        if mine not in out.losses:
            continue
        gradients = torch.autograd.grad(
            out.losses[mine], [x[mine], x[other]], retain_graph=True, allow_unused=True
        )
        assert gradients[0].abs().sum() > 0
        assert gradients[1] is None or gradients[1].abs().sum() == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_a_batch_add_up(name):
    x = {k: v.detach() for k, v in logits().items()}
    objective = create_objective(ObjectiveConfig(name), TRAINED)
    whole = objective(x, TARGET, 12.0, 1.0).losses
    parts = [
        objective({k: v[i : i + 4] for k, v in x.items()}, TARGET[i : i + 4], 12.0, 1.0).losses
        for i in (0, 4, 8)
    ]
    for network, loss in whole.items():
        torch.testing.assert_close(sum(part[network] for part in parts), loss)


# A second derivation of every method in NumPy, from its paper: nothing of ours in it.


def log_p(x: np.ndarray, tau: float = 1.0) -> np.ndarray:
    scaled = x / tau - (x / tau).max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray, tau: float = 1.0) -> np.ndarray:
    """KL(softmax(p / tau) || softmax(q / tau)) of each row of logits."""
    return (np.exp(log_p(p, tau)) * (log_p(p, tau) - log_p(q, tau))).sum(-1)


def ce(x: np.ndarray) -> np.ndarray:
    return -log_p(x)[np.arange(len(x)), TARGET.numpy()]


def arrays(x: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in x.items()}


def cohort(roles: str, classes: int = 7):
    """Logits and configurations of several networks, ``roles`` like "tss"."""
    generator = torch.Generator().manual_seed(len(roles))
    names = [f"{role}{i}" for i, role in enumerate(roles)]
    x = {
        name: torch.randn(12, classes, dtype=torch.float64, generator=generator).requires_grad_()
        for name in names
    }
    kinds = {"t": "teacher", "s": "student"}
    return x, {name: NetworkConfig("x", kinds[name[0]]) for name in names}


def by_objective(config: ObjectiveConfig, networks, x) -> dict[str, torch.Tensor]:
    return create_objective(config, networks)(x, TARGET, 12.0, 1.0).losses


def assert_losses(losses: dict[str, torch.Tensor], expected: dict[str, np.ndarray]):
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(losses[name].item(), value.mean(), rtol=1e-10)


def assert_gradients(losses, x, equivalent):
    """The gradients are those of losses written in torch, their partners detached."""
    mine = torch.autograd.grad(sum(losses.values()), list(x.values()), allow_unused=True)
    theirs = torch.autograd.grad(sum(equivalent.values()), list(x.values()), allow_unused=True)
    for ours, needed in zip(mine, theirs, strict=True):
        if needed is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, needed)


def torch_kl(p: torch.Tensor, q: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    log_p_, log_q = F.log_softmax(p / tau, -1), F.log_softmax(q / tau, -1)
    return F.kl_div(log_q, log_p_, reduction="batchmean", log_target=True)


def test_kd_is_its_equation():
    x = logits()
    losses = by_objective(ObjectiveConfig("kd"), TRAINED, x)
    n = arrays(x)
    assert_losses(losses, {"s": 0.1 * ce(n["s"]) + 0.9 * 16 * kl(n["t"], n["s"], 4)})
    soft = torch_kl(x["t"].detach(), x["s"], 4)
    hard = F.cross_entropy(x["s"], TARGET)
    assert_gradients(losses, x, {"s": 0.1 * hard + 0.9 * 16 * soft})


def test_dml_is_its_equation():
    x, networks = cohort("tss")
    losses = by_objective(ObjectiveConfig("dml"), networks, x)
    n = arrays(x)
    assert_losses(losses, {
        name: ce(n[name]) + sum(kl(n[peer], n[name]) for peer in n if peer != name) / 2
        for name in n
    })  # fmt: skip
    assert_gradients(losses, x, {
        name: F.cross_entropy(x[name], TARGET)
        + sum(torch_kl(x[peer].detach(), x[name]) for peer in x if peer != name) / 2
        for name in x
    })  # fmt: skip


@pytest.mark.parametrize("ensemble", ["naive", "minlogit"])
def test_kdcl_is_its_equation(ensemble):
    x, networks = cohort("tss")
    config = ObjectiveConfig("kdcl", temperature=2.0, ensemble=ensemble)
    objective = create_objective(config, networks)
    assert objective.views == 3  # each network sees an augmentation of its own
    losses = objective(x, TARGET, 12.0, 1.0).losses
    n = arrays(x)
    ensembles = []
    for i in range(12):
        rows = np.stack([values[i] for values in n.values()])  # (K, C)
        if ensemble == "naive":
            ensembles.append(rows[np.argmin([ce(values)[i] for values in n.values()])])
        else:
            ensembles.append(np.min([row - row[TARGET[i]] for row in rows], axis=0))
    target = np.stack(ensembles)
    assert_losses(losses, {name: ce(n[name]) + 4 * kl(target, n[name], 2) for name in n})
    assert_gradients(losses, x, {
        name: F.cross_entropy(x[name], TARGET) + 4 * torch_kl(torch.tensor(target), x[name], 2)
        for name in x
    })  # fmt: skip


@pytest.mark.parametrize(("lead", "expert"), [(0.5, False), (4.0, True)])
def test_switokd_pauses_the_teacher_by_its_rule(lead, expert):
    x = logits()
    right = F.one_hot(TARGET, 7).double()
    x["t"] = (x["t"].detach() + lead * right).requires_grad_()  # so far is the teacher ahead
    objective = create_objective(ObjectiveConfig("switokd"), PAIR)
    n = arrays(x)
    p_s, p_t, y = np.exp(log_p(n["s"])), np.exp(log_p(n["t"])), right.numpy()
    a, b, g = (np.abs(d).sum(-1).mean() for d in (p_s - y, p_t - y, p_s - p_t))
    assert (b < a and g > a - np.exp(-b / (a + b)) * b) == expert
    sums = objective.measure(x, TARGET)
    np.testing.assert_allclose(sums / 12, [a, b, g])
    active = objective.active(sums / 12)
    assert active == ({"s"} if expert else {"s", "t"})
    out = objective(x, TARGET, 12.0, 1.0, active)
    student = ce(n["s"]) + kl(n["t"], n["s"])
    teacher = {} if expert else {"t": ce(n["t"]) + kl(n["s"], n["t"])}
    assert_losses(out.losses, {"s": student} | teacher)
    assert out.statistics["teacher_active"].mean() == float(not expert)
    assert objective.active(torch.tensor([0.0, 0.0, 0.0])) == {"s", "t"}
    assert objective.active(torch.full((3,), torch.nan)) == {"s", "t"}


ABLATIONS = {
    "unweighted": ({"gamma": 1.0}, lambda f, r, up: f + r),
    "forward": ({"student_divergence": "forward"}, lambda f, r, up: np.where(up, 2, 1) * f),
    "reverse": ({"student_divergence": "reverse"}, lambda f, r, up: np.where(up, 1, 2) * r),
    "swapped": ({"weighting": "swapped"}, lambda f, r, up: np.where(up, f + 2 * r, 2 * f + r)),
    "full": ({}, lambda f, r, up: np.where(up, 2 * f + r, f + 2 * r)),
    "alone": ({"teacher_kd": 0.0}, lambda f, r, up: np.where(up, 2 * f + r, f + 2 * r)),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_of_bdkd(name):
    options, divergence = ABLATIONS[name]
    x, _ = cohort("ts")
    x = {"t": x["t0"], "s": x["s1"]}
    n = arrays(x)
    losses = by_objective(ObjectiveConfig("bdkd", temperature=2.0, **options), PAIR, x)
    forward, reverse = kl(n["t"], n["s"], 2), kl(n["s"], n["t"], 2)
    entropy = {k: -(np.exp(log_p(v, 2)) * log_p(v, 2)).sum(-1) for k, v in n.items()}
    up = entropy["t"] > entropy["s"]  # the student is the more certain one
    assert up.any()
    assert not up.all()
    regulariser = 0 if name == "alone" else 4 * reverse
    assert_losses(losses, {
        "s": ce(n["s"]) + 4 * divergence(forward, reverse, up),
        "t": ce(n["t"]) + regulariser,
    })  # fmt: skip
    # Gradients against central differences of the NumPy loss, the teacher and weights constant.
    (gradient,) = torch.autograd.grad(losses["s"], x["s"])

    def student_loss(s: np.ndarray) -> float:
        return (ce(s) + 4 * divergence(kl(n["t"], s, 2), kl(s, n["t"], 2), up)).mean()

    for row, column in ((0, 0), (3, 6), (11, TARGET[11])):
        step = np.zeros_like(n["s"])
        step[row, column] = 1e-5
        slope = (student_loss(n["s"] + step) - student_loss(n["s"] - step)) / 2e-5
        np.testing.assert_allclose(gradient[row, column].item(), slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("roles", ["ts", "tts", "tss", "ttss", "ss", "sss"])
def test_bdkd_of_many_networks_averages_over_partners(roles):
    x, networks = cohort(roles)
    objective = create_objective(ObjectiveConfig(), networks)
    out = objective(x, TARGET, 12.0, 1.0)
    n = arrays(x)
    teachers = [name for name in n if name[0] == "t"]
    students = [name for name in n if name[0] == "s"]

    def entropy(v: np.ndarray) -> np.ndarray:
        return -(np.exp(log_p(v)) * log_p(v)).sum(-1)

    def student_loss(s: str, t: str) -> np.ndarray:
        d1 = np.where(entropy(n[t]) > entropy(n[s]), 2, 1)
        d2 = np.where(entropy(n[s]) > entropy(n[t]), 2, 1)
        return ce(n[s]) + d1 * kl(n[t], n[s]) + d2 * kl(n[s], n[t])

    expected = {}
    for s in students:
        partners = teachers or [peer for peer in students if peer != s]
        expected[s] = np.mean([student_loss(s, t) for t in partners], axis=0)
    for t in teachers:
        expected[t] = np.mean([ce(n[t]) + kl(n[s], n[t]) for s in students], axis=0)
    assert_losses(out.losses, expected)
    for mine in x:
        others = [x[name] for name in x if name != mine]
        own, *gradients = torch.autograd.grad(
            out.losses[mine], [x[mine], *others], retain_graph=True, allow_unused=True
        )
        assert own.any()
        assert all(g is None or not g.any() for g in gradients)
    edges = len(students) * len(teachers) or len(students) * (len(students) - 1)
    assert len(objective.edges) == edges
    if edges > 1:
        each = [v for k, v in out.statistics.items() if k.startswith("forward_kl/")]
        torch.testing.assert_close(out.statistics["forward_kl"], sum(each) / edges)


@pytest.mark.parametrize("name", ["bdkd", "dml", "kdcl", "independent"])
def test_a_frozen_teacher_has_no_loss(name):
    frozen = PAIR | {"t": NetworkConfig("x", "teacher", frozen=True)}
    x = logits()
    x["t"] = x["t"].detach()
    out = create_objective(ObjectiveConfig(name), frozen)(x, TARGET, 12.0, 1.0)
    trained = create_objective(ObjectiveConfig(name), PAIR)(logits(), TARGET, 12.0, 1.0)
    assert out.losses.keys() == {"s"}
    torch.testing.assert_close(out.losses["s"], trained.losses["s"])


def test_a_frozen_teacher_needs_no_weights():
    frozen = PAIR | {"t": NetworkConfig("x", "teacher", frozen=True)}
    create_objective(ObjectiveConfig(teacher_ce=0.0, teacher_kd=0.0), frozen)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_soft_labels_of_one_class_are_labels(name):
    objective = create_objective(ObjectiveConfig(name), TRAINED)
    x = logits()
    hard = objective(x, TARGET, 12.0, 1.0).losses
    soft = objective(x, F.one_hot(TARGET, 7).double(), 12.0, 1.0).losses
    for network, loss in hard.items():
        torch.testing.assert_close(soft[network], loss)


STUDENT, TEACHER = NetworkConfig("x", "student"), NetworkConfig("x", "teacher")


@pytest.mark.parametrize(
    ("config", "networks", "needed"),
    [
        ({}, {"t": TEACHER}, r"no network is a student: set networks\.t\.role"),
        ({}, {"s": STUDENT}, r"'bdkd' needs a student and a teacher, or several students"),
        ({"name": "dml"}, {"s": STUDENT}, "at least two networks, got s"),
        ({"name": "kdcl"}, {"s": STUDENT}, "at least two networks, got s"),
        ({"name": "kd"}, {"s": STUDENT}, r"needs a teacher, got none: set networks\.NAME\.role"),
        ({"name": "kd"}, PAIR, r"trained teacher: set networks\.t\.weights"),
        ({"name": "switokd"}, PAIR | {"u": STUDENT}, r"needs one student, got 2 \(s, u\)"),
        ({"name": "switokd"}, PAIR | {"u": TEACHER}, r"needs one teacher, got 2 \(t, u\)"),
        ({"name": "switokd"}, PAIR | {"t": NetworkConfig("x", "teacher", frozen=True)},
         r"networks\.t\.frozen must be false"),
        ({}, PAIR | {"s": NetworkConfig("x", "student", frozen=True)},
         r"networks\.s\.frozen must be false"),
        ({"teacher_ce": 0.0, "teacher_kd": 0.0}, PAIR, r"set networks\.t\.frozen"),
        ({"gamma": 0.5}, PAIR, r"objective\.gamma must be .*\[1, 1e9\].*0\.5"),
        ({"name": "dml", "temperature": -1.0}, PAIR, r"objective\.temperature must be .*\[0.*-1"),
        ({"name": "independent", "temperature": 2.0}, PAIR, r"objective\.temperature is not an"),
        ({"student_ce": 0.0, "student_kd": 0.0}, PAIR, r"student_kd must not both be 0.*\(s\)"),
        ({"name": "dlm"}, PAIR, "unknown method 'dlm': did you mean 'dml'"),
    ],
)  # fmt: skip
def test_what_does_not_suit_a_method_is_named(config, networks, needed):
    with pytest.raises(UsageError, match=needed):
        create_objective(ObjectiveConfig(**config), networks)
