"""Docstrings as Markdown: doctests become code blocks, so does what follows ``::``, and a value's comment is its docstring."""

import re
from textwrap import dedent
from typing import Any

from griffe import Attribute, Docstring, Extension, Object

# An example: a prompt at the start of a line, up to the next empty line or the end.
DOCTEST = re.compile(r"^( *)>>> .*?(?=\n *\n|\Z)", re.DOTALL | re.MULTILINE)
FLAGS = re.compile(r" *# doctest: .*$", re.MULTILINE)
LITERAL = re.compile(r"::\n\n((?:    .*\n?)+)", re.MULTILINE)


def fenced(language: str, code: str) -> str:
    """``code`` as a block of Markdown."""
    return f"```{language}\n{dedent(code).strip()}\n```\n"


def to_markdown(docstring: str) -> str:
    """The docstring with its doctests and literal blocks fenced.

    >>> print(to_markdown("Twice a number.\\n\\n>>> twice(2)\\n4"))
    Twice a number.
    <BLANKLINE>
    ```pycon
    >>> twice(2)
    4
    ```
    <BLANKLINE>
    """
    text = LITERAL.sub(lambda m: ":\n\n" + fenced("python", m[1]), docstring)
    return DOCTEST.sub(lambda m: fenced("pycon", FLAGS.sub("", m[0])), text)


def comment_above(value: Attribute) -> str:
    """The comment above a module's value."""
    lines = value.lines_collection[value.filepath][: value.lineno - 1]
    comment: list[str] = []
    while lines and lines[-1].startswith("# "):
        comment.insert(0, lines.pop()[2:])
    return "\n".join(comment)


class Docstrings(Extension):  # type: ignore[misc]
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if (
            isinstance(obj, Attribute)
            and obj.parent.is_module
            and not obj.docstring
            and (text := comment_above(obj))
        ):
            obj.docstring = Docstring(text, parent=obj)
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
