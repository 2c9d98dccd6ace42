"""Pickles of plain data are read. Any other pickle is refused, and none of its code runs."""

import io
import os
import pickle

import numpy as np
import pytest
from fake_sets import python2_pickle
from hypothesis import given
from hypothesis import strategies as st

from bdkd.data import plain_pickle
from bdkd.errors import RunError

# Values up to 253, to include bytes that are not ASCII
ROWS = 11 * np.arange(24, dtype=np.uint8).reshape(4, 6)


def load(content: bytes):
    return plain_pickle.load(io.BytesIO(content), "some/file")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_arrays_of_bytes_lists_and_names_are_read_from_every_protocol(protocol):
    content = {"data": ROWS, "labels": [1, 2], "names": [b"a", "b"], "extra": {"x": 1.5, "y": None}}
    found = load(pickle.dumps(content, protocol=protocol))
    assert np.array_equal(found.pop("data"), ROWS)
    assert found["labels"] == [1, 2]
    assert found["names"] in ([b"a", b"b"], [b"a", "b"])


def test_pickles_of_python_2_are_read():
    content = python2_pickle({b"data": ROWS, b"labels": [3]})
    assert b"numpy.core.multiarray" in content
    assert b"_codecs" not in content
    found = load(content)
    assert np.array_equal(found["data"], ROWS)
    assert found["labels"] == [3]


class Runs:
    """Creates a folder when Python's own ``pickle`` loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_a_program_is_refused_in_one_line(tmp_path, protocol):
    planted = tmp_path / "planted"
    content = pickle.dumps({"data": Runs(planted)}, protocol=protocol)
    with pytest.raises(RunError, match=r"some/file is refused: it asks for posix.mkdir") as raised:
        load(content)
    assert "\n" not in str(raised.value)
    assert not planted.exists()
    pickle.loads(content)  # Python's own pickle runs the code
    assert planted.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        b"c_codecs\ndecode\n(S'x'\ntR.",
        b"cbdkd.data.plain_pickle\nload\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
    ],
)
def test_every_other_name_is_refused(program):
    with pytest.raises(RunError, match="is refused: it asks for"):
        load(program)


@pytest.mark.parametrize("name", [b"numpy\nndarray", b"numpy\ndtype", b"_codecs\nencode",
                                  b"numpy.core.multiarray\n_reconstruct"])  # fmt: skip
def test_the_replacement_classes_cannot_be_altered(name):
    """The opcode BUILD with a pair of states would set attributes of the class itself."""
    before = [dict(vars(value)) for value in plain_pickle.REPLACEMENTS.values()]
    with pytest.raises(RunError, match="damaged or not a pickle of plain data"):
        load(b"}c" + name + b"\n(N}S'__init__'\nI1\nstb.")
    assert [dict(vars(value)) for value in plain_pickle.REPLACEMENTS.values()] == before


@pytest.mark.parametrize(
    "value",
    [
        {"data": np.arange(3)},
        {"data": np.asfortranarray(ROWS)},
        {"data": np.array([object], dtype=object)},
        [1, 2],
    ],
    ids=["int64", "fortran", "objects", "list"],
)
def test_other_content_is_refused(value):
    with pytest.raises(RunError, match="some/file"):
        load(pickle.dumps(value, protocol=2))


def test_an_array_whose_bytes_do_not_fill_its_shape_is_refused():
    content = python2_pickle({b"data": ROWS}).replace(b"K\x04K\x06\x86", b"K\x04K\x07\x86")
    with pytest.raises(RunError, match="damaged"):
        load(content)


def test_an_array_without_a_state_has_no_value():
    assert load(b"(dS'data'\ncnumpy\nndarray\n)Rs.") == {"data": None}


@given(st.integers(0, 200), st.integers(0, 255), st.booleans())
def test_a_damaged_pickle_is_an_error_or_a_plain_dictionary(place, byte, cut):
    content = bytearray(python2_pickle({b"data": ROWS, b"labels": [1, 2, 3]}))
    place %= len(content)
    if cut:
        del content[place:]
    else:
        content[place] = byte
    try:
        found = load(bytes(content))
    except RunError:
        return
    assert isinstance(found, dict)
