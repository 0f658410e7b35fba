"""What `muonwire plan` shows: a table with what stands above and below it, or JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

from muonwire.pages.units import bytes_text, digits_text, percent_text, seconds_text
from muonwire.plan import Cost, Line, Machine, PlannedModel, Rates, Setting
from muonwire.plan.evidence import family_of
from muonwire.recipes import parse_recipe

NOT_FITTING, EXTRAPOLATED = "*", "†"
RECIPE_WIDTH = 22
COLUMN_GAP = "  "
HEADINGS = [
    ["", "recipe"],
    ["", "H"],
    ["each way:", "sync, all"],
    ["wait", "a step"],
    ["", "share"],
    ["loss beside", "dense Muon"],
    ["", "time"],
    ["", "money"],
]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, as it is shown."""

    setting: Setting
    model: PlannedModel
    rates: Rates
    machine: Machine
    lines: Sequence[Line]


def as_json(planned: Planned) -> str:
    """The whole plan as JSON."""
    machine = planned.machine
    lines = [{**asdict(line), "wait_s": line.wait_s} for line in planned.lines]
    record: dict[str, Any] = {
        "setting": asdict(planned.setting),
        "model": {
            "about": planned.model.about,
            "num_parameters": planned.model.num_parameters,
            "num_in_matrices": planned.model.num_in_matrices,
        },
        "rates": asdict(planned.rates),
        "machine": asdict(replace(machine, rates=None)),
        "recipes": lines,
    }
    return json.dumps(record, indent=1)


def heading(planned: Planned) -> list[str]:
    """What was planned for."""
    setting, model, machine = planned.setting, planned.model, planned.machine
    parts = f"{model.num_parameters:,} trainable ({model.num_in_matrices:,} in matrices)"
    step = f"{seconds_text(machine.compute_s)} forward and backward"
    spent = [f"{seconds_text(s)} {inner}" for inner, s in machine.optimizer_s.items() if s]
    return [
        f"{setting.replicas} replicas, {setting.steps:,} steps: {model.about}; {parts}",
        f"link of each: {planned.rates}{' (measured)' if planned.rates.goodput else ''}",
        f"a step without exchange: {step}, optimizer {', '.join(spent)} (measured)"
        if spent
        else f"a step without exchange: {seconds_text(machine.compute_s)}",
        f"exchange may take {percent_text(setting.share)} of the time",
        "",
    ]


def table_lines(planned: Planned) -> list[str]:
    """The table: two rows of figures for each recipe, whose name may take more."""
    blocks = [HEADINGS, *([cell.split("\n") for cell in _cells(line)] for line in planned.lines)]
    if planned.setting.price_per_gb is None:
        blocks = [block[:-1] for block in blocks]
    widths = [max(len(row) for cell in column for row in cell) for column in zip(*blocks, strict=True)]
    lines = []
    for block in blocks:
        for row in zip_longest(*block, fillvalue=""):
            first, *others = (
                text.rjust(w) if i else text.ljust(w)
                for i, (text, w) in enumerate(zip(row, widths, strict=True))
            )
            lines.append(COLUMN_GAP.join((first, *others)).rstrip())
        if block is blocks[0]:
            lines.append("─" * (sum(widths) + len(COLUMN_GAP) * (len(widths) - 1)))
    return lines


def _cells(line: Line) -> list[str]:
    return [
        "\n".join(_recipe_lines(line.recipe)),
        digits_text(line.spacing),
        f"{_each_way(line.up_bytes, line.down_bytes)}\n{_each_way(line.total_up_bytes, line.total_down_bytes)}",
        seconds_text(line.wait_s),
        percent_text(line.share) + ("" if line.fits else NOT_FITTING),
        "not known" if line.cost is None else cost_text(line.cost),
        seconds_text(line.total_s),
        "" if line.money is None else f"{line.money:,.2f}",
    ]


def _recipe_lines(recipe: str) -> list[str]:
    """A line for each option, of which long ones are broken before their value.

    >>> _recipe_lines("one_bit_muon(means='lossless', vector_codec='sign(scale=shared)')")
    ['one_bit_muon(', " means='lossless',", ' vector_codec=', " 'sign(scale=shared)')"]
    """
    if len(recipe) <= RECIPE_WIDTH:
        return [recipe]
    name, options = parse_recipe(recipe)
    lines = [f"{name}("]
    for i, (key, value) in enumerate(options.items()):
        end = "," if i + 1 < len(options) else ")"
        line = f" {key}={value!r}{end}"
        lines += [line] if len(line) <= RECIPE_WIDTH else [f" {key}=", f" {value!r}{end}"]
    return lines


def _each_way(up_bytes: float, down_bytes: float) -> str:
    """One number where both are the same."""
    up, down = bytes_text(up_bytes), bytes_text(down_bytes)
    return up if up == down else f"{up} up, {down} down"


def cost_text(cost: Cost) -> str:
    """Percents: the expected cost, and its range.

    >>> cost_text(Cost(expected=0.028, low=0.01, high=0.046, lr=0.014, sources=(), extrapolated=("replicas",)))
    '+2.8 %†\\n1.0 to 4.6'
    """
    mark = EXTRAPOLATED if cost.extrapolated else ""
    return f"{100 * cost.expected:+.1f} %{mark}\n{100 * cost.low:.1f} to {100 * cost.high:.1f}"


def _called(recipe: str) -> str:
    """What a note calls a line's recipe."""
    return family_of(recipe) + (", in fragments" if "fragments=" in recipe else "")


def notes(planned: Planned) -> list[str]:
    """What the marks mean, where losses come from, and how to begin."""
    texts = []
    if any(not line.fits for line in planned.lines):
        texts.append(f"{NOT_FITTING} more than the share that exchange may take")
    families: dict[tuple[str, ...], list[str]] = {}
    for line in planned.lines:
        if line.cost is not None:
            families.setdefault(line.cost.sources, []).append(_called(line.recipe))
    texts.append("loss after as many steps, over dense Muon's; docs/plan.md has the formula. It comes from:")
    texts += [
        f"  {', '.join(dict.fromkeys(names))}: {'; '.join(sources)}" for sources, names in families.items()
    ]
    beyond: dict[str, list[str]] = {}
    for line in planned.lines:
        for reason in () if line.cost is None else line.cost.extrapolated:
            beyond.setdefault(reason, []).append(_called(line.recipe))
    if beyond:
        texts.append(f"{EXTRAPOLATED} outside of what was measured:")
        texts += [f"  {reason}: {', '.join(dict.fromkeys(names))}" for reason, names in beyond.items()]
    fitting = [line for line in planned.lines if line.fits]
    if fitting:
        others = ", the others with their own --recipe and --lr" if "torchrun" in fitting[0].command else ""
        texts += ["", f"the first of the table{others} (--json has all commands):", fitting[0].command]
    else:
        texts += ["", "no recipe keeps exchange below this share: give a larger --share, or more --steps"]
    return texts
