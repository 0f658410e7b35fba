"""Command lines out of frozen dataclasses."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from torch import Tensor

from muonwire.errors import UsageError

T = TypeVar("T")
# Texts that are given by place, without an option's name.
Positionals = Annotated[tuple[str, ...], tyro.conf.Positional]


def parse(
    settings: type[T],
    args: Sequence[str],
    *,
    command: str,
    about: str,
    examples: Sequence[str],
    default: T | None = None,
) -> T:
    """Read ``args`` into ``settings``; options of nested settings need no prefix.

    Where a nested field may be of several types, ``default`` says which.

    Bad input ends the process with exit code 2 and a message that names the option.
    """
    description = about + "\n\nexamples:\n" + "\n".join(f"  {example}" for example in examples)
    return tyro.cli(
        settings,
        args=list(args),
        prog=f"muonwire {command}",
        description=description,
        default=settings() if default is None else default,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
    )


def task_name(args: Sequence[str]) -> str:
    """The value of --task, which decides what other options there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    # A missing value is left to tyro, whose message names the option.
    parser.add_argument("--task", default="text", nargs="?", const="text")
    return str(parser.parse_known_args(list(args))[0].task)


def command(
    options: type[T], *, name: str, about: str, examples: Sequence[str]
) -> Callable[[Callable[[T], int]], Callable[[Sequence[str]], int]]:
    """Make of a function from options to an exit code the command that reads its arguments into those options.

    Args:
        options: a frozen dataclass, a field for each option, with their meanings in its docstring.
        name: what stands after ``muonwire``, such as "spectra show".
        about: what the command does, for --help.
        examples: command lines, for --help.
    """

    def decorate(run: Callable[[T], int]) -> Callable[[Sequence[str]], int]:
        def main(args: Sequence[str]) -> int:
            return run(parse(options, args, command=name, about=about, examples=examples))

        main.__doc__ = run.__doc__
        return main

    return decorate


def matrix_shape(text: str, *, command: str) -> tuple[int, int]:
    """(rows, columns) out of a text such as "512x2048".

    Raises:
        UsageError: it is not of that form.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise UsageError(f"{command}: shape is {text!r}; it takes ROWSxCOLUMNS, such as 512x2048")
    return int(parts[0]), int(parts[1])


def check_chart(path: Path | None, *, command: str) -> None:
    """Raise UsageError where no chart can be written to ``path``."""
    if path is not None and path.suffix not in (".png", ".html", ".svg"):
        raise UsageError(f"{command}: chart is {path}; it takes a .png, .html or .svg file")


def captured_matrices(path: Path, *, command: str, script: str) -> dict[str, Tensor]:
    """The matrices of a safetensors file, in float32.

    Raises:
        UsageError: there is no such file; the message names the script that makes one.
    """
    if not path.is_file():
        raise UsageError(f"{command}: captured is {path}, which is not a file; make one with {script}")
    from safetensors.torch import load_file

    return {name: tensor.float() for name, tensor in load_file(path).items() if tensor.ndim == 2}
