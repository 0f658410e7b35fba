"""hypothesis.2: whether momentum gives most of Muon's benefit."""

from muonwire.report.blocks import Cell, Column, Table
from muonwire.report.charts.parts import swatch
from muonwire.report.hypotheses.answer import (
    CONFIRMED,
    DEPENDS,
    EQUAL_BITS,
    MISSING,
    REFUTED,
    UNDECIDED,
    Answer,
    ended,
    loss,
    loss_cell,
    missing_text,
    without_momentum,
)
from muonwire.report.results import RecipeResult, Results
from muonwire.report.units import digits_text, percent_text

# Recipes that compress as approach A does, and orthogonalize.
COMPRESSED_MUON = ("approach_b", "approach_c", "pre_polar", "ef14_muon")


def momentum_share(results: Results) -> Answer:
    """The share of Muon's gain over no momentum that momentum alone brings, dense and compressed."""
    name, claim = "hypothesis.2", "momentum gives most of Muon’s benefit, orthogonalization is secondary"
    ladders = {
        "dense": (_plain(results, "sgd"), results.find("sgd"), results.find("muon")),
        "compressed": (
            _plain(results, "approach_a"),
            results.find("approach_a"),
            _compressed_muon(results),
        ),
    }
    wanted = {
        "dense": ("sgd(momentum=0.0)", "sgd", "muon"),
        "compressed": ("approach_a(momentum=0.0)", "approach_a", "approach_b"),
    }
    texts: list[str] = []
    sides: list[bool | None] = []
    rows: list[tuple[Cell, ...]] = []
    absent: list[str] = []
    diverged: set[str] = set()
    for kind, ladder in ladders.items():
        missing = [w for w, r in zip(wanted[kind], ladder, strict=True) if r is None or not r.ranked]
        if missing:
            absent += missing
            diverged |= {r.recipe for r in ladder if r is not None and not r.ranked}
            continue
        plain, momentum, muon = (r for r in ladder if r is not None)
        labels = ("no momentum", "momentum", "momentum and polar factor")
        rows += [
            (
                Cell(text=r.recipe, swatch=swatch(r)),
                Cell(text=f"{kind}: {label}"),
                loss_cell(r),
                Cell(text=digits_text(r.bits)),
            )
            for r, label in zip((plain, momentum, muon), labels, strict=True)
        ]
        shares = _shares(plain, momentum, muon)
        if shares is None:
            texts.append(f"{kind.capitalize()}: {muon.recipe} gains nothing over {plain.recipe}.")
            sides.append(None)
            continue
        mean = (loss(plain) - loss(momentum)) / (loss(plain) - loss(muon))
        spread = (
            f" ({percent_text(min(shares))} to {percent_text(max(shares))} over the seeds)"
            if len(shares) > 1
            else ""
        )
        # A share below zero is no part of the way.
        does = (
            f"alone brings {percent_text(mean)}{spread} of the way"
            if mean >= 0
            else "alone makes it worse, on the way"
        )
        texts.append(
            f"{kind.capitalize()}: momentum {does} from {ended(plain)} to {ended(muon)}; {ended(momentum)}."
        )
        sides.append(True if min(shares) > 0.5 else False if max(shares) < 0.5 else None)
    if not sides:
        return Answer(name=name, claim=claim, verdict=MISSING, text=missing_text(absent, diverged))
    if None in sides:
        verdict = UNDECIDED
    elif len(set(sides)) > 1:
        verdict = DEPENDS
    else:
        verdict = CONFIRMED if sides[0] else REFUTED
    if absent:
        texts.append(missing_text(absent, diverged))
    table = Table(
        caption="From no momentum to Muon",
        columns=(
            Column(label="Recipe", numeric=False),
            Column(label="With", numeric=False),
            Column(label="Final loss"),
            Column(label="Bits", unit="per parameter, step"),
        ),
        rows=tuple(rows),
    )
    return Answer(name=name, claim=claim, verdict=verdict, text=" ".join(texts), table=table)


def _plain(results: Results, name: str) -> RecipeResult | None:
    """The recipe of that name whose one option turns momentum off."""
    found = (
        r for r in results.recipes if r.name == name and without_momentum(r) and len(r.first.options) == 1
    )
    return next(found, None)


def _compressed_muon(results: Results) -> RecipeResult | None:
    """The lowest of those that compress with approach A's bits and orthogonalize."""
    limit = results.find("approach_a")
    if limit is None:
        return None
    found = (r for r in results.ranking if r.name in COMPRESSED_MUON and r.bits <= EQUAL_BITS * limit.bits)
    return next(found, None)


def _shares(plain: RecipeResult, momentum: RecipeResult, muon: RecipeResult) -> list[float] | None:
    """Momentum's share of Muon's gain, by seed; ``None`` where Muon gains nothing with some seed."""
    by_seed = [{s.seed: s.final_eval_loss for s in r.seeds} for r in (plain, momentum, muon)]
    shares = []
    for seed in by_seed[0].keys() & by_seed[1].keys() & by_seed[2].keys():
        low, middle, high = (losses[seed] for losses in by_seed)
        assert low is not None
        assert middle is not None
        assert high is not None
        if low <= high:
            return None
        shares.append((low - middle) / (low - high))
    return sorted(shares) or None
