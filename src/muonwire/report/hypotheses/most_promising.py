"""hypothesis.1: whether approach D, hybrid by layer, is the most promising."""

from collections.abc import Sequence

from muonwire.report.blocks import Cell, Column, Table
from muonwire.report.charts.parts import swatch
from muonwire.report.hypotheses.answer import (
    CONFIRMED,
    DEPENDS,
    MISSING,
    REFUTED,
    Answer,
    beats,
    ended,
    listed,
    loss,
    loss_cell,
    missing_text,
    without_momentum,
)
from muonwire.report.results import RecipeResult, Results
from muonwire.report.units import digits_text

# The recipes of the source's approaches; E has two, of which the first is named where both are missing.
APPROACHES = {
    "approach_a": "A",
    "approach_b": "B",
    "approach_c": "C",
    "approach_d": "D",
    "powersgd_muon": "E",
    "approach_e": "E",
    "approach_f": "F",
}


def most_promising(results: Results) -> Answer:
    """Whether another approach ends lower than D without sending more."""
    name, claim = "hypothesis.1", "approach D, hybrid by layer, is the most promising"
    entries = [r for r in results.ranking if r.name in APPROACHES and not without_momentum(r)]
    hybrids = [r for r in entries if APPROACHES[r.name] == "D"]
    others = [r for r in entries if APPROACHES[r.name] != "D"]
    diverged = {r.name for r in results.recipes if not r.ranked}
    present = {APPROACHES[r.name] for r in entries}
    first_names = {letter: name for name, letter in reversed(APPROACHES.items())}
    absent = [first_names[letter] for letter in sorted(first_names) if letter not in present]
    if not hybrids or not others:
        return Answer(name=name, claim=claim, verdict=MISSING, text=missing_text(absent, diverged))
    beaten_by = {r.recipe: [o for o in entries if beats(o, r)] for r in entries}
    beaten = {r.recipe: [o for o in entries if beats(r, o)] for r in entries}
    ranked = sorted(
        entries, key=lambda r: (len(beaten_by[r.recipe]), -len(beaten[r.recipe]), r.loss, r.index)
    )
    better = {d.recipe: [o for o in beaten_by[d.recipe] if o in others] for d in hybrids}
    if all(better.values()):
        verdict = REFUTED
        text = " ".join(
            f"{listed(better[d.recipe])} ended lower than {ended(d)} and sent no more." for d in hybrids
        )
    elif all(any(beats(d, o) for d in hybrids) for o in others):
        verdict = CONFIRMED
        text = f"{listed(hybrids)} ended lower than {listed(others)}, and none of these sent less."
    else:
        free = [d for d in hybrids if not better[d.recipe]]
        lower = {o.recipe for o in others if any(loss(o) < loss(d) for d in free)}
        cheaper = [o for o in others if o.recipe not in lower and not any(beats(d, o) for d in hybrids)]
        dearer = [o for o in others if o.recipe in lower]
        verdict = DEPENDS
        parts = [f"No other approach ended lower than {listed(free)} with as few bits"]
        parts += [f"{listed(cheaper)} sent less or ended level"] if cheaper else []
        parts += [f"{listed(dearer)} ended lower, but sent more or not by every seed"] if dearer else []
        text = "; ".join(parts) + "."
    outside = [r for r in results.ranking if r not in entries and all(beats(r, d) for d in hybrids)]
    if outside:
        lowest = "" if len(outside) == 1 else f", the lowest of {len(outside)} others,"
        text += f" Outside the source, {ended(outside[0])}{lowest} also beats it."
    if absent:
        text += " " + missing_text(absent, diverged)
    table = Table(
        caption="Approaches A to F, the least beaten first",
        columns=(
            Column(label="Recipe", numeric=False),
            Column(label="Approach", numeric=False),
            Column(label="Final loss"),
            Column(label="Bits", unit="per parameter, step"),
            Column(label="Beats", numeric=False),
            Column(label="Beaten by", numeric=False),
        ),
        rows=tuple(
            (
                Cell(text=r.recipe, swatch=swatch(r)),
                Cell(text=APPROACHES[r.name]),
                loss_cell(r),
                Cell(text=digits_text(r.bits)),
                Cell(text=_letters(beaten[r.recipe])),
                Cell(text=_letters(beaten_by[r.recipe])),
            )
            for r in ranked
        ),
        notes=(
            "One recipe beats another if it ends lower and sends no more bits (up to 5 %, by which coded payloads vary).",
        ),
    )
    return Answer(name=name, claim=claim, verdict=verdict, text=text, table=table)


def _letters(recipes: Sequence[RecipeResult]) -> str:
    return " ".join(sorted({APPROACHES[r.name] for r in recipes})) or "–"
