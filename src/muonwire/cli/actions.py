"""Commands that are several: the first argument says which action."""

from collections.abc import Callable, Mapping, Sequence

from muonwire.errors import UsageError

Action = Callable[[Sequence[str]], int]


def dispatch(args: Sequence[str], actions: Mapping[str, Action], *, command: str, usage: str) -> int:
    """Run the action that the first argument names on the others; returns the exit code.

    Without arguments, or with --help, the usage is printed.

    Raises:
        UsageError: there is no such action.
    """
    if not args or args[0] in ("-h", "--help"):
        print(usage)
        return 0 if args else 2
    if args[0] not in actions:
        raise UsageError(f"{command}: {args[0]!r} is not an action; allowed are {', '.join(actions)}")
    return actions[args[0]](args[1:])
