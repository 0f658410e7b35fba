"""Command lines out of frozen dataclasses."""

from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(settings: type[T], args: Sequence[str], *, command: str, about: str, examples: Sequence[str]) -> T:
    """Read ``args`` into ``settings``; options of nested settings need no prefix.

    Bad input ends the process with exit code 2 and a message that names the option.
    """
    description = about + "\n\nexamples:\n" + "\n".join(f"  {example}" for example in examples)
    return tyro.cli(
        settings,
        args=list(args),
        prog=f"muonwire {command}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )
