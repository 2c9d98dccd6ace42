"""Messages about data sets with different identities. See also test_data_identity."""

import pytest

from bdkd.errors import RunError
from bdkd.identity import class_difference, difference, refuse_other_data

KNOWN = {
    "source": "folder", "classes": ["ant", "bee"],
    "images": {"train": 12, "test": 4}, "digests": {"train": "0a", "test": "0b"},
}  # fmt: skip
CHANGES = [
    ({"source": "imagenet"}, "it is imagenet and was folder"),
    ({"classes": ["ant", "cow"]}, "class 1 is 'cow' and was 'bee'"),
    # The same names in another order have other labels.
    ({"classes": ["bee", "ant"]}, "class 0 is 'bee' and was 'ant'"),
    ({"classes": ["ant"]}, "it has 1 classes and had 2 (without 'bee')"),
    (
        {"classes": ["a", "b", "c", "d"]},
        "it has 4 classes and had 2 (without 'ant', without 'bee', with 'a')",
    ),
    ({"images": {"train": 13, "test": 4}}, "it has 13 train images and had 12"),
    ({"images": {"train": 11, "test": 4}}, "it has 11 train images and had 12"),
    ({"images": {"train": 12, "test": 5}}, "it has 5 test images and had 4"),
    (
        {"digests": {"train": "0c", "test": "0b"}},
        "its train images are other files, although their number is equal",
    ),
    (
        {"digests": {"train": "0a", "test": "0c"}},
        "its test images are other files, although their number is equal",
    ),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_difference_says_what_is_now_and_what_was(change, said):
    assert difference(KNOWN, KNOWN | change) == said
    assert difference(KNOWN, dict(KNOWN)) == ""


def test_the_first_difference_is_told_from_the_source_to_the_files():
    changed = dict(KNOWN)
    for change in reversed([CHANGES[0], CHANGES[1], CHANGES[5], CHANGES[8]]):
        changed |= change[0]
        assert difference(KNOWN, changed) == change[1]


@pytest.mark.parametrize(
    "unknown",
    [None, {}, KNOWN | {"digests": {}}, KNOWN | {"classes": [1, 2]}, KNOWN | {"images": None}],
)
def test_an_unknown_identity_equals_every_other(unknown):
    """Runs of older versions, and runs with a user's own source, may have no digests."""
    other = KNOWN | {"source": "imagenet"}
    assert difference(unknown, other) == difference(other, unknown) == ""
    refuse_other_data([("one", unknown), ("two", other), ("three", unknown), ("four", other)])


def test_the_run_with_another_data_set_is_named_at_any_position():
    other = KNOWN | {"classes": ["ant", "cow"]}
    refuse_other_data([])
    refuse_other_data([(name, dict(KNOWN)) for name in "abc"])
    for runs, message in (
        ([KNOWN, other, KNOWN], "b has another data set than a: class 1 is 'cow' and was 'bee'"),
        ([KNOWN, KNOWN, other], "c has another data set than a: class 1 is 'cow' and was 'bee'"),
        ([None, other, KNOWN], "c has another data set than b: class 1 is 'bee' and was 'cow'"),
    ):
        with pytest.raises(RunError) as raised:
            refuse_other_data(list(zip("abc", runs, strict=True)))
        assert str(raised.value).startswith(message)


def test_class_lists_are_compared_by_name_and_place():
    assert class_difference(("ant", "bee"), ["ant", "bee"]) == ""
    assert class_difference([], ["ant"]) == "it has 1 classes and had 0 (with 'ant')"
    # One name occurs twice, so the lists have different lengths but the same names.
    assert class_difference(["ant", "bee"], ["ant", "bee", "bee"]) == "it has 3 classes and had 2"
