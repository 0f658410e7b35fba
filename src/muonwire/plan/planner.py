"""From a model and a link to a table of recipes: how often each synchronizes, what it sends, and what that costs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from muonwire.errors import UsageError
from muonwire.plan.candidates import FRAGMENTS, Candidate, same_bytes, without_fragments
from muonwire.plan.commands import Command
from muonwire.plan.exchanges import Exchanged, Traffic, exchanged, interval_of
from muonwire.plan.loss import Cost, expected_cost
from muonwire.plan.machine import Machine
from muonwire.plan.model import PlannedModel
from muonwire.plan.rates import Rates

BYTES_PER_GB = 1e9
LARGEST_STEPS = 10**9
# Owners take the place of a gather, and streaming is offered, where they take so much less of the time of an exchange, or of a run.
OWNERS_SAVE, STREAMING_SAVES = 0.1, 0.01


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one synchronization of one replica, of all fragments.

    Args:
        link_s: until all messages have come.
        hidden_s: of these, the ones in which local steps go on.
        processor_s: of encoding, decoding, and what the optimizer does with them.
    """

    link_s: float = 0.0
    hidden_s: float = 0.0
    processor_s: float = 0.0

    def __add__(self, other: "Times") -> "Times":
        return Times(
            link_s=self.link_s + other.link_s,
            hidden_s=self.hidden_s + other.hidden_s,
            processor_s=self.processor_s + other.processor_s,
        )

    @property
    def exchange_s(self) -> float:
        """In which the replica takes no step."""
        return self.link_s - self.hidden_s + self.processor_s


@dataclass(frozen=True, kw_only=True)
class Line:
    """One recipe of a plan. Bytes and times are those of one replica: the one that sends, or receives, most.

    Args:
        recipe: in textual form, with its H.
        steps: of the run.
        spacing: steps a synchronization, on average over the run.
        synchronizations: in the run, of all fragments each.
        up_bytes, down_bytes: of one synchronization, a copy for each peer, headers included.
        total_up_bytes, total_down_bytes: of the run.
        link_s, hidden_s, processor_s: of one synchronization; see Times.
        step_s: of a step without exchange.
        exchange_s: of the run, in which replicas take no step.
        total_s: of the run.
        share: of the time that is spent on exchange.
        fits: whether the share is at most what was asked for, a synchronization at the end of the run left aside.
        money: for what all replicas send; None without a price.
        cost: in loss beside dense Muon; None where nothing is known.
        command: that runs it.
    """

    recipe: str
    steps: int
    spacing: float
    synchronizations: int
    up_bytes: float
    down_bytes: float
    total_up_bytes: float
    total_down_bytes: float
    link_s: float
    hidden_s: float
    processor_s: float
    step_s: float
    exchange_s: float
    total_s: float
    share: float
    fits: bool
    money: float | None
    cost: Cost | None
    command: str

    @property
    def wait_s(self) -> float:
        """Exchange a step, on average."""
        return self.exchange_s / self.steps

    @property
    def rank(self) -> tuple[bool, float, float]:
        """By which lines are sorted: those that fit first, and of them those of the lowest expected loss."""
        return not self.fits, math.inf if self.cost is None else self.cost.expected, self.total_s


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a plan is made for.

    Args:
        replicas: that train together, at least 2.
        steps: of the run.
        share: largest share of the time that exchange may take, between 0 and 1.
        price_per_gb: of 10⁹ bytes that leave a replica. Default: none.

    Raises:
        UsageError: a value that is not allowed.
    """

    replicas: int
    steps: int
    share: float
    price_per_gb: float | None = None

    def __post_init__(self) -> None:
        if self.replicas < 2:
            raise UsageError(
                f"plan: replicas is {self.replicas}; at least 2 are needed, since one alone exchanges nothing"
            )
        if not 1 <= self.steps <= LARGEST_STEPS:
            raise UsageError(f"plan: steps is {self.steps}; it lies between 1 and {LARGEST_STEPS:,}")
        if not 0 < self.share < 1:
            raise UsageError(
                f"plan: share is {self.share}; it lies between 0 and 1, such as 0.05 for a twentieth of the time"
            )
        if self.price_per_gb is not None and not 0 <= self.price_per_gb < math.inf:
            raise UsageError(f"plan: price_per_gb is {self.price_per_gb}; a price is at least 0")


class Planner:
    """Makes the lines of a plan.

    Args:
        setting: what it is made for.
        model: whose parameters are exchanged.
        rates: of the link.
        machine: times.
        command: of a recipe and a rate, what runs it.
    """

    def __init__(
        self, setting: Setting, model: PlannedModel, rates: Rates, machine: Machine, command: Command
    ) -> None:
        self.setting = setting
        self.model = model
        self.rates = rates
        self.machine = machine
        self.command = command
        self._traffic: dict[tuple[str, tuple[int, ...]], Traffic] = {}

    def lines(self, candidates: Sequence[Candidate]) -> list[Line]:
        """One or more of each candidate: those that fit first, and of them those of the lowest expected loss."""
        fitting = [c for c in candidates if self.setting.replicas >= c.from_replicas]
        lines = {line.recipe: line for candidate in fitting for line in self._lines(candidate)}
        return sorted(lines.values(), key=lambda line: line.rank)

    def _lines(self, candidate: Candidate) -> Iterator[Line]:
        if candidate.streaming:
            yield from self._streamed(candidate)
            return
        for recipe in self._recipes(self._cheapest(candidate)):
            yield self._line(self._exchanged(recipe))

    def _streamed(self, candidate: Candidate) -> Iterator[Line]:
        """With the delay and the mixing of the lowest expected loss, where it saves time."""
        if len(self.model.trained) < FRAGMENTS:
            return
        cut = replace(candidate.with_options(fragments=FRAGMENTS), streaming=False)
        found = [
            self._line(self._exchanged(recipe))
            for one in self._cheapest(cut).streamed()
            for recipe in self._recipes(one)
        ]
        best = min(found, key=lambda line: line.rank)
        at_once = self._line(self._exchanged(without_fragments(best.recipe)))
        if best.total_s < (1 - STREAMING_SAVES) * at_once.total_s:
            yield best

    def _cheapest(self, candidate: Candidate) -> Candidate:
        """With the means whose exchange takes the least time; those that all replicas make, if that is about as much."""

        def exchange_s(form: Candidate) -> float:
            spacing = self._least_spacing(form) if form.is_free else 1.0
            what = self._at(form, spacing)
            times = self._times(what)
            return times.link_s + times.processor_s

        best, *others = candidate.forms(self.model.module)
        best_s = exchange_s(best) if others else 0.0
        for form in others:
            if (form_s := exchange_s(form)) < (1 - OWNERS_SAVE) * best_s:
                best, best_s = form, form_s
        return best

    def _recipes(self, candidate: Candidate) -> list[str]:
        steps = self.setting.steps
        if not candidate.is_free:
            return [candidate.recipe]
        spacing: float = self._least_spacing(candidate)
        if candidate.growing:
            # The last interval may be cut off by the end of the run, and the mean is then a little less.
            while spacing < steps and not self._line(self._at(candidate, spacing)).fits:
                spacing *= 1.01
        return [candidate.at(max(spacing * factor, 1.0), steps=steps) for factor in candidate.factors]

    def _at(self, candidate: Candidate, spacing: float) -> Exchanged:
        return self._exchanged(candidate.at(spacing, steps=self.setting.steps))

    def _exchanged(self, recipe: str) -> Exchanged:
        return exchanged(recipe, self.model.module)

    def _least_spacing(self, candidate: Candidate) -> int:
        """The least H with E(H) / (E(H) + H · step) ≤ share, E being what exchange takes; that of the run where there is none."""
        what = self._at(candidate, 1.0)
        step_s = self.machine.step_s(what)

        def fits(spacing: int) -> bool:
            return self._fits(self._times(what, spacing).exchange_s, spacing * step_s)

        low, high = candidate.least_interval - 1, max(self.setting.steps, candidate.least_interval)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def _fits(self, exchange_s: float, steps_s: float) -> bool:
        return exchange_s <= self.setting.share * (exchange_s + steps_s) + 1e-12

    def _of_traffic(self, what: Exchanged, fragments: Sequence[int]) -> Traffic:
        key = (same_bytes(what.recipe), tuple(fragments))
        if key not in self._traffic:
            self._traffic[key] = what.traffic(self.setting.replicas, fragments)
        return self._traffic[key]

    def _spacing(self, what: Exchanged) -> float:
        """Steps between two synchronizations; on average where they grow."""
        if what.local is not None and not what.local.growth:
            return interval_of(what.local)
        return self.setting.steps / what.synchronizations(self.setting.steps)

    def _times(self, what: Exchanged, spacing: float | None = None) -> Times:
        """Of a synchronization of all fragments, one after the other."""
        spacing = self._spacing(what) if spacing is None else spacing
        return sum((self._times_of(what, [f], spacing) for f in what.fragments), Times())

    def _times_of(
        self, what: Exchanged, fragments: Sequence[int], spacing: float, *, at_once: bool = False
    ) -> Times:
        """Of fragments that travel together.

        Args:
            what: is exchanged.
            fragments: which.
            spacing: steps between two synchronizations.
            at_once: no local steps go on meanwhile. Default: as the recipe has it.
        """
        traffic, local = self._of_traffic(what, fragments), what.local
        # Fragments travel one after the other: no longer than until the next one is sent.
        apart_s = spacing / len(what.fragments) * self.machine.step_s(what)
        link_s = self.rates.seconds(
            egress_bytes=traffic.up_bytes,
            received_bytes=traffic.down_bytes,
            num_messages=traffic.num_messages,
            peers=self.setting.replicas - 1,
            rested_s=apart_s,
        )
        delay = 0 if local is None or at_once else local.delay
        if local is not None and local.merge == "arrival" and not at_once:
            delay = interval_of(local) - 1
        return Times(
            link_s=link_s,
            hidden_s=min(link_s, delay * self.machine.step_s(what), apart_s),
            processor_s=self.machine.exchange_s(what, fragments),
        )

    def _line(self, what: Exchanged) -> Line:
        setting, spacing = self.setting, self._spacing(what)
        step_s, times = self.machine.step_s(what), self._times(what)
        counts, left = what.sends(setting.steps)
        # How often which fragments travel together, and whether steps go on beside them.
        travels = [(count, [f], False) for f, count in zip(what.fragments, counts, strict=True) if count]
        travels += [(1, left, True)] if left else []
        traffic = [(count, self._of_traffic(what, fragments)) for count, fragments, _ in travels]
        exchange_s = sum(
            count * self._times_of(what, fragments, spacing, at_once=at_once).exchange_s
            for count, fragments, at_once in travels
        )
        total_s = setting.steps * step_s + exchange_s
        cost = expected_cost(
            what.recipe,
            replicas=setting.replicas,
            steps=setting.steps,
            num_parameters=self.model.num_parameters,
        )
        price = setting.price_per_gb
        sent_gb = sum(count * t.all_bytes for count, t in traffic) / BYTES_PER_GB
        of_all = [self._of_traffic(what, [f]) for f in what.fragments]
        count = what.synchronizations(setting.steps)
        return Line(
            recipe=what.recipe,
            steps=setting.steps,
            spacing=setting.steps / count,
            synchronizations=count,
            up_bytes=sum(t.up_bytes for t in of_all),
            down_bytes=sum(t.down_bytes for t in of_all),
            total_up_bytes=sum(count * t.up_bytes for count, t in traffic),
            total_down_bytes=sum(count * t.down_bytes for count, t in traffic),
            link_s=times.link_s,
            hidden_s=times.hidden_s,
            processor_s=times.processor_s,
            step_s=step_s,
            exchange_s=exchange_s,
            total_s=total_s,
            share=exchange_s / total_s,
            fits=self._fits(times.exchange_s, spacing * step_s),
            money=None if price is None else price * sent_gb,
            cost=cost,
            command=self.command(what.recipe, None if cost is None else cost.lr),
        )
