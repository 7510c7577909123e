"""Lines of code that a card shows, carried out without running them as code."""

from __future__ import annotations

import ast
from typing import Any


def call(model: Any, line: str) -> None:
    """Call the method of the model that a line of code calls."""
    (statement,) = ast.parse(line).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    method = statement.value.func
    assert isinstance(method, ast.Attribute)
    assert ast.unparse(method.value) == "model"
    given = {str(key.arg): ast.literal_eval(key.value) for key in statement.value.keywords}
    getattr(model, method.attr)(*map(ast.literal_eval, statement.value.args), **given)
