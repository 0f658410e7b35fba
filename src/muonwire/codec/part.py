"""What the parts of a pipeline share: a name, options, a textual form, and what they know of the round."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import ClassVar

from torch import Tensor

from muonwire.errors import UsageError

Shape = tuple[int, ...]
# Tensors by name that a codec's sender keeps from round to round.
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a part may know of one encoding besides the values.

    Args:
        seed: 32 bits, the same on all replicas in one round and another in the next. Default: 0.
        state: what the sender keeps of this tensor from round to round, which ``init`` made. Default: empty, a cold start.
    """

    seed: int = 0
    state: State = field(default_factory=dict)


class Part:
    """One named part of a pipeline; its subclasses are frozen dataclasses whose fields are its options."""

    name: ClassVar[str]
    # Whether decoding needs the round's seed, which then travels in the body.
    seeded: ClassVar[bool] = False

    def __str__(self) -> str:
        options = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) is not None
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name

    def check_choice(self, option: str, allowed: Iterable[str]) -> None:
        """Raise UsageError where the value of ``option`` is none of those allowed."""
        value = getattr(self, option)
        if value not in allowed:
            raise UsageError(f"{self.name}: {option} is {value!r}; allowed are {', '.join(allowed)}")

    def check_count(self, option: str) -> None:
        """Raise UsageError where the value of ``option`` is not an integer of at least 1."""
        value = getattr(self, option)
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{self.name}: {option} is {value}; it must be an integer of at least 1")

    def check_share(self, option: str) -> None:
        """Raise UsageError where the value of ``option`` does not lie in (0, 1]."""
        value = getattr(self, option)
        if not 0 < value <= 1:
            raise UsageError(f"{self.name}: {option} is {value}; it must lie in (0, 1]")
