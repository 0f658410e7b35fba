"""Talking to models in the terminal, side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from muonwire.spectra.models import Opened
from muonwire.spectra.talk import Sampling, prompt_ids, stream

FORGET = "/new"


def chat(
    opened: Sequence[Opened], labels: Sequence[str], sampling: Sampling, *, lines: Iterable[str]
) -> None:
    """Read a line, let every model answer, and so on; each keeps its own conversation.

    The models take turns token by token. On a terminal their answers grow side by side; otherwise they are printed one after the
    other when they are complete.

    Args:
        opened: the models.
        labels: their names.
        sampling: how tokens are chosen; each turn has a seed of its own, the same for every model.
        lines: what the user writes; an empty line or the end of the lines ends the conversation.
    """
    console = Console()
    messages: list[list[dict[str, str]]] = [[] for _ in opened]
    source, turn = iter(lines), 0
    while True:
        if console.is_terminal:
            console.print("[bold]you:[/bold] ", end="")
        line = next(source, "").strip()
        if not line:
            return
        if line == FORGET:
            messages = [[] for _ in opened]
            continue
        for conversation in messages:
            conversation.append({"role": "user", "content": line})
        answers = _turn(opened, labels, messages, replace(sampling, seed=sampling.seed + turn), console)
        for conversation, text in zip(messages, answers, strict=True):
            conversation.append({"role": "assistant", "content": text})
        turn += 1


def _turn(
    opened: Sequence[Opened],
    labels: Sequence[str],
    messages: Sequence[list[dict[str, str]]],
    sampling: Sampling,
    console: Console,
) -> list[str]:
    streams = [stream(o, prompt_ids(o, m), sampling) for o, m in zip(opened, messages, strict=True)]
    ids: list[list[int]] = [[] for _ in opened]
    texts = [""] * len(opened)
    width = max(console.width // len(opened) - 1, 20)

    def shown() -> Columns:
        return Columns([Panel(Text(t), title=n, width=width) for t, n in zip(texts, labels, strict=True)])

    going = set(range(len(opened)))
    # Live redraws in place, which only a terminal can.
    with Live(shown(), console=console, refresh_per_second=8, auto_refresh=console.is_terminal) as live:
        while going:
            for place in sorted(going):
                token = next(streams[place], None)
                if token is None:
                    going.discard(place)
                    continue
                ids[place].append(token)
                tokens = opened[place].tokens
                assert tokens is not None
                texts[place] = tokens.decode(ids[place])
            live.update(shown())
    return texts
