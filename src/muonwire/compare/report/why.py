"""Why each recipe ends at its loss: its measures beside dense Muon's, by fixed rules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from muonwire.compare.report.marks import swatch
from muonwire.compare.report.results import RecipeResult, Results, is_below
from muonwire.pages.blocks import Cell, Column, Section, Table, Terms, text_table
from muonwire.pages.units import digits_text, percent_text, ratio_text

REFERENCE = "muon"


def _figure(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else digits_text(value)


# A measure counts as a reason where it lies beyond this share of dense Muon's, or of what is sent: below it where it is less than
# one, else above it. Then how its figures are written, and the words for its own and dense Muon's.
REASONS: dict[str, tuple[float, Callable[[float], str], str]] = {
    "alignment": (0.9, _figure, "its weights move at a cosine of {} to the dense update (dense Muon’s: {})"),
    "effective_rank": (0.75, percent_text, "the change has an effective rank of {} (dense Muon’s: {})"),
    "disagreement": (
        1.25,
        _figure,
        "its replicas differ by {} of their mean before an exchange (dense Muon’s: {})",
    ),
    "kept_over_sent": (1.0, ratio_text, "its feedback keeps {} what an exchange sends"),
}
# Losses that differ by less than this share of dense Muon's count as level.
LEVEL = 0.001

DEFINITIONS = (
    (
        "Alignment",
        "Cosine between the change of the shared weights, of the last step or with local steps of the last "
        "synchronization, and the dense update −polar(mean of the replicas’ momenta). Mean over the hidden matrices. All four "
        "measures are means over a few probes of each run.",
    ),
    (
        "Effective rank",
        "exp(entropy of the normalized singular values) of the same change, over the number of singular values.",
    ),
    (
        "Disagreement",
        "How far the replicas are apart before an exchange, in their weight changes with local steps, else in their momenta: root "
        "mean square distance from the mean over the replicas, over the mean’s norm.",
    ),
    (
        "Kept over sent",
        "Norm of what the feedback keeps for later exchanges, over the norm of what an exchange sends.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Reason:
    """A measure that departs from dense Muon's: by how much, from 0 (not at all) to 1, and in words."""

    weight: float
    text: str


def why_section(results: Results) -> Section | None:
    """The measures of all recipes and a sentence on each, or ``None`` where nothing was measured."""
    if not any(seed.diagnostics for r in results.recipes for seed in r.seeds):
        return None
    recipes = results.ordered
    reference = _reference(results)
    sentences = tuple((r.recipe, why(r, results)) for r in recipes)
    lead = "What the runs measured beside dense Muon’s figures" if reference else "What the runs measured"
    return Section(
        title="Why they end there",
        anchor="why",
        lead=f"{lead}, at a few probes of each run. The sentences follow from the figures by fixed rules.",
        blocks=(_table(recipes, reference), Terms(items=sentences)),
    )


def why(recipe: RecipeResult, results: Results) -> Markup:
    """One sentence: where the recipe ended against dense Muon, and the measures in which they differ."""
    if not recipe.ranked:
        return Markup("Diverged, so there is no end to explain.")
    if all(recipe.diagnostic(name) is None for name in REASONS):
        return Markup("Not measured: its runs took no probes.")
    reference = _reference(results)
    if reference is None:
        return Markup("No run of {} to measure it against: {}.").format(REFERENCE, _figures(recipe))
    if recipe is reference:
        return Markup("The reference: {}.").format(_figures(recipe))
    reasons = [r.text for r in find_reasons(recipe, reference, results)]
    landed, gap = _landed(recipe, reference)
    if not reasons:
        return Markup("{}; none of the measures departs far enough from dense Muon’s to explain it.").format(
            landed
        )
    listed = "; ".join(reasons)
    if gap <= 0:
        return Markup("{}, although {}.").format(landed, listed)
    return Markup("{}: {}{}.").format(landed, "mainly, " if len(reasons) > 1 else "", listed)


def find_reasons(recipe: RecipeResult, reference: RecipeResult, results: Results) -> list[Reason]:
    """The measures by which ``recipe`` departs from ``reference``, the farthest first."""
    others = [r for r in results.ranking if r is not reference]
    reasons = []
    for measure, (limit, figure, text) in REASONS.items():
        value = recipe.diagnostic(measure)
        # Dense Muon keeps nothing; what is kept is measured against what is sent.
        dense = 1.0 if measure == "kept_over_sent" else reference.diagnostic(measure)
        if value is None or dense is None:
            continue
        lowest = limit < 1
        if (dense and value < limit * dense) if lowest else value > limit * dense:
            extreme = _extreme(recipe, others, measure, lowest=lowest)
            weight = 1 - (value / dense if lowest else dense / value)
            reasons.append(Reason(weight=weight, text=text.format(figure(value), figure(dense)) + extreme))
    return sorted(reasons, key=lambda reason: -reason.weight)


def _extreme(recipe: RecipeResult, others: Sequence[RecipeResult], measure: str, *, lowest: bool) -> str:
    """A remark where this recipe's measure is the most extreme of three or more; else an empty text."""
    mine = recipe.diagnostic(measure)
    values = [v for r in others if r is not recipe and (v := r.diagnostic(measure)) is not None]
    assert mine is not None
    if len(values) < 2 or not all(mine < v if lowest else mine > v for v in values):
        return ""
    return f", the {'lowest' if lowest else 'highest'} here"


def _reference(results: Results) -> RecipeResult | None:
    found = results.find(REFERENCE)
    return found if found and found.ranked and found.diagnostic("alignment") is not None else None


def _landed(recipe: RecipeResult, reference: RecipeResult) -> tuple[str, float]:
    """Where the recipe ended in words, and its relative gap to dense Muon, 0 where the two are level."""
    assert recipe.loss is not None
    assert reference.loss is not None
    gap = recipe.loss / reference.loss - 1
    lower, higher = (recipe, reference) if gap < 0 else (reference, recipe)
    if abs(gap) < LEVEL or is_below(lower, higher) is False:
        where, gap = "Level with dense Muon", 0.0
    else:
        where = f"{percent_text(abs(gap))} {'below' if gap < 0 else 'above'} dense Muon"
    if recipe.bits and reference.bits and recipe.bits != reference.bits:
        less = recipe.bits < reference.bits
        ratio = reference.bits / recipe.bits if less else recipe.bits / reference.bits
        where += f" at {ratio_text(ratio)} {'fewer' if less else 'more'} bits"
    return where, gap


def _figures(recipe: RecipeResult) -> str:
    found = [(name, recipe.diagnostic(name)) for name in REASONS]
    return ", ".join(f"{name.replace('_', ' ')} {_figure(v)}" for name, v in found if v is not None)


def _table(recipes: Sequence[RecipeResult], reference: RecipeResult | None) -> Table:
    columns = (
        "Recipe",
        Column(label="Loss", unit="against dense Muon"),
        Column(label="Alignment", unit="with the dense update"),
        Column(label="Effective rank", unit="of the change"),
        Column(label="Disagreement", unit="between replicas"),
        Column(label="Kept over sent", unit="feedback"),
    )
    rows = []
    for r in recipes:
        gap = "–"
        if reference and reference.loss and r.loss is not None:
            gap = f"{100 * (r.loss / reference.loss - 1):+.1f} %"
        values = [r.diagnostic(name) for name in REASONS]
        cells = (Cell(text="–" if v is None else _figure(v)) for v in values)
        rows.append((Cell(text=r.recipe, swatch=swatch(r)), Cell(text=gap), *cells))
    notes = ("A dash: the measure does not apply, or was not taken.",)
    return text_table("Measures by recipe, lowest loss first", columns, rows, notes=notes)
