"""The mask language: relations between a query row and a key row.

A relation is a small frozen expression over the integer attributes of a `Layout`; True means "the
query may attend the key". Text such as `LE(block) & (NEAR(block,3) | k.SINK)` is read with Python's
own syntax tree and a whitelist; nothing is ever executed.

Invariants: relations are hashable and `parse_relation(str(r)) == r`; the same `evaluate` serves the
dense reference and the FlexAttention predicate, because it only uses broadcasting operators.
"""

import ast
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .layout import Role

Get = Callable[[str], Tensor]
"""Reads one attribute of the query or of the key, shaped to broadcast against the other side."""
Routes = Mapping[str, Callable[[Tensor], Tensor]]
"""Route name -> function from the key's block index to a boolean."""

_COMPARABLE = ("block", "copy", "order", "group", "document", "source", "tree_in")
_WIDTHS = ("reach",)


class Relation(ABC):
    """A predicate visible(q, k); combine with `&`, `|` and `~`."""

    def __and__(self, other: "Relation") -> "Relation":
        return Both(self, other)

    def __or__(self, other: "Relation") -> "Relation":
        return Either(self, other)

    def __invert__(self) -> "Relation":
        return Not(self)

    def evaluate(self, q: Get, k: Get, routes: Routes) -> Tensor:
        """Return a boolean tensor that broadcasts over queries and keys."""
        return self._seen(q, k, routes)

    def route_names(self) -> frozenset[str]:
        """Names of the routing tables the relation reads."""
        return frozenset().union(*(part.route_names() for part in self._parts()))

    @abstractmethod
    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        """Evaluate the relation."""

    def _parts(self) -> tuple["Relation", ...]:
        return ()


@dataclass(frozen=True)
class Constant(Relation):
    """`ALL` or `NONE`."""

    value: bool

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        same = q("block") == q("block")
        return same if self.value else ~same

    def __str__(self) -> str:
        return "ALL" if self.value else "NONE"


ALL = Constant(True)
NONE = Constant(False)


@dataclass(frozen=True)
class _Compare(Relation):
    attribute: str

    def __post_init__(self) -> None:
        _require(self.attribute, _COMPARABLE, type(self).__name__)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.attribute})"


class EQ(_Compare):
    """The key has the query's value."""

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        return k(self.attribute) == q(self.attribute)


class LT(_Compare):
    """The key's value is below the query's."""

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        return k(self.attribute) < q(self.attribute)


class LE(_Compare):
    """The key's value is at most the query's."""

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        return k(self.attribute) <= q(self.attribute)


@dataclass(frozen=True)
class _Band(Relation):
    attribute: str
    width: int | str

    def __post_init__(self) -> None:
        _require(self.attribute, _COMPARABLE, type(self).__name__)
        if isinstance(self.width, str):
            _require(self.width, _WIDTHS, f"{type(self).__name__} width")
        elif self.width < 1:
            raise ValueError(f"{type(self).__name__} width must be at least 1, got {self.width}")

    def _width(self, q: Get) -> Tensor | int:
        return q(self.width) if isinstance(self.width, str) else self.width

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.attribute},{self.width})"


class NEAR(_Band):
    """The key lies 0 to width-1 behind the query; the query's own value counts as one."""

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        behind = q(self.attribute) - k(self.attribute)
        return (behind >= 0) & (behind < self._width(q))


class AHEAD(_Band):
    """The key lies 0 to width-1 ahead of the query."""

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        ahead = k(self.attribute) - q(self.attribute)
        return (ahead >= 0) & (ahead < self._width(q))


@dataclass(frozen=True)
class Ancestor(Relation):
    """`IN`: the key is the query's ancestor in the draft tree, or the query itself."""

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        return (k("tree_in") <= q("tree_in")) & (q("tree_in") < k("tree_out"))

    def __str__(self) -> str:
        return "IN"


IN = Ancestor()


@dataclass(frozen=True)
class ROUTE(Relation):
    """A precomputed table decides which past blocks are read; other keys are not restricted."""

    name: str

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        if self.name not in routes:
            raise ValueError(f"routing table {self.name!r} is missing; given {sorted(routes)}")
        is_past = (k("block") < q("block")) & (k("block") >= 0)
        return ~is_past | routes[self.name](k("block").clamp(min=0))

    def route_names(self) -> frozenset[str]:
        """The one table this relation reads."""
        return frozenset({self.name})

    def __str__(self) -> str:
        return f"ROUTE({self.name})"


@dataclass(frozen=True)
class POSE(Relation):
    """Of past blocks, the `count` nearest by camera pose; other keys are not restricted.

    Which those are is side information of a request, handed in as the routing table `pose:count`
    (core/poses.py).
    """

    count: int

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"POSE count must be a number of at least 1, got {self.count!r}")

    @property
    def name(self) -> str:
        """Name of the table the relation reads."""
        return f"pose:{self.count}"

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        return ROUTE(self.name).evaluate(q, k, routes)

    def route_names(self) -> frozenset[str]:
        """The one table this relation reads."""
        return frozenset({self.name})

    def __str__(self) -> str:
        return f"POSE({self.count})"


@dataclass(frozen=True)
class _RoleTest(Relation):
    name: str

    def __post_init__(self) -> None:
        _require(self.name, tuple(Role.__members__), f"{type(self).__name__} role")

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}.{self.name}"


class Q(_RoleTest):
    """The query carries a role bit."""

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        return (q("role") & int(Role[self.name])) != 0


class K(_RoleTest):
    """The key carries a role bit."""

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        return (k("role") & int(Role[self.name])) != 0


@dataclass(frozen=True)
class _Pair(Relation):
    left: Relation
    right: Relation

    def _parts(self) -> tuple[Relation, ...]:
        return self.left, self.right


class Both(_Pair):
    """Conjunction."""

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        return self.left.evaluate(q, k, routes) & self.right.evaluate(q, k, routes)

    def __str__(self) -> str:
        return f"{_wrap(self.left, Either)} & {_wrap(self.right, _Pair)}"


class Either(_Pair):
    """Disjunction."""

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        return self.left.evaluate(q, k, routes) | self.right.evaluate(q, k, routes)

    def __str__(self) -> str:
        # Parentheses round a right-hand chain keep the tree, so parsing gives back an equal one.
        return f"{self.left} | {_wrap(self.right, Either)}"


@dataclass(frozen=True)
class Not(Relation):
    """Negation."""

    part: Relation

    def _seen(self, q: Get, k: Get, routes: Routes) -> Tensor:
        return ~self.part.evaluate(q, k, routes)

    def _parts(self) -> tuple[Relation, ...]:
        return (self.part,)

    def __str__(self) -> str:
        return f"~{_wrap(self.part, _Pair)}"


def parse_relation(text: str) -> Relation:
    """Read a relation such as `LE(block) & (NEAR(block,3) | k.SINK)`.

    Args:
        text: Expression of atoms ALL, NONE, IN, EQ/LT/LE(attr), NEAR/AHEAD(attr,width),
            ROUTE(name), POSE(count), q.ROLE, k.ROLE with `&`, `|`, `~` and parentheses.

    Returns:
        The relation; `str` of it parses back to an equal one.

    Raises:
        ValueError: Syntax error, unknown atom, attribute or role.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"mask relation {text!r} does not parse: {error.msg}") from error
    return _build(tree, text)


def _wrap(relation: Relation, kind: type) -> str:
    return f"({relation})" if isinstance(relation, kind) else str(relation)


def _require(name: str, allowed: tuple[str, ...], what: str) -> None:
    if name not in allowed:
        raise ValueError(f"{what} got {name!r}; allowed {list(allowed)}")


_CALLS: dict[str, type] = {
    "EQ": EQ,
    "LT": LT,
    "LE": LE,
    "NEAR": NEAR,
    "AHEAD": AHEAD,
    "ROUTE": ROUTE,
    "POSE": POSE,
}
_NAMES = {"ALL": ALL, "NONE": NONE, "IN": IN}


def _build(node: ast.expr, text: str) -> Relation:
    """Turn a whitelisted syntax tree into a relation; nothing is ever executed."""
    match node:
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return Both(_build(left, text), _build(right, text))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Either(_build(left, text), _build(right, text))
        case ast.UnaryOp(op=ast.Invert(), operand=part):
            return Not(_build(part, text))
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.Attribute(value=ast.Name(id="q"), attr=role):
            return Q(role)
        case ast.Attribute(value=ast.Name(id="k"), attr=role):
            return K(role)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _CALLS:
            return _call(name, arguments, text)
    raise ValueError(
        f"mask relation {text!r}: {ast.unparse(node)!r} is not allowed; "
        f"atoms are {[*_NAMES, *_CALLS]}, q.ROLE, k.ROLE"
    )


def _call(name: str, arguments: list[ast.expr], text: str) -> Relation:
    values: list[str | int] = []
    for argument in arguments:
        match argument:
            case ast.Name(id=value):
                values.append(value)
            case ast.Constant(value=int(value)):
                values.append(value)
            case _:
                raise ValueError(f"mask relation {text!r}: bad argument {ast.unparse(argument)!r}")
    wanted = 2 if name in ("NEAR", "AHEAD") else 1
    if len(values) != wanted:
        raise ValueError(
            f"mask relation {text!r}: {name} takes {wanted} arguments, got {len(values)}"
        )
    return _CALLS[name](*values)
