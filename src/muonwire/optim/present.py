"""What replicas say of themselves when they meet."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

from muonwire.errors import ExchangeError


@dataclass(frozen=True, kw_only=True)
class Present:
    """What a replica says of itself when the replicas of a new quorum meet.

    Args:
        name: of the replica.
        joins: it brings nothing to this synchronization.
        commits: synchronizations that it knows to be done.
        steps: optimizer steps that it has taken.
        alone: of these since its last synchronization.
        gradients: that it was given.
        rates: learning rate and weight decay of each group.
        weights: digest of the shared weights, hexadecimal.
        groups: digest of the groups' description, hexadecimal.
        attempted: the quorum of its last attempt at this synchronization; -1 for none.
        prepared: it had all messages of that attempt.
        replicas: that act as this one. Default: 1.
    """

    name: str
    joins: bool
    commits: int
    steps: int
    alone: int
    gradients: int
    rates: Sequence[Sequence[float]]
    weights: str
    groups: str
    attempted: int
    prepared: bool
    replicas: int = 1

    @property
    def place(self) -> str:
        """Where in the training it stands."""
        return f"step {self.steps}, {self.alone} alone, gradient {self.gradients}"

    @classmethod
    def read(cls, text: bytes, *, rank: int) -> "Present":
        """Read what replica ``rank`` sent.

        Raises:
            ExchangeError: it is nothing of this kind.
        """
        try:
            values = json.loads(text)
            own = cls(**{f.name: values[f.name] for f in fields(cls)})
            counts = (own.commits, own.steps, own.alone, own.gradients, own.attempted + 1, own.replicas - 1)
            if not all(type(n) is int and n >= 0 for n in counts) or not isinstance(own.name, str):
                raise ValueError("a count is not a number")
            return own
        except (ValueError, KeyError, TypeError) as error:
            raise ExchangeError(
                f"replica {rank} does not say who it is ({error}); run the same muonwire on all replicas"
            ) from error
