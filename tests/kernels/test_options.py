"""Signatures, docstrings, operator schemas and the C++ header are derived from one table.

The table contains the options and the statistics of the loss.
"""

import inspect
import pydoc
import re
import struct
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch
from bdkd_kernels import BDKDLoss, BDKDStats, bdkd_loss, bdkd_loss_and_grad, native, options
from bdkd_kernels.ops import flat_options
from bdkd_kernels.options import NAMES, STATISTICS, TABLE, LossArguments, LossOptions

S, T = torch.zeros(4, 5), torch.ones(4, 5)
Y = torch.tensor([0, 1, 2, 3])
DEFINITIONS = [bdkd_loss, bdkd_loss_and_grad, BDKDLoss]
OPERATORS = ["native_forward", "native_backward"] if native.AVAILABILITY else []


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_every_option_is_in_the_signature_with_its_default(definition):
    parameters = inspect.signature(definition).parameters
    assert [name for name in parameters if name in NAMES] == [*NAMES]
    for option in TABLE:
        parameter = parameters[option.name]
        assert parameter.default == option.default == getattr(LossOptions(), option.name)
        assert parameter.annotation == option.type
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["backend"].default == "auto"
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def test_the_functions_and_the_module_have_the_same_arguments():
    function, at_once, module = (set(inspect.signature(x).parameters) for x in DEFINITIONS)
    assert at_once == function | {"grads"}
    call = set(inspect.signature(BDKDLoss.forward).parameters) - {"self"}
    assert module | call == function
    # The signature of an instance is that of its call.
    assert set(inspect.signature(BDKDLoss()).parameters) != module


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_help_describes_every_option(definition):
    lines = pydoc.plain(pydoc.render_doc(definition)).splitlines()
    text = " ".join(" ".join(line.removeprefix(" |") for line in lines).split())
    for option in TABLE:
        assert f"{option.name}: {option.doc}" in text
        assert f"= {option.default!r}" in text or f"={option.default!r}" in text
    assert "{options}" not in text
    assert all(len(line) <= 100 for line in definition.__doc__.splitlines())


def test_type_checkers_see_every_option():
    hints = get_type_hints(LossArguments)
    assert hints == {option.name: option.type for option in TABLE}
    assert not LossArguments.__required_keys__


@pytest.mark.parametrize("name", OPERATORS)
def test_the_schemas_end_with_the_options_in_order(name):
    arguments = getattr(torch.ops.bdkd, name).default._schema.arguments[-len(TABLE) :]
    assert [x.name for x in arguments] == [*NAMES]
    for argument, option in zip(arguments, TABLE, strict=True):
        assert str(argument.type) == ("str" if option.choices else option.type.__name__)
    assert LossOptions(*flat_options(OTHER)) == OTHER


OTHER = LossOptions(
    **{x.name: x.choices[-1] if x.choices else x.type(not x.default) for x in TABLE}
)


def test_every_option_can_be_passed_and_is_in_the_modules_repr():
    values = dict(zip(NAMES, flat_options(OTHER), strict=True)) | {"temperature": 2.0, "gamma": 3.0}
    module = BDKDLoss(**values)
    assert module.options == LossOptions(**values)
    for name, value in values.items():
        assert value != getattr(LossOptions(), name), f"{name} is tested with its default"
        assert f"{name}={value!r}" in repr(module)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_an_unknown_option_is_named_with_the_nearest(definition):
    name = definition.__init__.__qualname__ if isinstance(definition, type) else definition.__name__
    arguments = () if isinstance(definition, type) else (S, T, Y)
    for wrong, hint in (
        ("temprature", ". Did you mean 'temperature'?"),
        ("studentKD", ". Did you mean 'student_kd'?"),
        ("backnd", ". Did you mean 'backend'?"),
        ("zzz", ""),
    ):
        message = f"{name}() got an unexpected keyword argument '{wrong}'{hint}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            definition(*arguments, **{wrong: 2.0})
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            definition(*arguments, **{wrong: [2.0]})  # a list cannot be hashed


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_option_names_of_other_libraries_get_a_hint(definition):
    """The message repeats the name as typed, and names our option.

    If the meaning of a name differs between libraries, the message explains our options.
    """
    name = definition.__init__.__qualname__ if isinstance(definition, type) else definition.__name__
    arguments = () if isinstance(definition, type) else (S, T, Y)
    weights = ": the weights of the student's terms are 'student_ce' and 'student_kd'"
    for typed, hint in (
        ("T", ". Did you mean 'temperature'?"),  # RepDistiller
        ("kd_T", ". Did you mean 'temperature'?"),
        ("tau", ". Did you mean 'temperature'?"),
        ("CE_WEIGHT", ". Did you mean 'student_ce'?"),  # mdistiller
        ("kd_loss_weight", ". Did you mean 'student_kd'?"),
        ("weight_hard_loss", ". Did you mean 'student_ce'?"),  # Liger-Kernel
        ("weight_soft_loss", ". Did you mean 'student_kd'?"),
        ("smoothing", ". Did you mean 'label_smoothing'?"),  # timm
        ("alpha", weights),
        ("beta", f"{weights}; the beta of Liger's JSD is in bdkd_kernels.compat.LigerJSD"),
        ("log_target", ": pass logits, not log-probabilities"),
    ):
        message = f"{name}() got an unexpected keyword argument '{typed}'{hint}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            definition(*arguments, **{typed: 4})


def test_synonyms_map_to_options_and_are_not_options():
    for typed in options.SYNONYMS.keys() | options.NO_COUNTERPART:
        assert typed == typed.lower().replace("_", "")
        assert typed not in {name.replace("_", "") for name in NAMES}
    assert {*options.SYNONYMS.values()} <= {*NAMES}
    assert not options.SYNONYMS.keys() & options.NO_COUNTERPART


def test_options_are_passed_by_name_only():
    with pytest.raises(TypeError, match="takes 3 positional arguments but 4 were given"):
        bdkd_loss(S, T, Y, 4.0)
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        BDKDLoss(4.0)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'target'"):
        bdkd_loss(S, T)


def test_every_statistic_is_a_documented_row():
    table = torch.arange(float(len(STATISTICS)))[:, None].expand(-1, 4)
    stats = BDKDStats(table)
    assert list(BDKDStats.__annotations__)[1:] == list(STATISTICS) == list(BDKDStats._fields)
    text = " ".join(BDKDStats.__doc__.split())
    for row, (name, doc) in enumerate(STATISTICS.items()):
        assert torch.equal(getattr(stats, name), table[row])
        assert getattr(BDKDStats, name).__doc__ == doc
        assert f"{name}: {doc}" in text
    assert bdkd_loss(S, T, Y, backend="reference").stats.table.shape == (len(STATISTICS), 4)


def test_the_c_header_holds_the_table():
    """The build of the native kernel runs options.py with any Python, without torch."""
    done = subprocess.run([sys.executable, "-S", "-I", options.__file__],
                          capture_output=True, text=True, check=True)  # fmt: skip
    header = done.stdout
    assert header == options.cpp_header()
    fields = re.search(r"struct Options \{(.*?)\};", header, re.S)[1]
    assert {"double", "int64_t"} < set(re.findall(r"(\w+) \w+;", fields))
    found = re.findall(r"(\w+) (\w+);", fields)
    assert [name for _, name in found] == [*NAMES]
    for (kind, _), option in zip(found, TABLE, strict=True):
        camel = "".join(part.title() for part in option.name.split("_"))
        assert kind == (
            "double" if option.type is float else camel if option.choices else "int64_t"
        )
    statistics = re.search(r"enum Statistic \{(.*?)\};", header, re.S)[1].split(",")
    camel = ["k" + "".join(part.title() for part in name.split("_")) for name in STATISTICS]
    assert [x.strip() for x in statistics] == [*camel, "kStatistics"]
    for option in TABLE:
        for index, choice in enumerate(option.choices):
            values = re.search(rf"enum {option.name.title().replace('_', '')} .*?{{(.*?)}}", header)
            assert values[1].split(",")[index].strip().endswith(choice.title())


def test_options_are_packed_in_the_order_of_the_header():
    packed = struct.pack(f"={options.struct_format()}", *options.struct_values(OTHER))
    assert len(packed) == 8 * len(TABLE)
    for value, option in zip(
        struct.unpack(f"={options.struct_format()}", packed), TABLE, strict=True
    ):
        own = getattr(OTHER, option.name)
        assert value == (option.choices.index(own) if option.choices else own)
