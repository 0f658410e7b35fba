"""Statements that measured rows bear out or not, with confidence intervals over repeated measurements."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean, stdev

import numpy as np
from scipy.stats import t as student

from muonwire.errors import UsageError
from muonwire.pages.units import digits_text

Value = float | int | str | bool | None
Row = Mapping[str, Value]

CONFIDENCE = 0.95
# How often as many seeds as are said to decide would do so, and above which number none is said.
POWER, MOST_SEEDS = 0.8, 1000
HOLDS, FAILS, OPEN = "holds", "fails", "open"
# The values that a column can have, by how its unit begins.
ANY = (-math.inf, math.inf)
BY_UNIT = {"times": (0.0, math.inf), "% of": (0.0, 100.0)}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over repeats and its confidence interval; the ends equal the mean where there is one repeat.

    Args:
        mean, low, high: in the unit of the values.
        repeats: how many values.
    """

    mean: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Student's t interval of the mean, 95 %.

        Args:
            values: one a repeat.

        Raises:
            UsageError: there is none.

        >>> Interval.of([1.0, 2.0, 3.0])
        Interval(mean=2.0, low=-0.48..., high=4.48..., repeats=3)
        """
        if not values:
            raise UsageError("interval: there are no values; a measurement gives at least one a seed")
        mean, count = fmean(values), len(values)
        if count == 1:
            return cls(mean=mean, low=mean, high=mean, repeats=1)
        reach = _quantile(count) * stdev(values) / math.sqrt(count)
        return cls(mean=mean, low=mean - reach, high=mean + reach, repeats=count)

    def repeats_to_leave(self, distance: float) -> int:
        """How many repeats it takes for the interval not to reach so far from the mean, in four of five measurements anew.

        The least n with (t₀.₉₇₅ + t₀.₈) s / √n ≤ distance, t of Student's distribution with n − 1 degrees of freedom and s the
        standard deviation of these repeats, which, as the mean, is taken for that of more. ``MOST_SEEDS`` + 1 where it is more.

        >>> Interval.of([1.0, 2.0, 3.0]).repeats_to_leave(1.0)
        10
        """
        spread = (self.high - self.mean) * math.sqrt(self.repeats) / _quantile(self.repeats)
        counts = np.arange(2, MOST_SEEDS + 1)
        reach = student.ppf([[0.5 + CONFIDENCE / 2], [POWER]], counts - 1).sum(0) * spread / np.sqrt(counts)
        enough = counts[reach <= distance]
        return int(enough[0]) if len(enough) else MOST_SEEDS + 1


@lru_cache(maxsize=256)
def _quantile(count: int) -> float:
    # Looked up for every figure of the page, and slow to compute.
    return float(student.ppf(0.5 + CONFIDENCE / 2, count - 1))


def matches(row: Row, select: Mapping[str, Value]) -> bool:
    """Whether ``row`` has every value of ``select``."""
    return all(name in row and row[name] == value for name, value in select.items())


def by_seed(rows: Sequence[Row], *, column: str, select: Mapping[str, Value]) -> list[float]:
    """The mean of a column over the selected rows of each seed, in the order of the seeds.

    Rows without the column, or with a value that is missing or not finite there, are left out.
    """
    values: dict[int, list[float]] = {}
    for row in rows:
        value = row.get(column)
        if matches(row, select) and isinstance(value, int | float) and math.isfinite(value):
            values.setdefault(int(row["seed"] or 0), []).append(float(value))
    return [fmean(values[seed]) for seed in sorted(values)]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a check reads in the sentence that answers its claim.

    Args:
        holds: the clause where it holds, such as "momentum before the codec lowers the loss".
        fails: the clause where it fails, such as "momentum before the codec raises the loss".
        by: the figure beside it; {mean}, {size} (the mean without its sign), {power} (ten to the mean), {low} and {high}
            stand for numbers. Default: the mean with the check's unit.
        digits: significant digits of the figure. Default: 2.
        where: ends the clause, before the figure; clauses that differ in nothing else are joined: "momentum lowers the loss in
            dense training (0.4 nats) and in compressed training (0.3 nats)". Default: nothing.
    """

    holds: str
    fails: str
    by: str = ""
    digits: int = 2
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One statement about the rows of a measurement: the mean of a column lies in a range.

    It holds where the whole confidence interval lies in the range, fails where none of it does, and is open in between.

    Args:
        name: the statement in words, as it reads when it holds. Default: the reading's clause for it.
        setting: where it is measured: "as in the note", "on real gradients", "in training", or other words.
        column: the measured value.
        select: the rows that take part, by their values in other columns. Default: all.
        at_least, at_most: the range that bears the statement out; at least one of them.
        possible: the values that the column can have at all. Default: from 0 on where the unit begins with "times", 0 to 100 where
            it begins with "% of", otherwise any.
        unit: of the values, for the page.
        reading: its clause in the claim's answer. Default: none; the answer leaves it out.

    Raises:
        UsageError: neither name nor reading is given, or neither bound; or every possible value lies in the range, or none.
    """

    setting: str
    column: str
    name: str = ""
    select: Mapping[str, Value] = field(default_factory=dict)
    at_least: float | None = None
    at_most: float | None = None
    possible: tuple[float, float] = ANY
    unit: str = ""
    reading: Reading | None = None

    def __post_init__(self) -> None:
        if not self.name:
            if self.reading is None:
                raise UsageError(f"check of {self.column!r}: give a name, or a reading that says it")
            reading, where = self.reading, self.reading.where
            said = reading.holds if where == self.setting else f"{reading.holds} {where}"
            object.__setattr__(self, "name", said.strip())
        if self.possible == ANY:
            by_unit = (values for start, values in BY_UNIT.items() if self.unit.startswith(start))
            object.__setattr__(self, "possible", next(by_unit, ANY))
        if self.at_least is None and self.at_most is None:
            raise UsageError(f"check {self.name!r}: give at_least, at_most, or both")
        low, high = self.range
        if low > high or low > self.possible[1] or high < self.possible[0]:
            raise UsageError(
                f"check {self.name!r}: no possible value of {self.possible} lies in {low} to {high}"
            )
        if low <= self.possible[0] and high >= self.possible[1]:
            raise UsageError(
                f"check {self.name!r}: every possible value of {self.possible} lies in {low} to {high}"
            )

    @property
    def range(self) -> tuple[float, float]:
        """The values that bear the statement out."""
        return (
            -math.inf if self.at_least is None else self.at_least,
            math.inf if self.at_most is None else self.at_most,
        )

    @property
    def wanted(self) -> str:
        """The range in words."""
        low, high = self.at_least, self.at_most
        if low is not None and high is not None:
            return f"{low:.4g} to {high:.4g}"
        return f"at least {low:.4g}" if low is not None else f"at most {high:.4g}"

    def evaluate(self, rows: Sequence[Row]) -> "Outcome":
        """What the rows say of the statement; open where there are no rows."""
        values = by_seed(rows, column=self.column, select=self.select)
        if not values:
            return Outcome(check=self, state=OPEN, interval=None)
        interval, (low, high) = Interval.of(values), self.range
        if low <= interval.low and interval.high <= high:
            state = HOLDS
        elif interval.high < low or interval.low > high:
            state = FAILS
        else:
            state = OPEN
        return Outcome(check=self, state=state, interval=interval)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a measurement says of one check.

    Args:
        check: the statement.
        state: "holds", "fails" or "open".
        interval: of the measured mean; None where nothing was measured.
    """

    check: Check
    state: str
    interval: Interval | None

    @property
    def figure(self) -> str:
        """The measured mean and its interval."""
        if self.interval is None:
            return "not measured"
        i = self.interval
        spread = f" ({i.low:.4g} to {i.high:.4g})" if i.repeats > 1 else ""
        return f"{i.mean:.4g}{self._unit}{spread}"

    @property
    def seeds_to_decide(self) -> int | None:
        """How many seeds would make an open check hold or fail, see ``Interval.repeats_to_leave``; None where that is not known."""
        if self.state != OPEN or self.interval is None or self.interval.repeats < 2:
            return None
        distance = min(abs(bound - self.interval.mean) for bound in self.check.range if math.isfinite(bound))
        return self.interval.repeats_to_leave(distance)

    @property
    def clause(self) -> str:
        """What came out, as a clause with its figure; empty where the check has no reading.

        >>> reading = Reading(holds="momentum lowers the loss", fails="momentum raises the loss", by="{size} nats")
        >>> check = Check(name="lower", setting="in training", column="gain", at_least=0.0, reading=reading)
        >>> check.evaluate([{"seed": 0, "gain": -0.449}]).clause
        'momentum raises the loss (0.45 nats)'
        """
        return " ".join(part for part in (self.predicate, self.place) if part)

    @property
    def predicate(self) -> str:
        """The clause without where it is so and by how much."""
        reading = self.check.reading
        if reading is None:
            return ""
        if self.interval is None:
            return f"not measured whether {reading.holds}"
        states = {HOLDS: reading.holds, FAILS: reading.fails, OPEN: f"open whether {reading.holds}"}
        return states[self.state]

    @property
    def place(self) -> str:
        """The rest of the clause: where it is so, and the figure."""
        return self._place("")

    @property
    def place_and_seeds(self) -> str:
        """The same, with how many seeds would decide it where it is open."""
        return self._place(f"; {self.seeds_text}" if self.seeds_text else "")

    @property
    def seeds_text(self) -> str:
        """How many seeds would decide it, in words; empty where that is not known, and where it is decided."""
        seeds = self.seeds_to_decide
        if seeds is None:
            return ""
        return f"{f'about {seeds}' if seeds <= MOST_SEEDS else f'more than {MOST_SEEDS:,}'} seeds would tell"

    def _place(self, open_adds: str) -> str:
        reading, i = self.check.reading, self.interval
        if reading is None or i is None:
            return reading.where if reading else ""
        numbers = {
            "mean": i.mean,
            "size": abs(i.mean),
            "power": 10 ** min(i.mean, 300.0),
            "low": i.low,
            "high": i.high,
        }
        shown = {name: _rounded_text(value, digits=reading.digits) for name, value in numbers.items()}
        figure = f"{shown['mean']}{self._unit}"
        if self.state == OPEN:
            figure = f"{shown['low']} to {shown['high']}{self._unit}{open_adds}"
        elif reading.by:
            figure = reading.by.format(**shown)
        return f"{reading.where} ({figure})".lstrip()

    @property
    def _unit(self) -> str:
        return f" {self.check.unit}" if self.check.unit else ""


def _rounded_text(value: float, *, digits: int) -> str:
    # digits_text leaves every digit before the point: 11,970 to two digits is to read 12,000.
    return digits_text(float(f"{value:.{digits - 1}e}"), digits=digits).replace("-", "−")
