"""Conditions on runs (`optim.lr>1e-3 and val_acc>0.9`), read as Python expressions of a few kinds and never executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from perceiver.config import UserError

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, among: value in among,
    ast.NotIn: lambda value, among: value not in among,
}
RULES = 'compare fields and metrics with values by == != < <= > >= in, joined by and, or, not: "optim.lr>1e-3 and val_acc>0.9"'


class Condition:
    """A condition on a run's fields and metrics.

    Args:
        text: comparisons of names with values, joined by `and`, `or` and `not`.

    Raises:
        UserError: anything else.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.names: set[str] = set()
        """Fields and metrics that it is about."""
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
            self._check(self._tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UserError(f"--where {text!r} cannot be read: {RULES}") from None

    def matches(self, values: Mapping[str, Any]) -> bool:
        """Whether a run with these values meets the condition. A comparison with a value that is missing is not met."""
        return bool(self._truth(self._tree, values))

    def _check(self, node: ast.expr) -> None:
        """Raises ValueError for whatever is no condition; collects the names."""
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self._check(value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._check(node.operand)
        elif isinstance(node, ast.Compare) and all(type(op) in COMPARISONS for op in node.ops):
            for operand in (node.left, *node.comparators):
                self._operand(operand)
        else:
            raise ValueError

    def _operand(self, node: ast.expr) -> None:
        if isinstance(node, (ast.Name, ast.Attribute)):
            self.names.add(_dotted(node))
        else:
            ast.literal_eval(node)

    def _truth(self, node: ast.expr, values: Mapping[str, Any]) -> bool:
        if isinstance(node, ast.BoolOp):
            return (all if isinstance(node.op, ast.And) else any)(self._truth(value, values) for value in node.values)
        if isinstance(node, ast.UnaryOp):
            return not self._truth(node.operand, values)
        assert isinstance(node, ast.Compare)
        operands = [_value(operand, values) for operand in (node.left, *node.comparators)]
        pairs = zip(node.ops, operands, operands[1:], strict=False)
        return all(_compare(type(op), left, right) for op, left, right in pairs)


def _compare(op: type[ast.cmpop], left: Any, right: Any) -> bool:
    if left is MISSING or right is MISSING:
        return False
    try:
        return COMPARISONS[op](left, right)
    except TypeError:  # None, or a text beside a number
        return False


MISSING = object()


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, (ast.Name, ast.Attribute)):
        return values.get(_dotted(node), MISSING)
    return ast.literal_eval(node)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError
