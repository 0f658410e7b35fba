"""What is known of recipes' losses: the rows of evidence.json, which benchmarks/plan_evidence.py makes of kept runs.

Most are of recipes beside dense Muon. Of some options there are only runs beside the same recipe without them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

from muonwire.optim.settings import LocalSteps
from muonwire.plan.exchanges import synchronizations
from muonwire.recipes import find, format_recipe, parse_recipe

# Options that make no other family of a recipe: how often it synchronizes, and what goes with that.
_FREE = ("interval", "growth", "outer_momentum")
GROWING = ", growing"
# Those of which there are runs beside the same recipe without them: fragments that travel while replicas go on, and who averages.
STREAMING = ("fragments", "delay", "mix")
MEANS = ("means", "mean_codec")
# The signs of a recipe's own, and those whose sums have no loss. By each option that has them.
OWN_SCALE, SHARED_SCALE = "sign(scale=tensor)", "sign(scale=shared)"
CODECS = ("codec", "vector_codec")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe in one comparison, at its best rate.

    Args:
        file: of the comparison.
        entries: its places in that file, one a seed.
        recipe: in textual form.
        task: what was learnt.
        replicas, steps, num_parameters: of the runs.
        seeds: how many.
        lr: the best rate.
        cost: mean loss over dense Muon's mean loss of the same work, less one; in the grid, of seeds that both have.
        spread: half of the seeds' range, over dense Muon's loss; None with one seed.
    """

    file: str
    entries: tuple[int, ...]
    recipe: str
    task: str
    replicas: int
    steps: int
    num_parameters: int
    seeds: int
    lr: float
    cost: float
    spread: float | None

    @property
    def family(self) -> str:
        """The recipe without how often it synchronizes."""
        return family_of(self.recipe)

    @property
    def synchronizations(self) -> int:
        """In the whole run."""
        return synchronizations(local_of(self.recipe), self.steps)

    def __str__(self) -> str:
        return f"{self.file}[{', '.join(map(str, self.entries))}] {self.recipe}"


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A recipe beside the same one without some options, of the same seeds.

    Args:
        recipe: in textual form.
        plain: the recipe without them.
        sources: the places of its runs, one a seed.
        replicas, steps, num_parameters: of the runs.
        seeds: how many.
        cost: mean over the seeds of its loss over the other's, less one.
        spread: half of the seeds' range of that; None with one seed.
    """

    recipe: str
    plain: str
    sources: tuple[str, ...]
    replicas: int
    steps: int
    num_parameters: int
    seeds: int
    cost: float
    spread: float | None

    def __str__(self) -> str:
        return f"{', '.join(self.sources)} {self.recipe}"


@dataclass(frozen=True, kw_only=True)
class Trend:
    """How the cost of local steps moves with the size of a run, by the law that is fitted to the grid of evidence.

    Args:
        of: "num_parameters" or "steps".
        recipe: by whose runs it was fitted.
        per_doubling: added to the cost by twice as many.
        error: its standard error.
        base: what the other rows have.
        low, high: between which it holds.
    """

    of: str
    recipe: str
    per_doubling: float
    error: float
    base: int
    low: int
    high: int

    def doublings(self, value: int) -> float:
        """Of the base, from it to the value or to the end that lies before it."""
        return math.log2(min(max(value, self.low), self.high) / self.base)


def local_of(recipe: str) -> LocalSteps | None:
    """How a recipe steps alone; None where it synchronizes in each step."""
    name, given = parse_recipe(recipe)
    options: Any = find(name).make_options(given)
    local: LocalSteps | None = options.local_steps() if hasattr(options, "local_steps") else None
    return local


def plain_of(recipe: str) -> str:
    """The recipe without the options that were measured beside it.

    >>> plain_of("one_bit_muon(interval=20, fragments=4, delay=1)")
    'one_bit_muon(interval=20)'
    >>> plain_of("one_bit_muon(means='lossless', codec='sign(scale=shared)', vector_codec='sign(scale=shared)')")
    'one_bit_muon'
    """
    name, given = parse_recipe(recipe)
    defaults = {f.name: f.default for f in fields(find(name).options)}
    rest = {
        key: value
        for key, value in given.items()
        if key not in (*STREAMING, *MEANS)
        and not (key in CODECS and value == SHARED_SCALE and defaults[key] == OWN_SCALE)
    }
    return format_recipe(name, rest)


def family_of(recipe: str) -> str:
    """What a recipe has in common with others that differ in how often they synchronize.

    >>> family_of("one_bit_muon(interval=55, outer_momentum=0.5)"), family_of("muon(momentum=0.9)")
    ('one_bit_muon', 'muon(momentum=0.9)')
    >>> family_of("one_bit_muon(interval=28, growth=0.045)")
    'one_bit_muon, growing'
    >>> family_of("one_bit_muon(fragments=4, delay=1)")
    'one_bit_muon'
    """
    name, given = parse_recipe(plain_of(recipe))
    rest = {key: value for key, value in given.items() if key not in _FREE}
    return format_recipe(name, rest) + (GROWING if given.get("growth") else "")


@cache
def _record() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(files("muonwire.plan").joinpath("evidence.json").read_text())
    return record


@cache
def rows() -> Sequence[Row]:
    """All rows beside dense Muon that the package carries."""
    return tuple(Row(**{**row, "entries": tuple(row["entries"])}) for row in _record()["rows"])


@cache
def beside() -> Sequence[Beside]:
    """All rows of options beside the same recipe without them."""
    return tuple(Beside(**{**row, "sources": tuple(row["sources"])}) for row in _record()["beside"])


@cache
def trends() -> Sequence[Trend]:
    """How costs move with the size and the length of a run."""
    return tuple(Trend(**trend) for trend in _record()["trends"])
