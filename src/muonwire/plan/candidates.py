"""Recipes that a plan is made of: those whose H, means and fragments it may choose, and the recipes that this gives."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from torch import nn

from muonwire.errors import UsageError
from muonwire.plan.evidence import CODECS, GROWING, OWN_SCALE, SHARED_SCALE, local_of, rows
from muonwire.plan.exchanges import exchanged, interval_of
from muonwire.recipes import find, format_recipe, parse_recipe
from muonwire.recipes.one_bit import MANY, PARTS_OF_MANY
from muonwire.stages import Exchange

# From this H on outer_momentum=0.5 is better (docs/one_bit_muon.md#which-h).
FAR_APART = 25
# What streaming was measured with: the number of fragments that a plan offers, the delays and mixings, and the least H.
FRAGMENTS, DELAYS, MIXES, STREAMED_INTERVAL = 4, (1, 2, 3, 4, 5), (0.5, 1.0), 11
# What follows the link while a run goes on, and the options that belong to it; a plan chooses H before.
AUTO, OF_AUTO = "auto", ("interval", "share", "intervals")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe that a plan may choose H and means for.

    Args:
        recipe: in textual form; H is chosen where it steps alone and says no interval, or interval="auto"; who averages where it
            says no means and all that it sends are signs.
        growing: H grows through the run as much as in the row of evidence. Default: False.
        streaming: in four fragments with a delay, where that saves time. Default: False.
        factors: of the chosen H, each a line of the table. Default: H alone.
        least: least H. Default: 1.
        from_replicas: it is for so many replicas or more. Default: 2.
    """

    recipe: str
    growing: bool = False
    streaming: bool = False
    factors: tuple[float, ...] = (1.0,)
    least: int = 1
    from_replicas: int = 2

    @property
    def name(self) -> str:
        """Of the recipe."""
        return parse_recipe(self.recipe)[0]

    @property
    def options(self) -> dict[str, Any]:
        """That are given, without an interval that is left open."""
        options = parse_recipe(self.recipe)[1]
        if options.get("interval") == AUTO:
            if not self.steps_alone:
                raise UsageError(
                    f"plan: {self.recipe}: interval is {AUTO!r}, and {self.name} has none, since it synchronizes in each step; "
                    "leave it out"
                )
            options = _without(options, OF_AUTO)
        return options

    @property
    def steps_alone(self) -> bool:
        """Whether replicas step alone."""
        return hasattr(find(self.name).options, "local_steps")

    @property
    def is_free(self) -> bool:
        """Whether H is to be chosen."""
        return self.steps_alone and "interval" not in self.options

    @property
    def least_interval(self) -> int:
        """The least H that there may be."""
        return max(self.least, int(self.options.get("fragments", 1)), int(self.options.get("delay", 0)) + 1)

    def at(self, spacing: float, *, steps: int) -> str:
        """The recipe that synchronizes about every ``spacing`` steps."""
        if not self.is_free:
            return self.recipe
        options, least = self.options, self.least_interval
        if self.growing:
            # With G = growth · steps / interval the mean distance over a run is interval · G / ln(1 + G).
            interval = max(math.ceil(spacing * math.log1p(_growth()) / _growth()), least)
            options = {
                "interval": interval,
                "growth": float(f"{_growth() * interval / steps:.3g}"),
                **options,
            }
        else:
            interval = max(min(math.ceil(spacing), steps), least)
            options = {"interval": interval, **options}
        if self.name == "one_bit_muon" and "outer_momentum" not in options and interval >= FAR_APART:
            options["outer_momentum"] = 0.5
        return format_recipe(self.name, options)

    def forms(self, module: nn.Module) -> list["Candidate"]:
        """With each way to make means that suits the recipe as it is, the gather first.

        Args:
            module: whose parameters it exchanges.
        """
        options, known = self.options, {f.name for f in fields(find(self.name).options)}
        if "means" not in known or set(options) & {"means", "mean_codec"}:
            return [self]
        stages = [talk.stage for talk in exchanged(self.at(1.0, steps=1), module).talks]
        codecs = [stage.codec for stage in stages if isinstance(stage, Exchange)]
        if len(codecs) < len(stages):
            return [self]
        given = {key: SHARED_SCALE for key in CODECS if key in known and key not in options}
        recompressed = self.with_options(means="recompressed")
        if all(codec.counts_signs for codec in codecs):
            return [self, self.with_options(means="lossless"), recompressed]
        if any(str(codec) != OWN_SCALE for codec in codecs):
            return [self]
        if len(given) < len(known & set(CODECS)):
            return [self, recompressed]
        return [self, self.with_options(means="lossless", **given), recompressed]

    def with_options(self, **given: Any) -> "Candidate":
        """With these options besides."""
        return replace(self, recipe=format_recipe(self.name, self.options | given))

    def streamed(self) -> list["Candidate"]:
        """In fragments, with each delay and mixing that was measured."""
        return [
            replace(
                self.with_options(fragments=FRAGMENTS, delay=delay, mix=mix),
                streaming=False,
                least=STREAMED_INTERVAL,
            )
            for delay in DELAYS
            for mix in MIXES
        ]


CANDIDATES = (
    Candidate(recipe="muon"),
    Candidate(recipe="adamw"),
    Candidate(recipe="one_bit_muon", factors=(0.5, 1.0, 2.0)),
    # Its form for many replicas, with all that it stands for, as the evidence has it.
    Candidate(recipe=f"one_bit_muon(parts={PARTS_OF_MANY}, lengthen=True)", from_replicas=MANY),
    Candidate(recipe="one_bit_muon", growing=True),
    Candidate(recipe="one_bit_muon", streaming=True),
    Candidate(recipe="local_muon"),
    Candidate(recipe="muloco"),
    Candidate(recipe="sparseloco"),
    Candidate(recipe="diloco"),
    Candidate(recipe="demo"),
    Candidate(recipe="distro"),
)


def without_fragments(recipe: str) -> str:
    """The recipe whose exchanges nothing goes on beside.

    >>> without_fragments("one_bit_muon(interval=20, fragments=4, delay=1)")
    'one_bit_muon(interval=20)'
    """
    name, options = parse_recipe(recipe)
    return format_recipe(name, _without(options, ("fragments", "delay", "mix", "merge")))


def same_bytes(recipe: str) -> str:
    """The recipe without what the bytes of its exchanges do not depend on.

    >>> same_bytes("one_bit_muon(interval=20, fragments=4, delay=1)")
    'one_bit_muon(fragments=4)'
    """
    name, options = parse_recipe(recipe)
    return format_recipe(name, _without(options, ("interval", "growth", "outer_momentum", "delay", "mix")))


def _without(options: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}


@cache
def _growth() -> float:
    """growth · steps / interval of the growing recipe in the evidence."""
    row = next(row for row in rows() if row.family.endswith(GROWING))
    local = local_of(row.recipe)
    assert local is not None
    return local.growth * row.steps / interval_of(local)
