"""What a replica tells of a run while it lasts: its host's events and status, and for whom it waits."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from muonwire.optim.prometheus import PrometheusFile
from muonwire.train.events import STATUS, Events
from muonwire.train.loop import Trainer
from muonwire.train.progress import Display
from muonwire.transport.members import MembersTransport
from muonwire.transport.waiting import SAID_AT_S, watching

# The first replica of a host speaks for it; the others say something where a wait is so long that the first may be the cause.
OTHERS_SAY_AFTER_S = 30.0


def first_of_host(rank: int) -> bool:
    """Whether this replica is the first on its machine, as the launcher counts them; rank 0 where that does not say."""
    return os.environ.get("LOCAL_RANK", str(rank)) == "0"


@contextmanager
def recording(trainer: Trainer, display: Display) -> Iterator[None]:
    """Within the block the trainer's host has its events and status written, and a file for Prometheus where one is wanted; waits
    that take long are told of.

    All replicas enter it together. Where hosts share a folder, rank 0 writes for all.

    Args:
        trainer: of this replica.
        display: of the run's progress.
    """
    transport, everyone = trainer.transport, trainer.everyone
    first_here = first_of_host(everyone.rank)
    events = Events(
        trainer.folder,
        transport,
        steps=trainer.config.steps,
        step=trainer.step,
        enabled=first_here or everyone.rank == 0,
    )

    def show(text: str) -> None:
        display.wait(text)
        events.waiting(text)

    def say(line: str) -> None:
        display.say(line if everyone.rank == 0 else f"replica {everyone.rank}: {line}")

    first_s = SAID_AT_S[0] if first_here else OTHERS_SAY_AFTER_S
    with ExitStack() as opened:
        opened.enter_context(watching(transport.waits, say=say, show=show, first_s=first_s))
        if everyone.rank == 0:
            opened.enter_context(events)
        # Rank 0 has written into its folder before the others look whether theirs is the same.
        token = everyone.gather(events.token.encode(), purpose="control")[0].decode()
        if everyone.rank > 0:
            events.enabled = events.enabled and _token_in(trainer) != token
            opened.enter_context(events)
        trainer.events = events
        path = trainer.config.prometheus
        if path is not None and (first_here or everyone.rank == 0):
            name = transport.name if isinstance(transport, MembersTransport) else str(everyone.rank)
            labels = {"run": trainer.folder.resolve().name, "replica": name}
            trainer.prometheus = PrometheusFile(path, trainer.optimizer, labels=labels)
        yield


def _token_in(trainer: Trainer) -> str | None:
    try:
        return str(json.loads((trainer.folder / STATUS).read_text())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
