"""Choose the columns of images and of labels of a Hugging Face data set by their types."""

from collections.abc import Mapping
from typing import Any

from bdkd.errors import RunError, UsageError
from bdkd.registry import nearest

LABEL_NAMES = ("label", "labels", "class", "classes", "class_label", "category", "target", "y")


def choose_image_column(features: Mapping[str, Any], asked: str | None, where: str) -> str:
    """Return the column ``asked``, or the only column of images.

    Raises:
        UsageError: several columns fit, or ``asked`` does not exist or holds no images.
        RunError: no column fits.
    """
    images = [name for name, kind in features.items() if _is_image(kind)]
    binary = [name for name, kind in features.items() if _is_binary(kind)]
    paths = [name for name, kind in features.items() if getattr(kind, "dtype", "") == "string"]
    if asked is not None:
        return _asked(features, asked, [*images, *binary, *paths], "image", where)
    return _only(features, images or binary, "image", "images", where)


def choose_label_column(features: Mapping[str, Any], asked: str | None, where: str) -> str:
    """Return the column ``asked``, or the only class label, or else the only column of numbers or
    strings with a usual name. See :func:`choose_image_column` for errors."""
    labels = [name for name, kind in features.items() if hasattr(kind, "names")]
    plain = [name for name, kind in features.items() if _is_plain(kind)]
    named = [name for name in plain if name.lower() in LABEL_NAMES]
    if asked is not None:
        return _asked(features, asked, [*labels, *plain], "label", where)
    return _only(features, labels or named, "label", "labels", where)


def _asked(
    features: Mapping[str, Any], asked: str, fitting: list[str], kind: str, where: str
) -> str:
    if asked not in features:
        hint = nearest(asked, list(features))
        raise UsageError(f"{where} has no column {asked!r} (data.{kind}_column): {hint}")
    if asked not in fitting:
        raise UsageError(
            f"data.{kind}_column must name a column of {kind}s, but {asked!r} of {where} has the "
            f"type {features[asked]}: choose another column"
        )
    return asked


def _only(
    features: Mapping[str, Any], fitting: list[str], kind: str, plural: str, where: str
) -> str:
    if not fitting:
        raise RunError(
            f"{where} has no column of {plural}, only {', '.join(features)}: name one with "
            f"data.{kind}_column, or choose another data set"
        )
    if len(fitting) > 1:
        raise UsageError(
            f"{where} has several columns of {plural}: choose one of {', '.join(fitting)} with "
            f"data.{kind}_column"
        )
    return fitting[0]


def _is_image(kind: Any) -> bool:
    """Return whether a feature is an image, or a struct with bytes, as pandas stores images."""
    if type(kind).__name__ == "Image":
        return True
    return isinstance(kind, dict) and "bytes" in kind and _is_binary(kind["bytes"])


def _is_binary(kind: Any) -> bool:
    return getattr(kind, "dtype", "") in ("binary", "large_binary")


def _is_plain(kind: Any) -> bool:
    dtype = getattr(kind, "dtype", "")
    return dtype in ("string", "large_string", "bool") or dtype.startswith(("int", "uint"))
