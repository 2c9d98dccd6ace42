"""Make mutants: small wrong changes to one place of one source file.

Cosmic Ray (https://cosmic-ray.readthedocs.io) parses the source and supplies most operators. It
rewrites files, so that a mutant also reaches subprocesses, Triton's interpreter and
``torch.compile``. mutmut 3 skips every decorated function, and so all Triton kernels. The four
operators below add common mistakes that Cosmic Ray does not make: swapping two arguments, and
forgetting a keyword argument, a factor or term, or a statement.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from parso.python.tree import Keyword

# Packages in which a wrong result raises no error.
PACKAGES = [
    "kernels/bdkd_kernels",
    "bdkd/objectives",
    "bdkd/evaluation",
    "bdkd/data",
    "bdkd/distributed",
    "bdkd/engine",
    "bdkd/export",
    "bdkd/runs",
    "bdkd/trainer.py",
    "bdkd/models",
]

# Cosmic Ray replaces each operator by every other one. Here each operator has one replacement, the
# most similar one, because it is the hardest to notice.
COSMIC_RAY = [
    *(
        f"core/ReplaceBinaryOperator_{pair}"
        for pair in (
            "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Div", "Mod_FloorDiv", "Pow_Mul",
            "LShift_RShift", "RShift_LShift", "BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitOr",
        )
    ),
    *(
        f"core/ReplaceComparisonOperator_{pair}"
        for pair in (
            "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt",
            "Is_IsNot", "IsNot_Is",
        )
    ),
    "core/AddNot",
    "core/NumberReplacer",
    "core/ReplaceAndWithOr",
    "core/ReplaceBreakWithContinue",
    "core/ReplaceContinueWithBreak",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceOrWithAnd",
    "core/ReplaceTrueWithFalse",
    "core/ReplaceUnaryOperator_Delete_Not",
    "core/ReplaceUnaryOperator_USub_UAdd",
    "core/ZeroIterationForLoop",
]  # fmt: skip


class _Ours(Operator):
    """Make one mutation for each entry of ``choices(node)``."""

    def choices(self, node) -> list:
        raise NotImplementedError

    def mutation_positions(self, node):
        return [(node.start_pos, node.end_pos) for _ in self.choices(node)]

    @classmethod
    def examples(cls):
        return ()


def _arguments(node) -> list:
    """Return the children of a call's argument list, including commas."""
    if node.type != "trailer" or node.children[0] != "(" or len(node.children) != 3:
        return []
    inner = node.children[1]
    return inner.children if inner.type == "arglist" else [inner]


def _exchange(children: list, one: int, other: int) -> None:
    a, b = children[one], children[other]
    first, second = a.get_first_leaf(), b.get_first_leaf()
    first.prefix, second.prefix = second.prefix, first.prefix
    children[one], children[other] = b, a


# Functions for which the order of the arguments makes no difference.
SYMMETRIC = ("max", "min", "maximum", "minimum", "allclose", "isclose", "equal", "logaddexp")


class SwapArguments(_Ours):
    """Change ``f(a, b)`` to ``f(b, a)``, for each two adjacent positional arguments."""

    def choices(self, node):
        found = _arguments(node)
        before = node.get_previous_leaf()
        if before is not None and before.value in SYMMETRIC:
            return []
        return [
            at
            for at in range(0, len(found) - 2, 2)
            if "argument" not in (found[at].type, found[at + 2].type)
            and found[at].get_code(False) != found[at + 2].get_code(False)
        ]

    def mutate(self, node, index):
        at = self.choices(node)[index]
        _exchange(_arguments(node), at, at + 2)
        return node


class ForgetKeyword(_Ours):
    """Change ``f(a, b=c)`` to ``f(a)``."""

    def choices(self, node):
        found = _arguments(node)
        return [
            at
            for at, child in enumerate(found)
            if child.type == "argument" and len(child.children) == 3 and child.children[1] == "="
        ]

    def mutate(self, node, index):
        at = self.choices(node)[index]
        if node.children[1].type != "arglist":
            del node.children[1]
        else:
            del node.children[1].children[at : at + 2]
        return node


class ForgetOperand(_Ours):
    """Change ``a * b`` and ``a + b`` to ``a``."""

    def choices(self, node):
        return [0] if node.type in ("term", "arith_expr") else []

    def mutate(self, node, index):
        if len(node.children) == 3:
            return node.children[0]
        del node.children[-2:]
        return node


class ForgetStatement(_Ours):
    """Replace a call, an augmented assignment, or an assignment to an attribute or item by
    ``pass``."""

    def choices(self, node):
        if node.type != "simple_stmt":
            return []
        first = node.children[0]
        if first.type == "expr_stmt":
            target, operator = first.children[:2]
            in_place = operator.type == "operator" and operator.value != "="
            return [0] if in_place or target.type in ("atom_expr", "power") else []
        return [0] if first.type in ("atom_expr", "power") else []

    def mutate(self, node, index):
        first = node.children[0].get_first_leaf()
        node.children[0] = Keyword("pass", first.start_pos, first.prefix)
        return node


OURS = {
    f"bdkd/{kind.__name__}": kind
    for kind in (SwapArguments, ForgetKeyword, ForgetOperand, ForgetStatement)
}


def operator_class(name: str) -> type[Operator]:
    return OURS.get(name) or cosmic_ray.plugins.get_operator(name)


def mutated_source(source: str, operator: str, occurrence: int) -> str | None:
    """Return the source with one change, or None if the code is equal or is not valid Python."""
    changed = mutate_code(source, operator_class(operator)(), occurrence)
    if changed is None or changed == source:
        return None
    try:
        compile(changed, "mutant", "exec")
    except (SyntaxError, ValueError):
        return None
    return changed


@dataclass(frozen=True)
class Mutant:
    """One change. ``key`` does not change as long as the code of its function does not change."""

    key: str
    path: str
    function: str
    operator: str
    occurrence: int
    start: tuple[int, int]
    end: tuple[int, int]
    at_import: bool = False  # the line runs when its file is imported, not in a test


def _is_left_out(node) -> bool:
    """Return whether a node is not mutated: annotations and a ``*`` between parameters have no
    effect, and the text of an error is not a result."""
    if node.type == "operator" and node.parent.type == "parameters":
        return True
    while node.parent is not None:
        parent = node.parent
        if parent.type == "tfpdef" or parent.type == "raise_stmt":
            return True
        if parent.type == "annassign" and node is parent.children[1]:
            return True
        if parent.type == "funcdef" and node is parent.annotation:
            return True
        node = parent
    return False


def _function(node) -> tuple[str, str]:
    """Return the qualified name and the text of the function or class around a node. Outside of
    functions, the text is that of the line."""
    names, outermost = [], None
    inside = node
    while node is not None:
        if node.type in ("funcdef", "classdef"):
            names.append(node.name.value)
            outermost = outermost or node
        elif outermost is None:
            inside = node if node.type == "simple_stmt" else inside
        node = node.parent
    return ".".join(reversed(names)), (outermost or inside).get_code(False)


def mutants(root: Path, path: str) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    tree = get_ast((root / path).read_text("utf-8"))
    nodes = list(ast_nodes(tree))
    seen: Counter[str] = Counter()
    for name in (*COSMIC_RAY, *OURS):
        operator = operator_class(name)()
        places = (
            (node, start, end) for node in nodes for start, end in operator.mutation_positions(node)
        )
        for occurrence, (node, start, end) in enumerate(places):
            if _is_left_out(node):
                continue
            function, text = _function(node)
            what = f"{path}\n{function}\n{text}\n{name}\n{node.get_code(False)}"
            seen[what] += 1
            key = hashlib.sha256(f"{what}\n{seen[what]}".encode()).hexdigest()[:16]
            yield Mutant(key, path, function, name, occurrence, start, end, _runs_at_import(node))


def _runs_at_import(node) -> bool:
    """Return whether a node is outside of all function bodies. Defaults of parameters are evaluated
    where the function is defined."""
    while (parent := node.parent) is not None:
        if parent.type in ("funcdef", "lambdef") and node is parent.children[-1]:
            return False
        node = parent
    return True


def source_files(root: Path) -> list[str]:
    found: list[Path] = []
    for package in PACKAGES:
        path = root / package
        found += path.rglob("*.py") if path.is_dir() else [path] if path.exists() else []
    return sorted(str(file.relative_to(root)) for file in found)
