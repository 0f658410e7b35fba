"""From a model and a link to a table of recipes: how often each synchronizes, what it sends, and what that costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from muonwire.errors import UsageError
from muonwire.plan.commands import Command
from muonwire.plan.evidence import GROWING, local_of, rows
from muonwire.plan.exchanges import Exchanged, exchanged
from muonwire.plan.loss import Cost, expected_cost
from muonwire.plan.machine import Machine
from muonwire.plan.model import PlannedModel
from muonwire.plan.rates import Rates
from muonwire.recipes import format_recipe, parse_recipe

BYTES_PER_GB = 1e9
LARGEST_STEPS = 10**9


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe that a plan may choose H for.

    Args:
        recipe: in textual form; H is chosen where it steps alone and says no interval.
        growing: H grows through the run as much as in the row of evidence. Default: False.
        factors: of the chosen H, each a line of the table. Default: H alone.
    """

    recipe: str
    growing: bool = False
    factors: tuple[float, ...] = (1.0,)

    @property
    def is_free(self) -> bool:
        """Whether H is to be chosen."""
        return "interval" not in parse_recipe(self.recipe)[1] and local_of(self.recipe) is not None

    def at(self, spacing: float, *, steps: int) -> str:
        """The recipe that synchronizes about every ``spacing`` steps."""
        if not self.is_free:
            return self.recipe
        name, options = parse_recipe(self.recipe)
        if self.growing:
            # With G = growth · steps / interval the mean distance over a run is interval · G / ln(1 + G).
            interval = max(math.ceil(spacing * math.log1p(_growth()) / _growth()), 1)
            options |= {"interval": interval, "growth": float(f"{_growth() * interval / steps:.3g}")}
        else:
            interval = min(max(math.ceil(spacing), 1), steps)
            options |= {"interval": interval}
        if name == "one_bit_muon" and "outer_momentum" not in options and interval >= FAR_APART:
            options["outer_momentum"] = 0.5
        return format_recipe(name, options)


# From this H on outer_momentum=0.5 is better (docs/one_bit_muon.md#which-h).
FAR_APART = 25
CANDIDATES = (
    Candidate(recipe="muon"),
    Candidate(recipe="adamw"),
    Candidate(recipe="one_bit_muon", factors=(0.5, 1.0, 2.0)),
    Candidate(recipe="one_bit_muon", growing=True),
    Candidate(recipe="local_muon"),
    Candidate(recipe="muloco"),
    Candidate(recipe="sparseloco"),
    Candidate(recipe="diloco"),
    Candidate(recipe="demo"),
    Candidate(recipe="distro"),
)


@cache
def _growth() -> float:
    """growth · steps / interval of the growing recipe in the evidence."""
    row = next(row for row in rows() if row.family.endswith(GROWING))
    local = local_of(row.recipe)
    assert local is not None
    return local.growth * row.steps / local.initial


@dataclass(frozen=True, kw_only=True)
class Line:
    """One recipe of a plan. Bytes and times are those of one replica.

    Args:
        recipe: in textual form, with its H.
        steps: of the run.
        spacing: steps a synchronization, on average over the run.
        synchronizations: in the run.
        up_bytes, down_bytes: of one synchronization, a copy for each peer, headers included.
        link_s, processor_s: of one synchronization, on the link and on the processor.
        step_s: of a step without exchange.
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
    link_s: float
    processor_s: float
    step_s: float
    total_s: float
    share: float
    fits: bool
    money: float | None
    cost: Cost | None
    command: str

    @property
    def wait_s(self) -> float:
        """Exchange a step, on average."""
        return (self.link_s + self.processor_s) * self.synchronizations / self.steps

    @property
    def total_up_bytes(self) -> float:
        """Of the run."""
        return self.up_bytes * self.synchronizations

    @property
    def total_down_bytes(self) -> float:
        """Of the run."""
        return self.down_bytes * self.synchronizations


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

    def lines(self, candidates: Sequence[Candidate]) -> list[Line]:
        """One or more of each candidate: those that fit first, and of them those of the lowest expected loss."""
        recipes = dict.fromkeys(recipe for candidate in candidates for recipe in self._recipes(candidate))
        lines = [self._line(exchanged(recipe, self.model.module)) for recipe in recipes]

        def order(line: Line) -> tuple[bool, float, float]:
            return not line.fits, math.inf if line.cost is None else line.cost.expected, line.total_s

        return sorted(lines, key=order)

    def _recipes(self, candidate: Candidate) -> list[str]:
        steps = self.setting.steps
        if not candidate.is_free:
            return [candidate.recipe]
        spacing = self._least_spacing(candidate)
        if candidate.growing:
            # The last interval may be cut off by the end of the run, and the mean is then a little less.
            while spacing < steps and not self._line(self._at(candidate, spacing)).fits:
                spacing *= 1.01
        return [candidate.at(max(spacing * factor, 1.0), steps=steps) for factor in candidate.factors]

    def _at(self, candidate: Candidate, spacing: float) -> Exchanged:
        return exchanged(candidate.at(spacing, steps=self.setting.steps), self.model.module)

    def _least_spacing(self, candidate: Candidate) -> float:
        """The least H with which exchange takes no more than the share: E (1 − s) / (s · step)."""
        share = self.setting.share
        what = self._at(candidate, 1.0)
        step_s = self.machine.step_s(what)
        spacing = 1.0
        # The first bytes after a rest travel more slowly, and how long it was follows from H.
        for _ in range(3):
            link_s = self._link_s(what, rested_s=spacing * step_s)
            exchange_s = link_s + self.machine.exchange_s(what)
            spacing = max(exchange_s * (1 - share) / (share * step_s), 1.0)
        return min(math.ceil(spacing), self.setting.steps)

    def _link_s(self, what: Exchanged, *, rested_s: float) -> float:
        traffic = what.traffic(self.setting.replicas)
        return self.rates.seconds(
            egress_bytes=traffic.egress_bytes,
            received_bytes=traffic.received_bytes,
            num_messages=traffic.num_messages,
            peers=self.setting.replicas - 1,
            rested_s=rested_s,
        )

    def _line(self, what: Exchanged) -> Line:
        setting = self.setting
        traffic = what.traffic(setting.replicas)
        count = what.synchronizations(setting.steps)
        step_s, processor_s = self.machine.step_s(what), self.machine.exchange_s(what)
        link_s = self._link_s(what, rested_s=step_s * setting.steps / count)
        once_s, spacing = link_s + processor_s, setting.steps / count
        exchange_s = count * once_s
        total_s = setting.steps * step_s + exchange_s
        cost = expected_cost(
            what.recipe,
            replicas=setting.replicas,
            steps=setting.steps,
            num_parameters=self.model.num_parameters,
        )
        price = setting.price_per_gb
        sent_gb = setting.replicas * count * traffic.egress_bytes / BYTES_PER_GB
        return Line(
            recipe=what.recipe,
            steps=setting.steps,
            spacing=spacing,
            synchronizations=count,
            up_bytes=traffic.egress_bytes,
            down_bytes=traffic.received_bytes,
            link_s=link_s,
            processor_s=processor_s,
            step_s=step_s,
            total_s=total_s,
            share=exchange_s / total_s,
            fits=once_s <= setting.share * (once_s + _interval(what, spacing) * step_s) + 1e-12,
            money=None if price is None else price * sent_gb,
            cost=cost,
            command=self.command(what.recipe, None if cost is None else cost.lr),
        )


def _interval(what: Exchanged, spacing: float) -> float:
    """Steps between two synchronizations; on average where they grow."""
    local = what.local
    return spacing if local is None or local.growth else local.initial
