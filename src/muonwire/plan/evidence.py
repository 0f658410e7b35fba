"""What is known of recipes' losses: the rows of evidence.json, which benchmarks/plan_evidence.py makes of kept comparisons."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from muonwire.optim.settings import LocalSteps
from muonwire.plan.exchanges import synchronizations
from muonwire.recipes import find, format_recipe, parse_recipe

# Options that make no other family of a recipe: how often it synchronizes, and what goes with that.
_FREE = ("interval", "growth", "outer_momentum")
GROWING = ", growing"


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
        cost: mean loss over dense Muon's mean loss of the same work, less one.
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


def local_of(recipe: str) -> LocalSteps | None:
    """How a recipe steps alone; None where it synchronizes in each step."""
    name, given = parse_recipe(recipe)
    options: Any = find(name).make_options(given)
    local: LocalSteps | None = options.local_steps() if hasattr(options, "local_steps") else None
    return local


def family_of(recipe: str) -> str:
    """What a recipe has in common with others that differ in how often they synchronize.

    >>> family_of("one_bit_muon(interval=55, outer_momentum=0.5)"), family_of("muon(momentum=0.9)")
    ('one_bit_muon', 'muon(momentum=0.9)')
    >>> family_of("one_bit_muon(interval=28, growth=0.045)")
    'one_bit_muon, growing'
    """
    name, given = parse_recipe(recipe)
    rest = {key: value for key, value in given.items() if key not in _FREE}
    return format_recipe(name, rest) + (GROWING if given.get("growth") else "")


@cache
def rows() -> Sequence[Row]:
    """All rows that the package carries."""
    record = json.loads(files("muonwire.plan").joinpath("evidence.json").read_text())
    return tuple(Row(**{**row, "entries": tuple(row["entries"])}) for row in record["rows"])
