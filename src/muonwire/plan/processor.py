"""What the processor spends on an exchange, measured on samples: encoding, decoding, and what the optimizer does with them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from typing_extensions import override

from muonwire import recipes
from muonwire.plan.exchanges import Asked, Exchanged
from muonwire.recipes import parse_recipe
from muonwire.stages import Mean
from muonwire.transport.base import SingleReplica, Transport, check_count
from muonwire.transport.meter import Meter

# The samples: one square matrix, no larger than the model's largest, and several small ones. Where parts have owners, each has one
# of the larger matrices, of about the middle side, and as many of the small ones as every other.
LARGEST_SIDE, MIDDLE_SIDE, SMALL_SIDE, NUM_SMALL = 1024, 256, 16, 16
TIMED = 5
NEVER = 10**9
# Options of when parts of a synchronization travel. Samples are synchronized at once, which takes the processor as long.
WHEN = ("growth", "fragments", "delay", "mix", "merge")


class Echo(Transport):
    """All replicas send what this one sends, in no time: also its part to its owner, and the mean of that part.

    So the parts of all owners must be of the same shapes, which the samples are made for.
    """

    def __init__(self, world_size: int) -> None:
        self.rank = 0
        self.world_size = world_size
        self.meter = Meter()

    @override
    def gather(self, payload: bytes, *, purpose: str = "update", observers: bool = False) -> list[bytes]:
        self.agreed |= self.requested
        return [payload] * self.world_size

    @override
    def all_to_all(self, payloads: Sequence[bytes], *, purpose: str = "update") -> list[bytes]:
        check_count(payloads, self.world_size)
        self.agreed |= self.requested
        return [payloads[self.rank]] * self.world_size

    @override
    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        self.agreed |= self.requested
        return list(tensors)


@dataclass(frozen=True, kw_only=True)
class ProcessorCost:
    """Seconds that one synchronization of a recipe takes beside the link.

    Args:
        per_entry_s: of each entry of a tensor.
        per_tensor_s: of each tensor besides.
    """

    per_entry_s: float
    per_tensor_s: float

    def seconds(self, params: Sequence[Tensor]) -> float:
        """Of these tensors."""
        return self.per_entry_s * sum(p.numel() for p in params) + self.per_tensor_s * len(params)


def cost_of(what: Exchanged, *, replicas: int, largest_numel: int) -> ProcessorCost:
    """Time the synchronizations of a recipe on samples, as they are with so many replicas.

    Decoding grows with the number of replicas, and is part of it. Of a recipe that synchronizes in every step, what plain SGD takes
    is left out. The sums of dense means are not timed, and take no time here.

    Args:
        what: the recipe's exchange.
        replicas: whose payloads are decoded.
        largest_numel: entries of the largest tensor that it is to exchange.
    """
    if all(isinstance(talk.stage, Mean) for talk in what.talks):
        return ProcessorCost(per_entry_s=0.0, per_tensor_s=0.0)
    has_owners = any(asked.operation == "parts" for asked in _asked(what, replicas))
    small_count = replicas * -(-NUM_SMALL // replicas) if has_owners else NUM_SMALL
    count = replicas if has_owners else 1
    numel = max(LARGEST_SIDE**2 // count, min(MIDDLE_SIDE**2, 4 * LARGEST_SIDE**2 // count))
    side = LARGEST_SIDE
    while side > 2 * SMALL_SIDE and side * side > min(largest_numel, numel):
        side //= 2
    small_s = _seconds(what, SMALL_SIDE, small_count, replicas) / small_count
    large_s = _seconds(what, side, count, replicas) / count
    small, large = SMALL_SIDE**2, side**2
    per_entry_s = max((large_s - small_s) / (large - small), 0.0)
    return ProcessorCost(per_entry_s=per_entry_s, per_tensor_s=max(small_s - per_entry_s * small, 0.0))


def _asked(what: Exchanged, replicas: int) -> list[Asked]:
    return [asked for together in what.rounds(replicas, what.fragments) for asked in together]


def _seconds(what: Exchanged, side: int, count: int, replicas: int) -> float:
    """One synchronization of so many square matrices."""
    name, options = parse_recipe(what.recipe)
    if what.local is not None:
        options = {key: value for key, value in options.items() if key not in WHEN} | {"interval": NEVER}
    model = _sample(side, count)
    optimizer = recipes.build(name, model, lr=0.01, transport=Echo(replicas), **options)
    if what.local is not None:
        return _timed(optimizer.synchronize, before=optimizer.step)
    plain = recipes.build("sgd", _sample(side, count), lr=0.01, transport=SingleReplica())
    with_exchange_s = _timed(optimizer.step)
    return max(with_exchange_s - _timed(plain.step), 0.0)


def _sample(side: int, count: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(count)))
    # The gradients stay, and are those of every step.
    for p in model.parameters():
        p.data = torch.randn(side, side, generator=generator)
        p.grad = torch.randn(side, side, generator=generator)
    return model


def _timed(run: Callable[[], object], *, before: Callable[[], object] = lambda: None) -> float:
    times = []
    # The first turn makes what later ones keep.
    for _ in range(TIMED + 1):
        before()
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return median(times[1:])
