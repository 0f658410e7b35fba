"""What a framework says between replicas by itself, sent through the transport: every byte is counted, and faults are named.

Its purpose is "control", so it does not count as training.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from muonwire.errors import UsageError
from muonwire.integrations.shards import same_among
from muonwire.transport import Transport, digest

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda stacked: (stacked if stacked.is_floating_point() else stacked.float()).mean(0),
    "sum": lambda stacked: stacked.sum(0),
    "max": lambda stacked: stacked.amax(0),
    "min": lambda stacked: stacked.amin(0),
}
ALIKE = "start them with the same program, the same checkpoint to go on from, and as many batches"
# By the names that torch.distributed has for them.
REDUCTIONS["avg"] = REDUCTIONS["mean"]


class Collectives:
    """Small operations between all replicas, each of which says where in the framework's loop its replica is.

    Args:
        everyone: between all replicas.
        who: begins every error's message.
    """

    def __init__(self, everyone: Transport, *, who: str) -> None:
        self._everyone = everyone
        self._who = who

    def gather(self, place: str, payload: bytes = b"", *, remedy: str = ALIKE) -> list[bytes]:
        """The replicas' payloads, in rank order.

        Args:
            place: where the replica is, such as "barrier setup"; without a line break.
            payload: of this replica. Default: none.
            remedy: for the message.

        Raises:
            UsageError: the replicas are at different places; on all of them.
        """
        own = place.encode()
        parts = [
            text.partition(b"\n") for text in self._everyone.gather(own + b"\n" + payload, purpose="control")
        ]
        if any(its != own for its, _, _ in parts):
            places = "; ".join(f"replica {rank}: {its.decode()}" for rank, (its, _, _) in enumerate(parts))
            raise UsageError(f"{self._who}: the replicas are at different places ({places}); {remedy}")
        return [value for _, _, value in parts]

    def agree(self, what: str, problem: str, *, remedy: str) -> None:
        """Raise UsageError on all replicas where one has a problem.

        Args:
            what: could not be done, such as "save last.ckpt".
            problem: of this replica, such as "cannot write"; "" for none.
            remedy: for the message.
        """
        problems = [text.decode() for text in self.gather(what, problem.encode())]
        if any(problems):
            told = "; ".join(f"replica {rank} {text}" for rank, text in enumerate(problems) if text)
            raise UsageError(f"{self._who}: cannot {what}: {told}. Remedy: {remedy}")

    def broadcast(self, value: Any, *, source: int) -> Any:
        """What the replica ``source`` has, as JSON gives it back, on that one too: tuples are lists, keys are texts.

        Raises:
            UsageError: JSON cannot hold it; on all replicas.
        """
        mine = self._everyone.rank == source
        text, problem = "", ""
        if mine:
            try:
                text = json.dumps(value)
            except (TypeError, ValueError) as error:
                problem = f"has a {type(value).__name__} ({error})"
        found = json.loads(self.gather("broadcast", json.dumps([text, problem]).encode())[source])
        if found[1]:
            raise UsageError(
                f"{self._who}: cannot broadcast: replica {source} {found[1]}; texts, numbers, lists and dicts of them are allowed"
            )
        return json.loads(found[0])

    def decisions(self, decision: bool) -> list[bool]:
        """The replicas' decisions, in rank order."""
        return [value == b"1" for value in self.gather("decision", b"%d" % bool(decision))]

    def each(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        """The replicas' tensors, in rank order, on this one's device; they have one dtype, and shapes of their own.

        Args:
            tensor: of this replica.
            group: not used; torchmetrics, which calls this, gives one. Default: none.

        Raises:
            UsageError: they have several dtypes.
        """
        plain = tensor.detach().cpu().contiguous()
        payload = plain.view(-1).view(torch.uint8).numpy().tobytes()
        shape = json.dumps(list(plain.shape)).encode()
        tensors = []
        for message in self.gather(f"tensor of {plain.dtype}", shape + b"\n" + payload):
            sizes, _, values = message.partition(b"\n")
            empty = torch.empty(json.loads(sizes), dtype=plain.dtype)
            filled = (
                torch.frombuffer(bytearray(values), dtype=plain.dtype).view_as(empty) if values else empty
            )
            tensors.append(filled.to(tensor.device))
        return tensors

    def stack(self, tensor: Tensor) -> Tensor:
        """The replicas' tensors, (...) -> (replicas, ...), on this one's device; they have one dtype and shape.

        Raises:
            UsageError: they do not; on all replicas.
        """
        tensors = self.each(tensor)
        shapes = [tuple(its.shape) for its in tensors]
        if len(set(shapes)) > 1:
            raise UsageError(
                f"{self._who}: the replicas' tensors have the shapes {', '.join(map(str, shapes))} by rank; give one shape on all"
            )
        return torch.stack(tensors)

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        """The tensors reduced over the replicas in rank order, identical bits on all; integers have a float32 mean.

        Args:
            tensor: of this replica.
            how: "mean" ("avg"), "sum", "max" or "min".

        Raises:
            UsageError: another ``how``, or the tensors differ in dtype or shape.
        """
        if how not in REDUCTIONS:
            raise UsageError(f"{self._who}: the reduction is {how!r}; allowed are {', '.join(REDUCTIONS)}")
        return REDUCTIONS[how](self.stack(tensor))

    def check_data(self, batch: Any, *, remedy: str) -> None:
        """Refuse replicas that draw the same batch; one without tensors says nothing.

        Args:
            batch: of this replica: tensors, in lists, tuples or dicts.
            remedy: for the message.

        Raises:
            UsageError: two have the same; on all replicas.
        """
        tensors = [leaf for leaf in _pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        seen = self.gather("first batch", b"".join(digest(tensor) for tensor in tensors))
        if same := same_among(seen):
            raise UsageError(
                f"{self._who}: replicas {' and '.join(map(str, same))} drew the same first batch; give each replica data of its "
                f"own: {remedy}"
            )
