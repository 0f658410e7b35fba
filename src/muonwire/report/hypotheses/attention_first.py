"""hypothesis.3: whether attention weights need orthogonalization most."""

import re
from collections.abc import Sequence

from muonwire.report.blocks import Cell, Column, Table
from muonwire.report.charts.parts import swatch
from muonwire.report.hypotheses.answer import (
    CONFIRMED,
    MISSING,
    REFUTED,
    UNDECIDED,
    Answer,
    ended,
    loss,
    loss_cell,
    missing_text,
)
from muonwire.report.results import RecipeResult, Results, told_apart
from muonwire.report.units import percent_text

# Names that a pattern for each kind of matrix finds in a Llama.
ATTENTION = tuple(f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkvo")
MLP = tuple(f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down"))


def attention_first(results: Results) -> Answer:
    """Muon on attention alone against Muon on the MLP alone, between none and all."""
    name, claim = "hypothesis.3", "attention weights need orthogonalization most"
    muons = [r for r in results.recipes if r.name == "muon" and set(r.first.options) <= {"adam"}]
    found = {
        "all": next((r for r in muons if not r.first.options), None),
        "attention only": next((r for r in muons if _to_adam(r) == (False, True)), None),
        "MLP only": next((r for r in muons if _to_adam(r) == (True, False)), None),
        "none": results.find("adamw"),
    }
    wanted = {
        "all": "muon",
        "attention only": "muon(adam=['mlp'])",
        "MLP only": "muon(adam=['self_attn'])",
        "none": "adamw",
    }
    absent = [wanted[k] for k, r in found.items() if r is None or not r.ranked]
    if absent:
        diverged = {r.recipe for r in found.values() if r is not None and not r.ranked}
        return Answer(name=name, claim=claim, verdict=MISSING, text=missing_text(absent, diverged))
    ranked = {k: r for k, r in found.items() if r is not None}
    attention, mlp, none, every = (ranked[k] for k in ("attention only", "MLP only", "none", "all"))
    lower, higher = (attention, mlp) if loss(attention) < loss(mlp) else (mlp, attention)
    if loss(lower) == loss(higher) or told_apart(lower, higher) is False:
        verdict, borne = UNDECIDED, ", but their seeds overlap"
    else:
        verdict, borne = (CONFIRMED if lower is attention else REFUTED), ""
    gains = ""
    if loss(every) < loss(none):
        whole = loss(none) - loss(every)
        part = {r.recipe: percent_text((loss(none) - loss(r)) / whole) for r in (attention, mlp)}
        gains = (
            f" Of what Muon on all hidden matrices gains over {ended(none)}, it brings {part[attention.recipe]} on attention "
            f"alone and {part[mlp.recipe]} on the MLP alone."
        )
    text = f"{ended(attention)} orthogonalizes attention alone, {ended(mlp)} the MLP alone{borne}.{gains}"
    table = Table(
        caption="Muon on some of the hidden matrices, Adam on the others",
        columns=(
            Column(label="Recipe", numeric=False),
            Column(label="Orthogonalized", numeric=False),
            Column(label="Final loss"),
        ),
        rows=tuple(
            (Cell(text=r.recipe, swatch=swatch(r)), Cell(text=kind), loss_cell(r))
            for kind, r in sorted(ranked.items(), key=lambda item: loss(item[1]))
        ),
    )
    return Answer(name=name, claim=claim, verdict=verdict, text=text, table=table)


def _to_adam(recipe: RecipeResult) -> tuple[bool, bool]:
    """Whether all attention matrices, and all of the MLP, are given to Adam by the option ``adam``; some alone is neither."""
    given = recipe.first.options.get("adam", ())
    patterns = [given] if isinstance(given, str) else list(given)

    def share(names: Sequence[str]) -> float:
        return sum(any(re.search(p, n) for p in patterns) for n in names) / len(names)

    attention, mlp = share(ATTENTION), share(MLP)
    whole = attention in (0.0, 1.0) and mlp in (0.0, 1.0)
    return (attention == 1.0, mlp == 1.0) if whole else (False, False)
