"""Describe in one line why the weights in a file do not fit a network."""

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from bdkd.errors import shown
from bdkd.runs.state_dicts import Match, Target

_SEARCHED = 2000  # maximum number of names that are compared with a key
_SHOWN = 80  # maximum number of characters of a name in a message


def describe(match: Match, target: Target, others: Sequence[str]) -> str:
    """Return what the file contains, what the network needs, and what the user can do.

    Args:
        match: the selected state dict in the file.
        target: the network.
        others: values of ``weights_key`` for other weights in the file, which fit.
    """
    if others:
        reason = _reason(match, target)
        choice = ", ".join(repr(place) for place in others[:4])
        return f"{reason}; set weights_key to {choice} to load other weights of the file, which fit"
    if match.missing and set(match.missing) <= target.classifier:
        return f"{_reason(match, target)}; set reset_head = true to train a new classifier"
    if match.wrong and not match.missing and not match.extra and _is_resized(match, target):
        return (
            f"its classifier has another size: {_reason(match, target)}; set reset_head = true to "
            "train a new classifier, or use weights of this data set"
        )
    return _reason(match, target) + _known_as(match.tensors, target.model)


def _reason(match: Match, target: Target) -> str:
    own, tensors = target.own, match.tensors
    if 2 * len(match.names) < len(own):
        held, keys = list(tensors.items()), list(own.items())
        listed = _tensor(*held[0]) + (f" to {_tensor(*held[-1])}" if len(held) > 1 else "")
        count = f"{len(held)} tensor{'s' * (len(held) > 1)}"
        return (
            f"it contains {count} {match.where}, {listed}; the network needs {_tensor(*keys[0])} "
            f"to {_tensor(*keys[-1])}"
        )
    if match.missing:
        key = match.missing[0]
        free = [name for name in tensors if name not in match.names.values()][:_SEARCHED]
        hint = "".join(
            f"; the nearest name in the file is {_tensor(near, tensors[near])}"
            for near in get_close_matches(key, free, n=1)
        )
        return f"it lacks {_tensor(key, own[key])}{_and_more(match.missing)}{hint}"
    if match.extra:
        name, more = match.extra[0], _and_more(match.extra)
        return f"it contains {_tensor(name, tensors[name])}{more}, but the network does not"
    key = match.wrong[0]
    name, tensor = match.names[key], tensors[match.names[key]]
    more = _and_more(match.wrong)
    if tensor.shape != own[key].shape:
        sizes = f"shape {tuple(tensor.shape)}, needed {tuple(own[key].shape)}"
        return f"{shown(name, _SHOWN)}{more} has {sizes}"
    return f"{shown(name, _SHOWN)}{more} is {_kind(tensor)}, needed {_kind(own[key])}"


def _kind(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return f"{kind} without data (a meta tensor)"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    return kind if tensor.layout == torch.strided else f"{kind} ({tensor.layout})"


def _is_resized(match: Match, target: Target) -> bool:
    """Return whether the weights differ from the network only in the number of classes."""
    pairs = [(target.own[k].shape, match.tensors[match.names[k]].shape) for k in match.wrong]
    return set(match.wrong) <= target.classifier and all(
        len(own) == len(came) and own[1:] == came[1:] for own, came in pairs
    )


def _tensor(name: str, tensor: Tensor) -> str:
    return f"{shown(name, _SHOWN)} {tuple(tensor.shape)}"


def _and_more(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def _known_as(tensors: Mapping[str, Tensor], model: str) -> str:
    """Return a hint if a built-in network has the shapes of the tensors, else an empty string."""
    from bdkd.models import create_model, list_models

    shapes = Counter(tuple(t.shape) for t in tensors.values() if t.ndim)
    matrices = [t for t in tensors.values() if t.ndim == 2]
    filters = [t for t in tensors.values() if t.ndim == 4]
    if not matrices or not filters or not matrices[-1].shape[0]:
        return ""
    channels = 3 if any(t.shape[1] == 3 for t in filters) else 1
    for known in list_models():
        with torch.device("meta"):
            other = create_model(known, matrices[-1].shape[0], channels).state_dict().values()
        if shapes == Counter(tuple(t.shape) for t in other if t.ndim) and known != model:
            return f"; its shapes are those of {known!r}"
    return ""


def several(places: Sequence[str]) -> str:
    names = ", ".join(shown(place, _SHOWN) for place in places[:6])
    return f"it contains several networks that fit: {names}; set weights_key to one of them"


def no_such_key(key: str, places: Sequence[str]) -> str:
    names = [place for place in dict.fromkeys(places) if place]
    if not names:
        return f"it contains no weights under {key!r}: it is one state dict, so remove weights_key"
    listed = ", ".join(shown(name, _SHOWN) for name in names[:6])
    near = get_close_matches(key, names[:_SEARCHED], n=1, cutoff=0.0)[0]
    hint = f", the nearest is {shown(near, _SHOWN)}" if len(names) > 1 else ""
    return f"it contains no weights under {key!r}: there are {listed}{hint}"


def no_state_dict(content: Any) -> str:
    if isinstance(content, Mapping) and content:
        keys = ", ".join(shown(key, 40) for key in list(content)[:5])
        more = ", ..." if len(content) > 5 else ""
        return f"it contains no state dict, but a dictionary with the keys {keys}{more}"
    found = "an empty dictionary" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    return f"it contains no state dict, but {found}"
