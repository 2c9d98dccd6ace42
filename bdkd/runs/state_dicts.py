"""Find the state dicts in a file of any trainer, and match their names with those of a network.

A file may contain the weights under a key (``state_dict``, ``model``, ``ema``). Each name may have
a prefix that a wrapper added (``module.``, ``_orig_mod.``, ``model.``). The key and the prefix are
found by comparing names.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdkd.models.key_names import Layout

# Limits, because a file may be malicious
MAX_DEPTH = 4  # of wrappers, such as {"checkpoint": {"model": {"module": ...}}}
MAX_PARTS, MAX_NAME, MAX_DOTS = 10_000, 1000, 64
# Parts of a checkpoint that contain tensors other than weights
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loop|criterion|rng|momentum|loss", re.I)
EMA = re.compile(r"(^|[._])(ema|averaged?|swa)([._]|$)", re.I)
WRAPPERS = {"model", "module", "net", "network", "state_dict", "weights"}  # generic names
# Names that torch inserts: torch.compile, FSDP, activation checkpointing
_INSERTED = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
# torchvision's published DenseNet weights use the names of an older version.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])(?=\.)")
# Tensors that a network does not need: counters of torch and of FLOP counters, and the auxiliary
# classifiers of GoogLeNet and Inception, which bdkd does not build
_COUNTER = "num_batches_tracked"
_EXTRA = re.compile(
    r"(^|\.)(num_batches_tracked|n_averaged|total_ops|total_params)$|^(AuxLogits|aux\d)\."
)


class Target(NamedTuple):
    """The network that needs weights."""

    model: str
    own: dict[str, Tensor]  # its state dict
    layouts: dict[str, Layout]
    classifier: set[str]  # keys of its classifier
    left_out: set[str]  # keys that are not loaded: the keys of the classifier, or none


class Match(NamedTuple):
    """The result of matching a state dict in a file with a network."""

    key: str  # key of the state dict in the file; empty: the file is the state dict
    prefix: str  # prefix of all its names
    layout: str  # the library whose names it uses, see bdkd.models.key_names
    names: dict[str, str]  # the network's key -> the name in the state dict, with the prefix
    tensors: dict[str, Tensor]  # the tensors in the state dict, by name
    wrong: list[str]  # keys of the network whose tensor has another shape or kind
    missing: list[str]  # keys of the network that the state dict does not contain
    extra: list[str]  # names in the state dict, with the prefix, that the network does not have

    @property
    def fits(self) -> bool:
        return not (self.wrong or self.missing or self.extra)

    def weights(self, target: Target) -> dict[str, Tensor]:
        """Return the tensors that fit, by key of the network, without ``target.left_out``."""
        names = [(k, n) for k, n in self.names.items() if k not in target.left_out]
        return {k: self.tensors[n] for k, n in names if fits(target.own[k], self.tensors[n])}

    @property
    def place(self) -> str:
        """The key and the prefix, joined by a dot. ``weights_key`` selects it."""
        return ".".join(part for part in (self.key, self.prefix.rstrip(".")) if part)

    @property
    def where(self) -> str:
        found = [f"under {self.key!r}"] if self.key else []
        found += [f"with the prefix {self.prefix!r}"] if self.prefix else []
        return " ".join(found) or "at the top level"


class Misfit(Exception):
    """The weights in a file do not fit a network. The message is the reason."""


def fits(own: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor from a file can replace a network's tensor: it is a plain tensor of
    the same shape, and both or neither are floating-point."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    plain = plain and not (tensor.is_meta or tensor.is_quantized)
    same_kind = own.is_floating_point() == tensor.is_floating_point()
    return plain and same_kind and own.shape == tensor.shape


# -- state dicts in a file -------------------------------------------------------------------------


def state_dicts(content: Any, everything: bool) -> dict[str, dict[str, Tensor]]:
    """Return all state dicts in the content of a file, by key.

    Args:
        everything: also search the parts of a checkpoint that usually contain no weights, such as
            the optimizer.
    """
    found: dict[str, dict[str, Tensor]] = {}
    pending, seen = [("", content, 0)], set()
    for key, value, depth in pending:
        if id(value) in seen or len(key) > MAX_NAME:
            continue
        seen.add(id(value))
        tensors = _module_tensors(value)
        if tensors is None and isinstance(value, Mapping):
            items = [(k, v) for k, v in value.items() if isinstance(k, str)]
            tensors = {k: v for k, v in items if _is_tensor(v) and _is_short(k)}
            if depth < MAX_DEPTH and len(pending) < MAX_PARTS:
                pending += [
                    (f"{key}.{k}" if key else k, v, depth + 1) for k, v in items
                    if not isinstance(v, Tensor) and (everything or not _NO_WEIGHTS.search(k))
                ]  # fmt: skip
        if tensors:
            found[key] = tensors
    return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_nested  # nested tensors have no shape


def _is_short(name: str) -> bool:
    return len(name) <= MAX_NAME and name.count(".") <= MAX_DOTS


def _module_tensors(content: Any) -> dict[str, Tensor] | None:
    """Return the tensors of a pickled module, whose class a stand-in replaces. Return None if the
    content is not a module."""
    if _attributes(content) is None:
        return None
    tensors: dict[str, Tensor] = {}
    pending: list[tuple[str, Any, frozenset[int]]] = [("", content, frozenset())]
    for prefix, module, outer in pending:
        attributes = _attributes(module)
        # In a malicious file, a module may contain itself.
        if attributes is None or id(module) in outer or not _is_short(prefix):
            continue
        for kind in ("_parameters", "_buffers"):
            values = attributes.get(kind)
            for name, value in values.items() if isinstance(values, dict) else ():
                if _is_tensor(value):
                    tensors[f"{prefix}{name}"] = value
        if len(pending) < MAX_PARTS:
            pending += [
                (f"{prefix}{name}.", child, outer | {id(module)})
                for name, child in attributes["_modules"].items()
            ]
    return tensors


def _attributes(module: Any) -> dict[str, Any] | None:
    found = getattr(module, "__dict__", None)
    is_module = isinstance(found, dict) and isinstance(found.get("_modules"), dict)
    return found if is_module else None


# -- matching names --------------------------------------------------------------------------------


def match_names(key: str, tensors: Mapping[str, Tensor], target: Target) -> Iterator[Match]:
    """Yield a match for each layout of names and each prefix with which the most names match."""
    cleaned = {_cleaned(name): tensor for name, tensor in tensors.items()}
    if len(cleaned) < len(tensors):  # {"conv.weight", "_orig_mod.conv.weight"}: two networks
        cleaned = dict(tensors)
    for origin, layout in target.layouts.items():
        by_name = {foreign: own for own, foreign in layout.items()}
        prefixes = _prefixes(cleaned, by_name)
        for prefix in prefixes:
            inside = {n.removeprefix(prefix) for n in cleaned if n.startswith(prefix)}
            names = {own: prefix + foreign for foreign, own in by_name.items() if foreign in inside}
            needed = [k for k in layout if not k.endswith(_COUNTER) and k not in target.left_out]
            # A larger network may contain all keys of this network, so extra names are an error.
            # Names of a second network are allowed: {"conv.weight", "ema.conv.weight"}.
            left = [prefix + n for n in inside if n not in by_name and not _EXTRA.search(n)]
            inner = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
            yield Match(
                key, prefix, origin, names, cleaned,
                wrong=[k for k in needed if k in names
                       and not fits(target.own[k], cleaned[names[k]])],
                missing=[k for k in needed if k not in names],
                extra=sorted(name for name in left if not (inner and name.startswith(inner))),
            )  # fmt: skip


def _cleaned(name: str) -> str:
    name = _INSERTED.sub("", name).removeprefix(".")
    return _OLD_DENSENET.sub(r"\1\2", name)


def _prefixes(names: Mapping[str, Tensor], wanted: Mapping[str, str]) -> list[str]:
    """Return the prefixes with which the most names match a wanted name."""
    counts: Counter[str] = Counter()
    for name in names:
        ends = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        counts.update(name[:end] for end in ends if name[end:] in wanted)
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if count == most] or [""]
