"""What the replicas of a run tell each other, and errors that all of them raise where one has a problem."""

import json
from typing import Any

from muonwire.errors import UsageError
from muonwire.transport.base import Transport


def tell(own: dict[str, Any], transport: Transport) -> list[dict[str, Any]]:
    """Every replica's message of JSON, in rank order."""
    return [json.loads(text) for text in transport.gather(json.dumps(own).encode(), purpose="control")]


def all_or_none(problem: str, transport: Transport) -> None:
    """Raise UsageError on all replicas where one of them has a problem; all call it together."""
    raise_told(
        {rank: message["problem"] for rank, message in enumerate(tell({"problem": problem}, transport))}
    )


def raise_told(problems: dict[int, str]) -> None:
    """Raise UsageError with what the replicas told, each text once; nothing where no replica has a problem."""
    by_text: dict[str, list[str]] = {}
    for rank, text in problems.items():
        if text:
            by_text.setdefault(text, []).append(str(rank))
    if not by_text:
        return
    if len(by_text) == 1 and len(next(iter(by_text.values()))) == len(problems):
        raise UsageError(next(iter(by_text)))
    raise UsageError("; ".join(f"replica {', '.join(ranks)}: {text}" for text, ranks in by_text.items()))
