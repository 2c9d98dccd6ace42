"""Losses, gradients and statistics of all objectives equal those of plain implementations."""

import plain_objectives as plain
import pytest
import torch
import torch.nn.functional as F

from bdkd.config import NetworkConfig
from bdkd.objectives import create_objective
from bdkd.registry import OBJECTIVES

# Ten samples are enough that each weight and each branch of the ensembles occurs. There are fewer
# classes than samples, so that a mean over the wrong axis has another value.
SAMPLES, CLASSES = 10, 6
LABELS = torch.arange(SAMPLES) % CLASSES
SOFT_LABELS = torch.rand(
    SAMPLES, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
).softmax(-1)
SOFT_LABELS[:5] = F.one_hot(LABELS[:5], CLASSES).double()

# All options of an objective have different values, and none has its default.
TUNED = {
    "temperature": 3.0, "gamma": 2.5, "student_ce": 0.7, "student_kd": 1.3, "teacher_ce": 0.6,
    "teacher_kd": 0.4, "label_smoothing": 0.1, "teacher_divergence": "forward",
    "soften_entropy": False, "target_kd": 1.7, "other_kd": 2.2,
}  # fmt: skip


LEARN_FROM_TRAINED = {"dkd", "kd", "lskd"}


def cohort(names: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Return logits for names such as "t0 s0 s1" (t: teacher, s: student).

    All networks have the same logits for the first sample. For the second sample, the first network
    has the smallest cross entropy with hard labels. With smoothed labels it has not, because its
    logit of a wrong class is -60.
    """
    generator = torch.Generator().manual_seed(len(names))
    x = {}
    for name in names.split():
        scale = 0.5 + 2 * torch.rand(SAMPLES, 1, dtype=torch.float64, generator=generator)
        x[name] = scale * torch.randn(SAMPLES, CLASSES, dtype=torch.float64, generator=generator)
        x[name][0] = torch.linspace(-1, 1, CLASSES, dtype=torch.float64)
        x[name][1] = 2.0 * F.one_hot(LABELS[1], CLASSES)
    x[names.split()[0]][1, 1:3] = torch.tensor([3.0, -60.0])
    return {name: logits.to(dtype).requires_grad_() for name, logits in x.items()}


def objective(method: str, names: str, frozen: str = "", **options):
    roles = {"t": "teacher", "s": "student"}
    networks = {
        name: NetworkConfig(
            "x", roles[name[0]], frozen=name in frozen.split(),
            weights="file" if method in LEARN_FROM_TRAINED and name[0] == "t" else None,
        )
        for name in names.split()
    }  # fmt: skip
    return create_objective(OBJECTIVES.configure(method, **options), networks)


def tuned(method: str, **changed) -> dict:
    return {k: v for k, v in TUNED.items() if k in plain.DEFAULTS[method]} | changed


# Objective, networks, frozen networks, options
CASES = {
    "bdkd": ("bdkd", "t0 s0", "", {}),
    "bdkd tuned": ("bdkd", "t0 s0", "", tuned("bdkd")),
    "bdkd softened": ("bdkd", "t0 s0", "", {"temperature": 3.0, "teacher_kd": 0.4}),
    "bdkd reference": ("bdkd", "t0 s0", "", tuned("bdkd", backend="reference")),
    "bdkd many": ("bdkd", "t0 t1 t2 s0 s1", "", tuned("bdkd")),
    "bdkd frozen": ("bdkd", "t0 t1 s0", "t1", tuned("bdkd")),
    "bdkd peers": ("bdkd", "s0 s1 s2", "", tuned("bdkd")),
    "bdkd unweighted": ("bdkd", "t0 s0", "", tuned("bdkd", gamma=1.0)),
    "bdkd no regulariser": ("bdkd", "t0 s0", "", tuned("bdkd", teacher_kd=0.0)),
    "bdkd no labels": ("bdkd", "t0 s0", "", tuned("bdkd", student_ce=0.0, teacher_ce=0.0)),
    "bdkd forward": ("bdkd", "t0 s0", "", tuned("bdkd", student_divergence="forward")),
    "bdkd reverse": ("bdkd", "t0 t1 s0", "", tuned("bdkd", student_divergence="reverse")),
    "bdkd swapped": ("bdkd", "t0 s0 s1", "", tuned("bdkd", weighting="swapped")),
    "bdkd swapped forward": (
        "bdkd", "s0 s1 s2", "",
        tuned("bdkd", weighting="swapped", student_divergence="forward", soften_entropy=True),
    ),
    "dkd": ("dkd", "t0 s0", "t0", {}),
    "dkd tuned": ("dkd", "t0 t1 t2 s0 s1", "t0 t1 t2", tuned("dkd")),
    "dkd no labels": ("dkd", "t0 s0", "t0", tuned("dkd", student_ce=0.0)),
    "dkd target class": ("dkd", "t0 s0", "t0", tuned("dkd", student_ce=0.0, other_kd=0.0)),
    "dkd other classes": ("dkd", "t0 s0", "t0", tuned("dkd", student_ce=0.0, target_kd=0.0)),
    "dml": ("dml", "t0 s0", "", {}),
    "dml tuned": ("dml", "t0 s0 s1", "", tuned("dml")),
    "dml frozen": ("dml", "t0 t1 s0", "t0", tuned("dml")),
    "independent": ("independent", "t0 s0", "", {}),
    "independent tuned": ("independent", "t0 t1 s0", "t1", tuned("independent")),
    "kd": ("kd", "t0 s0", "t0", {}),
    "kd tuned": ("kd", "t0 t1 t2 s0 s1", "t0 t1 t2", tuned("kd")),
    "kdcl": ("kdcl", "t0 s0", "", {}),
    "kdcl tuned": ("kdcl", "t0 s0 s1", "", tuned("kdcl")),
    "kdcl naive": ("kdcl", "t0 s0 s1", "", tuned("kdcl", ensemble="naive")),
    "kdcl frozen": ("kdcl", "t0 t1 s0", "t1", tuned("kdcl")),
    "lskd": ("lskd", "t0 s0", "t0", {}),
    "lskd tuned": ("lskd", "t0 t1 t2 s0 s1", "t0 t1 t2", tuned("lskd")),
    "lskd no labels": ("lskd", "t0 s0", "t0", tuned("lskd", student_ce=0.0)),
    "lskd labels": ("lskd", "t0 s0", "t0", tuned("lskd", student_kd=0.0)),
    "switokd": ("switokd", "t0 s0", "", {}),
    "switokd tuned": ("switokd", "t0 s0", "", tuned("switokd")),
}  # fmt: skip


@pytest.mark.parametrize("target", [LABELS, SOFT_LABELS], ids=["labels", "soft"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_match_the_equations_of_the_papers(case, target):
    method, names, frozen, options = CASES[case]
    x = cohort(names)
    settings = plain.DEFAULTS[method] | options
    expected = plain.METHODS[method](x, target, settings)
    # The normaliser also counts samples of other ranks and micro-batches.
    normaliser, scale = 24.0, 8.0
    out = objective(method, names, frozen, **options)(x, target, normaliser, scale)
    assert out.losses.keys() == set(names.split()) - set(frozen.split())
    for name, loss in out.losses.items():
        wanted = expected[name].sum() / normaliser
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)
        # Only the logits of the network itself get a gradient.
        for other, logits in x.items():
            (gradient,) = torch.autograd.grad(
                loss * scale, logits, retain_graph=True, materialize_grads=True
            )
            (needed,) = torch.autograd.grad(
                wanted * scale, logits, retain_graph=True, materialize_grads=True
            )
            torch.testing.assert_close(gradient, needed, rtol=1e-8, atol=1e-12)
            assert gradient.any() == (other == name)


@pytest.mark.parametrize("names", ["t0 s0", "t0 t1 s0 s1 s2", "s0 s1"])
@pytest.mark.parametrize("options", [{}, tuned("bdkd"), tuned("bdkd", weighting="swapped")])
def test_bdkd_returns_statistics_for_each_pair_and_their_mean(names, options):
    x = cohort(names)
    o = plain.DEFAULTS["bdkd"] | options
    statistics = objective("bdkd", names, **options)(x, LABELS, 24.0, 1.0).statistics
    teachers = [name for name in x if name[0] == "t"]
    pairs = [
        (s, t) for s in x if s[0] == "s" for t in (teachers or x) if t != s
    ]  # fmt: skip
    each = {}
    for s, t in pairs:
        d1, d2 = plain.weights(x[s], x[t], o)
        forward, reverse = (plain.kl(*p, o["temperature"]) for p in ((x[t], x[s]), (x[s], x[t])))
        each[s, t] = {"forward_weight": d1, "reverse_weight": d2, "forward_kl": forward,
                      "reverse_kl": reverse}  # fmt: skip
    keys = set(next(iter(each.values())))
    of_pairs = {f"{key}/{s}/{t}" for key in keys for s, t in pairs} if len(pairs) > 1 else set()
    assert statistics.keys() == keys | of_pairs
    assert not any(value.requires_grad for value in statistics.values())
    for key in keys:
        mean = torch.stack([values[key] for values in each.values()]).mean(0)
        torch.testing.assert_close(statistics[key], mean.detach())
    for name in of_pairs:
        key, s, t = name.split("/")
        torch.testing.assert_close(statistics[name], each[s, t][key].detach())


@pytest.mark.parametrize(("method", "options"), [
    ("bdkd", {}), ("dml", {}), ("kdcl", {"ensemble": "minlogit"}), ("kdcl", {"ensemble": "naive"}),
    ("switokd", {}), ("independent", {}),
])  # fmt: skip
def test_samples_with_the_label_minus_100_do_not_count(method, options):
    """The losses, their gradients and SwitOKD's decision are those of the other samples."""
    target = LABELS.clone()
    target[[2, 7]] = -100
    counted = target != -100
    tested, logits = objective(method, "t0 s0", **options), cohort("t0 s0")
    came = tested(logits, target, 7.0, 1.0)
    rest = {n: x.detach()[counted].requires_grad_() for n, x in logits.items()}
    needed = tested(rest, target[counted], 7.0, 1.0)
    for name in logits:
        torch.testing.assert_close(came.losses[name], needed.losses[name])
        (all_rows,) = torch.autograd.grad(came.losses[name], logits[name], retain_graph=True)
        (rows,) = torch.autograd.grad(needed.losses[name], rest[name], retain_graph=True)
        torch.testing.assert_close(all_rows[counted], rows)
        assert not all_rows[~counted].any()
    if tested.has_dynamic_active_set:
        torch.testing.assert_close(
            tested.measure(logits, target), tested.measure(rest, target[counted])
        )


@pytest.mark.parametrize("target", [LABELS, SOFT_LABELS], ids=["labels", "soft"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_switokd_measures_distances_at_the_configured_temperature(temperature, target):
    x = cohort("t0 s0")
    sums = objective("switokd", "t0 s0", temperature=temperature).measure(x, target)
    distances = plain.switokd_distances(x, target, temperature)
    torch.testing.assert_close(sums, torch.stack([d.sum() for d in distances]).detach())
    assert not sums.requires_grad
    # The sums are float64 for any dtype of the logits, because all ranks must decide alike.
    low = {name: logits.detach().bfloat16() for name, logits in x.items()}
    assert objective("switokd", "t0 s0").measure(low, target).dtype is torch.float64


def test_switokd_pauses_the_teacher_according_to_the_paper():
    method = objective("switokd", "t0 s0")
    generator = torch.Generator().manual_seed(0)
    pauses = []
    for a, b, g in (2 * torch.rand(200, 3, dtype=torch.float64, generator=generator)).tolist():
        pauses.append(plain.switokd_teacher_pauses(a, b, g))
        active = method.active(torch.tensor([a, b, g], dtype=torch.float64))
        assert active == ({"s0"} if pauses[-1] else {"s0", "t0"}), (a, b, g)
    assert 20 < sum(pauses) < 180


@pytest.mark.parametrize(
    "distances",
    [
        (1.0, 1.0, 2.0),  # the teacher is not better than the student
        (1.0, 0.0, 1.0),  # the gap equals the threshold
        (0.0, 0.0, 0.0),  # both networks are perfect
        (float("nan"),) * 3,
    ],
)
def test_switokd_trains_both_networks_in_edge_cases(distances):
    active = objective("switokd", "t0 s0").active(torch.tensor(distances))
    assert active == {"s0", "t0"}


@pytest.mark.parametrize("pauses", [False, True])
def test_a_paused_teacher_has_no_loss_and_the_students_loss_is_unchanged(pauses):
    x = cohort("t0 s0")
    active = frozenset({"s0"} if pauses else {"s0", "t0"})
    method = objective("switokd", "t0 s0")
    out = method(x, LABELS, 24.0, 1.0, active)
    assert out.losses.keys() == active
    torch.testing.assert_close(out.losses["s0"], method(x, LABELS, 24.0, 1.0).losses["s0"])
    wanted = torch.full((SAMPLES,), float(not pauses))
    assert torch.equal(out.statistics["teacher_active"], wanted)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_losses_of_bfloat16_logits_are_computed_in_float32(method):
    low = {name: x.detach() for name, x in cohort("t0 s0", torch.bfloat16).items()}
    single = {name: x.float() for name, x in low.items()}
    of_low, of_single = (objective(method, "t0 s0")(x, LABELS, 24.0, 1.0) for x in (low, single))
    assert of_low.losses
    for name, loss in of_low.losses.items():
        assert loss.dtype is torch.float32
        torch.testing.assert_close(loss, of_single.losses[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [(method, {}) for method in OBJECTIVES if hasattr(OBJECTIVES.configure(method), "backend")]
    + [("bdkd", {"weighting": "swapped"})],
)
def test_the_selected_backend_computes_the_loss(method, options):
    """Only the reference backend supports second derivatives."""
    x = cohort("t0 s0")
    losses = objective(method, "t0 s0", backend="reference", **options)(x, LABELS, 24.0, 1.0).losses
    (first,) = torch.autograd.grad(losses["s0"], x["s0"], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x["s0"])
    assert second.any()


@pytest.mark.parametrize("ensemble", ["naive", "minlogit"])
def test_kdcl_computes_the_ensemble_in_the_widest_dtype(ensemble):
    x = cohort("t0 s0")
    x["t0"] = x["t0"].detach().float()
    exact = x | {"t0": x["t0"].double()}
    mixed, wanted = (
        objective("kdcl", "t0 s0", ensemble=ensemble)(logits, LABELS, 24.0, 1.0).losses["s0"]
        for logits in (x, exact)
    )
    torch.testing.assert_close(mixed, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_objectives_declare_views_frozen_networks_and_dynamic_active_sets(method):
    names = "t0 s0"
    needs = objective(method, names)
    assert needs.views == (2 if method == "kdcl" else 1)  # KDCL: one view for each network
    assert needs.has_dynamic_active_set == (method == "switokd")  # its teacher pauses
    assert needs.frozen == ({"t0"} if method in LEARN_FROM_TRAINED else set())
    assert (needs.students, needs.teachers) == (["s0"], ["t0"])
    if method != "switokd":
        for call in (lambda: needs.measure(cohort(names), LABELS), lambda: needs.active(None)):
            with pytest.raises(NotImplementedError, match="has no dynamic active set"):
                call()


DIRECT = [  # networks, frozen networks and options for which loss_and_grad returns gradients
    ("t s", "", {}),
    ("t s", "t", {}),
    ("t0 t1 s0 s1", "", {"teacher_divergence": "forward"}),
    ("s0 s1 s2", "", {"gamma": 3.0}),
]


@pytest.mark.parametrize("grad_scale", [1.0, torch.tensor(512.0, dtype=torch.float64)])
@pytest.mark.parametrize(("names", "frozen", "options"), DIRECT)
def test_gradients_of_loss_and_grad_equal_those_of_a_backward_pass(
    names, frozen, options, grad_scale
):
    method = objective("bdkd", names, frozen, **options)
    logits = cohort(names)
    for name in frozen.split():
        logits[name].requires_grad_(False)
    came = method.loss_and_grad(logits, LABELS, 7.0, grad_scale)
    needed = method(logits, LABELS, 7.0, grad_scale)
    assert came.gradients is not None
    assert came.gradients.keys() == needed.losses.keys() == came.losses.keys()
    assert all(not loss.requires_grad for loss in came.losses.values())
    trained = [logits[name] for name in needed.losses]
    total = sum(needed.losses.values()) * grad_scale
    for name, gradient in zip(needed.losses, torch.autograd.grad(total, trained), strict=True):
        torch.testing.assert_close(came.gradients[name], gradient, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(came.losses[name], needed.losses[name].detach())
    for name, values in needed.statistics.items():
        torch.testing.assert_close(came.statistics[name], values)


@pytest.mark.parametrize(
    ("method", "names", "options"),
    [
        ("bdkd", "t0 t1 s", {}),  # the networks have different numbers of partners
        ("bdkd", "t s", {"student_divergence": "forward"}),
        ("dml", "s0 s1", {}),
        ("independent", "s0 s1", {}),
    ],
)
def test_other_objectives_return_no_gradients(method, names, options):
    output = objective(method, names, **options).loss_and_grad(cohort(names), LABELS, 1.0, 1.0)
    assert output.gradients is None
    assert all(loss.requires_grad for loss in output.losses.values())
