"""Compare the identities of data sets. Checkpoints and ``summary.json`` contain the identity.

:meth:`bdkd.data.DataInfo.identity` makes it: the source, the class names in the order of their
labels, and for "train" and "test" the number of images and a digest of the list of files.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import normalize

from bdkd.errors import RunError


def difference(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str:
    """Describe the first difference between two identities. Return an empty string if they are
    equal, or if one of them is not known, as for runs of older versions."""
    if not (_is_identity(before) and _is_identity(now)) or before == now:
        return ""
    assert before is not None and now is not None  # noqa: PT018
    if before["source"] != now["source"]:
        return f"it is {now['source']} and was {before['source']}"
    if differs := class_difference(before["classes"], now["classes"]):
        return differs
    for split, count in before["images"].items():
        if now["images"].get(split) != count:
            return f"it has {now['images'].get(split)} {split} images and had {count}"
    for split, digest in before["digests"].items():
        if now["digests"].get(split) != digest:
            return f"its {split} images are other files, although their number is equal"
    return ""


def class_difference(before: Sequence[str], now: Sequence[str]) -> str:
    """Describe the first difference between two lists of classes. Return an empty string if they
    are equal."""
    if len(before) != len(now):
        return f"it has {len(now)} classes and had {len(before)}{_odd_names(before, now)}"
    for label, (was, name) in enumerate(zip(before, now, strict=True)):
        if was != name and normalize("NFC", was) == normalize("NFC", name):
            return (
                f"class {label} is {name!a} and was {was!a}, another Unicode form of the same text"
            )
        if was != name:
            return f"class {label} is {name!r} and was {was!r}"
    return ""


def refuse_other_data(runs: Sequence[tuple[str, Any]]) -> None:
    """Raise ``RunError`` unless all runs have the same data set.

    Args:
        runs: the name of each run, and its identity, or None if it is not known.
    """
    known = [(name, data) for name, data in runs if _is_identity(data)]
    for name, data in known[1:]:
        first, before = known[0]
        if differs := difference(before, data):
            raise RunError(
                f"{name} has another data set than {first}: {differs}; their results cannot be "
                "compared, so pass runs on the same data set"
            )


def _is_identity(data: Any) -> bool:
    """Return whether a value from a file has the keys and types of an identity."""
    return (
        isinstance(data, Mapping)
        and isinstance(data.get("source"), str)
        and isinstance(data.get("classes"), list)
        and all(isinstance(name, str) for name in data["classes"])
        and isinstance(data.get("images"), Mapping)
        and isinstance(data.get("digests"), Mapping)
        and len(data["digests"]) > 0
    )


def _odd_names(before: Sequence[str], now: Sequence[str]) -> str:
    """Return up to three names that are in only one of two lists, as a part of a message."""
    gone = [f"without {name!r}" for name in before if name not in set(now)]
    new = [f"with {name!r}" for name in now if name not in set(before)]
    shown = (gone + new)[:3]
    return f" ({', '.join(shown)})" if shown else ""
