"""What a plan must know of the machines: the time of a step, and of the processor's part of each exchange."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import Any

import torch

from muonwire import recipes
from muonwire.plan.exchanges import Exchanged
from muonwire.plan.processor import ProcessorCost, cost_of
from muonwire.plan.rates import Rates
from muonwire.tasks.base import Task
from muonwire.transport.base import SingleReplica, Transport
from muonwire.transport.frames import FrameTransport

# The recipe whose step stands for what replicas compute in the optimizer besides exchanges.
INNER = {"polar": "muon", "adam": "adamw", "plain": "sgd"}
# Steps are timed for so long, or until their mean is known to that share of it (one standard error) and there are so many. The
# first one makes states and buffers, and does not count.
STEPS_S, KNOWN_TO, LEAST_STEPS = 4.0, 0.02, 8
# Messages grow until they take so long, or are so large.
FIRST_BYTES, LARGEST_BYTES, LONG_ENOUGH_S = 1 << 14, 1 << 26, 0.5
PINGS = 21


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Times on the machines of a run; the slowest replica's.

    Args:
        compute_s: forward and backward of a step.
        optimizer_s: the optimizer of a step without exchanges, by what it computes (``Exchanged.inner``).
        costs: the processor's part of a synchronization, by ``Exchanged.key``.
        rates: of the link, where they were measured. Default: they were not.
    """

    compute_s: float
    optimizer_s: Mapping[str, float]
    costs: Mapping[str, ProcessorCost]
    rates: Rates | None = None

    def step_s(self, what: Exchanged) -> float:
        """A step without exchange."""
        return self.compute_s + self.optimizer_s[what.inner]

    def exchange_s(self, what: Exchanged, fragments: Sequence[int] | None = None) -> float:
        """The processor's part of one synchronization of these fragments. Default: of all."""
        return self.costs[what.key].seconds(
            what.params_of(what.fragments if fragments is None else fragments)
        )


def calibrated(plans: Sequence[Exchanged], *, replicas: int) -> dict[str, ProcessorCost]:
    """The processor's part of the exchanges of some recipes, on this machine."""
    return {
        key: cost_of(what, replicas=replicas, largest_numel=max(p.numel() for p in what.params))
        for key, what in {what.key: what for what in plans}.items()
    }


def as_told(step_s: float, plans: Sequence[Exchanged], *, replicas: int) -> Machine:
    """Machines whose step takes ``step_s`` with its optimizer; the processor's part of exchanges is that of this machine."""
    return Machine(
        compute_s=step_s,
        optimizer_s=dict.fromkeys(INNER, 0.0),
        costs=calibrated(plans, replicas=replicas),
    )


def measured(task: Task, plans: Sequence[Exchanged], transport: Transport, *, replicas: int) -> Machine:
    """Measure the link, the step and the processor, on all replicas at the same time; each gets the slowest one's figures.

    Args:
        task: whose steps are timed.
        plans: the recipes.
        transport: between the replicas. With one alone the link is not measured.
        replicas: of the run.
    """
    rates = measure_rates(transport) if isinstance(transport, FrameTransport) else None
    compute_s, optimizer_s = _measure_steps(task, sorted({what.inner for what in plans}), transport)
    transport.gather(b"", purpose="control")
    costs = calibrated(plans, replicas=replicas)
    own = {
        "compute_s": compute_s,
        "optimizer_s": optimizer_s,
        "costs": {text: asdict(cost) for text, cost in costs.items()},
    }
    told = [json.loads(p) for p in transport.gather(json.dumps(own).encode(), purpose="control")]
    return Machine(
        compute_s=max(t["compute_s"] for t in told),
        optimizer_s={inner: max(t["optimizer_s"][inner] for t in told) for inner in optimizer_s},
        costs={text: _slowest([t["costs"][text] for t in told]) for text in costs},
        rates=rates,
    )


def _slowest(costs: Sequence[Mapping[str, float]]) -> ProcessorCost:
    return ProcessorCost(
        per_entry_s=max(c["per_entry_s"] for c in costs), per_tensor_s=max(c["per_tensor_s"] for c in costs)
    )


def _measure_steps(task: Task, inners: Sequence[str], transport: Transport) -> tuple[float, dict[str, float]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute_s: list[float] = []
    optimizer_s: dict[str, float] = {}
    for inner in inners:
        model = task.build_model(seed=0).to(device)
        optimizer: Any = recipes.build(INNER[inner], model, lr=1e-3, transport=SingleReplica())
        transport.gather(b"", purpose="control")
        times: list[tuple[float, float]] = []
        began_s = time.perf_counter()
        while not _known(times, time.perf_counter() - began_s):
            step = len(times) + 1
            start_s = time.perf_counter()
            batch = task.batch(seed=0, step=step, rank=transport.rank, world_size=transport.world_size)
            loss = task.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            float(loss.detach())
            computed_s = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            times.append((computed_s - start_s, time.perf_counter() - computed_s))
        # Means, since a run takes all of its steps; a stall is part of them.
        compute_s += [computed for computed, _ in times[1:]]
        optimizer_s[inner] = fmean(stepped for _, stepped in times[1:])
    return fmean(compute_s), optimizer_s


def _known(times: Sequence[tuple[float, float]], spent_s: float) -> bool:
    """Whether steps were timed for long enough."""
    sums = [computed + stepped for computed, stepped in times[1:]]
    if len(sums) < 2 or (len(sums) < LEAST_STEPS and spent_s < STEPS_S):
        return False
    return spent_s >= STEPS_S or stdev(sums) / math.sqrt(len(sums)) < KNOWN_TO * fmean(sums)


def measure_rates(transport: FrameTransport) -> Rates:
    """The rates of the slowest replica each way, and the delay; all replicas call it together.

    Each in turn sends to all others at once, and receives from all at once; then all send to all, as an exchange does. A replica
    that receives faster than all others together send is not seen to be that fast.
    """
    latency_s = _ping(transport)
    num_bytes = FIRST_BYTES
    while (elapsed_s := _all_to_all(transport, num_bytes)) < LONG_ENOUGH_S and num_bytes < LARGEST_BYTES:
        num_bytes *= 2 if elapsed_s > LONG_ENOUGH_S / 4 else 4
    mbit = 8e-6 * num_bytes * len(transport.peers)

    def rate(elapsed_s: float) -> float:
        return mbit / max(elapsed_s - latency_s, 0.1 * elapsed_s)

    together = rate(elapsed_s)
    hubs = range(transport.world_size)
    up = min(rate(_hub(transport, hub, num_bytes, sends=True)) for hub in hubs)
    down = min(rate(_hub(transport, hub, num_bytes, sends=False)) for hub in hubs)
    if together < min(up, down):
        up, down = (together, down) if up <= down else (up, together)
    return Rates(up_mbit_s=up, down_mbit_s=down, latency_s=latency_s, goodput=True)


def _ping(transport: FrameTransport) -> float:
    times = []
    for _ in range(PINGS):
        start_s = time.perf_counter()
        transport.gather(b"", purpose="control")
        times.append(time.perf_counter() - start_s)
    return _agreed(transport, median(times))


def _all_to_all(transport: FrameTransport, num_bytes: int) -> float:
    return _timed(transport, transport.peers, transport.peers, num_bytes)


def _hub(transport: FrameTransport, hub: int, num_bytes: int, *, sends: bool) -> float:
    others = transport.peers if transport.rank == hub else [hub]
    is_sender = sends == (transport.rank == hub)
    return _timed(transport, others if is_sender else [], [] if is_sender else others, num_bytes)


def _timed(
    transport: FrameTransport, receivers: Sequence[int], senders: Sequence[int], num_bytes: int
) -> float:
    """The seconds until the slowest replica has received all."""
    body = torch.zeros(num_bytes, dtype=torch.uint8, device=transport.device)
    buffers = {peer: torch.empty_like(body) for peer in senders}
    transport.gather(b"", purpose="control")
    start_s = time.perf_counter()
    transport.carry(b"", dict.fromkeys(receivers, body), buffers, lambda _: None)
    return _agreed(transport, time.perf_counter() - start_s)


def _agreed(transport: Transport, seconds: float) -> float:
    """The longest of all replicas' times; the same on all."""
    told = transport.gather(json.dumps(seconds).encode(), purpose="control")
    return float(max(json.loads(text) for text in told))
