"""Python's literals and expressions in texts, read by one thread at a time."""

import ast
import threading
from typing import Any

# CPython 3.11 counts the depth of syntax trees once for all threads, so that two that parse at once may end with "SystemError: AST
# constructor recursion depth mismatch" (python/cpython issue 106905). Replicas as threads parse recipes at the same moment.
_ONE_AT_A_TIME = threading.RLock()


def read_expression(text: str) -> ast.expr:
    """The syntax tree of one expression.

    Raises:
        SyntaxError, ValueError: the text is no expression.
    """
    with _ONE_AT_A_TIME:
        return ast.parse(text, mode="eval").body


def read_literal(text: str) -> Any:
    """The value of a literal of Python: numbers, strings, None, tuples and such.

    Raises:
        SyntaxError, ValueError: the text is none.
    """
    return ast.literal_eval(read_expression(text.lstrip(" \t")))
