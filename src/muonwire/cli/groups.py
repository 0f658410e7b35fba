"""Commands that are several: the first argument says which."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from muonwire.errors import UsageError


def listing(modules: Mapping[str, tuple[str, str]]) -> list[str]:
    """A line for each command, aligned: its name, and what it does.

    Args:
        modules: by the command's name the module whose ``main`` runs it, and what it does.
    """
    width = max(map(len, modules))
    return [f"  {name.ljust(width)}  {about}" for name, (_, about) in modules.items()]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A command that consists of several: its first argument names the action.

    A module is imported when its action is called, so that each action loads no more than it needs.

    Args:
        name: what stands after ``muonwire``.
        arguments: what stands after the name, for the usage.
        actions: by the action's name the module whose ``main`` runs it, and what it does.
        notes: lines between the actions and the examples.
        examples: command lines.
    """

    name: str
    arguments: str
    actions: Mapping[str, tuple[str, str]]
    notes: Sequence[str] = ()
    examples: Sequence[str]

    @property
    def usage(self) -> str:
        """The text of --help."""
        notes = ["", *self.notes] if self.notes else []
        examples = [f"  {example}" for example in self.examples]
        head = f"usage: muonwire {self.name} {self.arguments}"
        return "\n".join([head, "", *listing(self.actions), *notes, "", "examples:", *examples])

    def main(self, args: Sequence[str]) -> int:
        """Run the action that the first argument names on the others; returns the exit code.

        Without arguments, or with --help, the usage is printed.

        Raises:
            UsageError: there is no such action.
        """
        if not args or args[0] in ("-h", "--help"):
            print(self.usage)
            return 0 if args else 2
        if args[0] not in self.actions:
            allowed = ", ".join(self.actions)
            raise UsageError(f"{self.name}: {args[0]!r} is not an action; allowed are {allowed}")
        module, _ = self.actions[args[0]]
        code: int = importlib.import_module(module).main(args[1:])
        return code
