"""Which networks and options each objective supports, and the defaults of its options."""

import dataclasses

import plain_objectives as plain
import pytest

from bdkd.config import NetworkConfig
from bdkd.errors import UsageError
from bdkd.objectives import create_objective
from bdkd.registry import OBJECTIVES

STUDENT, TEACHER = NetworkConfig("x", "student"), NetworkConfig("x", "teacher")
FROZEN = NetworkConfig("x", "teacher", frozen=True)
PAIR = {"t": TEACHER, "s": STUDENT}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_options_have_the_documented_defaults(name):
    backend = {} if name in ("dkd", "independent") else {"backend": "auto"}
    read = dataclasses.asdict(OBJECTIVES.configure(name))
    assert read == {"name": name, **plain.DEFAULTS[name], **backend}


@pytest.mark.parametrize(
    ("config", "networks"),
    [
        # A teacher without a loss is accepted if it does not train.
        ({"teacher_ce": 0.0, "teacher_kd": 0.0}, PAIR | {"t": FROZEN}),
        ({"teacher_ce": 0.0, "teacher_kd": 0.0}, {"r": STUDENT, "s": STUDENT}),
        # One term with a weight above 0 is sufficient.
        ({"teacher_ce": 0.0, "student_kd": 0.0}, PAIR),
        # A trained teacher from a file or from timm.
        ({"name": "kd"}, PAIR | {"t": NetworkConfig("x", "teacher", weights="t.pt")}),
        ({"name": "kd"}, PAIR | {"t": NetworkConfig("x", "teacher", options={"pretrained": True})}),
        ({"name": "lskd"}, PAIR | {"t": NetworkConfig("x", "teacher", weights="t.pt")}),
        ({"name": "dkd"}, PAIR | {"t": NetworkConfig("x", "teacher", weights="t.pt")}),
        # One term with a weight above 0 is sufficient.
        (
            {"name": "dkd", "student_ce": 0.0, "target_kd": 0.0},
            PAIR | {"t": NetworkConfig("x", "teacher", weights="t.pt")},
        ),
        ({"name": "independent"}, {"s": STUDENT}),
        ({"name": "dml"}, {"r": STUDENT, "s": STUDENT}),
        ({"name": "kdcl"}, PAIR),
    ],
)
def test_supported_networks_and_options_are_accepted(config, networks):
    create_objective(OBJECTIVES.configure(**{"name": "bdkd", **config}), networks)


@pytest.mark.parametrize(
    ("config", "networks", "needed"),
    [
        ({}, {"t": TEACHER}, r"no network is a student: set networks\.t\.role"),
        ({}, {"s": STUDENT}, r"'bdkd' needs a student and a teacher, or several students"),
        ({"name": "dml"}, {"s": STUDENT}, "at least two networks, got s"),
        ({"name": "kdcl"}, {"s": STUDENT}, "at least two networks, got s"),
        ({"name": "kd"}, {"s": STUDENT}, r"needs a teacher, got none: set networks\.NAME\.role"),
        ({"name": "kd"}, PAIR, r"trained teacher: set networks\.t\.weights"),
        ({"name": "lskd"}, PAIR, r"'lskd' learns from a trained teacher: set networks\.t\.weights"),
        ({"name": "lskd"}, {"s": STUDENT}, "'lskd' needs a teacher, got none"),
        ({"name": "dkd"}, PAIR, r"'dkd' learns from a trained teacher: set networks\.t\.weights"),
        ({"name": "dkd"}, {"s": STUDENT}, "'dkd' needs a teacher, got none"),
        ({"name": "dkd", "student_ce": 0.0, "target_kd": 0.0, "other_kd": 0.0}, PAIR,
         "student_ce, target_kd and other_kd must not all be 0"),
        ({"name": "lskd", "student_ce": 0.0, "student_kd": 0.0}, PAIR, "must not both be 0"),
        ({"name": "switokd"}, PAIR | {"u": STUDENT}, r"needs one student, got 2 \(s, u\)"),
        ({"name": "switokd"}, PAIR | {"u": TEACHER}, r"needs one teacher, got 2 \(t, u\)"),
        ({"name": "switokd"}, PAIR | {"t": FROZEN}, r"networks\.t\.frozen must be false"),
        ({"name": "switokd"}, {"s": STUDENT}, r"needs one teacher, got 0 \(none\)"),
        ({"name": "kd"}, {"s": STUDENT, "t": NetworkConfig("x", "teacher", weights="t.pt"),
                          "u": TEACHER}, r"trained teacher: set networks\.u\.weights"),
        ({"name": "kd"}, PAIR | {"t": NetworkConfig("x", "teacher", options={"pretrained": False})},
         r"trained teacher: set networks\.t\.weights"),
        ({}, PAIR | {"s": NetworkConfig("x", "student", frozen=True)},
         r"networks\.s\.frozen must be false"),
        ({}, {"r": STUDENT, "s": NetworkConfig("x", "student", frozen=True)},
         r"networks\.s\.frozen must be false: 's' is a student"),
        ({"teacher_ce": 0.0, "teacher_kd": 0.0}, PAIR, r"set networks\.t\.frozen"),
        ({"teacher_ce": 0.0, "teacher_kd": 0.0}, PAIR | {"t": FROZEN, "u": TEACHER},
         r"set networks\.u\.frozen"),
        ({"temperature": "2"}, PAIR, r"objective\.temperature must be .*'2'"),
        ({"name": "dml", "temperature": "2"}, PAIR, r"objective\.temperature must be .*'2'"),
        ({"gamma": 0.5}, PAIR, r"objective\.gamma must be .*\[1, 1e9\].*0\.5"),
        ({"name": "dml", "temperature": -1.0}, PAIR, r"objective\.temperature must be .*\[0.*-1"),
        ({"student_ce": 0.0, "student_kd": 0.0}, PAIR, r"student_kd must not both be 0"),
        ({"name": "dlm"}, PAIR, "unknown objective 'dlm': did you mean 'dml'"),
    ],
)  # fmt: skip
def test_unsupported_networks_and_options_are_refused(config, networks, needed):
    with pytest.raises(UsageError, match=needed):
        create_objective(OBJECTIVES.configure(**{"name": "bdkd", **config}), networks)
