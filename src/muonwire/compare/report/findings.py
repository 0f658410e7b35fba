"""The findings of a comparison, as sentences that follow from its numbers alone."""

from collections.abc import Callable

from markupsafe import Markup

from muonwire.compare.report.results import RecipeResult, Results, is_below
from muonwire.compare.report.setting import ReportSetting
from muonwire.compare.report.target import Reached, Target
from muonwire.pages.units import bytes_text, listing_text, loss_text, lr_text, ratio_text, seconds_text


def headline(results: Results) -> Markup:
    """Which recipe ended lowest, by how much, and whether the seeds confirm it."""
    ranking = results.ranking
    if not ranking:
        every = "The only recipe" if len(results.recipes) == 1 else f"All {len(results.recipes)} recipes"
        return Markup("{} diverged, so there is nothing to rank.").format(every)
    best = ranking[0]
    if len(ranking) == 1:
        others = len(results.recipes) - 1
        tail = (
            "" if others == 0 else f"; the other {others} diverged" if others > 1 else "; the other diverged"
        )
        return Markup("{} ended at a loss of {}{}.").format(_name(best), _loss(best), tail)
    second = ranking[1]
    gap = _gap(second, best)
    if gap == 0:
        return Markup("{} and {} ended at the same loss, {}.").format(_name(best), _name(second), _loss(best))
    if is_below(best, second) is False:
        return Markup("{} ({}) and {} ({}) ended level: the ranges of their seeds overlap.").format(
            _name(best), _loss(best), _name(second), _loss(second)
        )
    seeds = ", and every one of its seeds below every one of the other’s" if is_below(best, second) else ""
    return Markup("{} ended lowest, at a loss of {}: {} below {} ({}){}.").format(
        _name(best), _loss(best), loss_text(gap), _name(second), _loss(second), seeds
    )


def findings(results: Results, *, setting: ReportSetting, target: Target | None) -> tuple[Markup, ...]:
    """The sentences after the headline: bytes, costs to reach the target, the subject, and caveats."""
    return (
        *_fewest_bytes(results),
        *_to_target(results, setting=setting, target=target),
        *_subject(results, subject=setting.subject),
        *_diverged(results),
        *_at_edge(results),
        *_few_seeds(results),
    )


def _one(sentence: str, *values: object) -> list[Markup]:
    return [Markup(sentence).format(*values)]


def _fewest_bytes(results: Results) -> list[Markup]:
    ranking = results.ranking
    if not any(_sent(r) for r in results.recipes):
        return _one("Nothing was sent: there are no bytes to compare.")
    senders = [r for r in ranking if _sent(r) > 0]
    if len(senders) < 2:
        return []
    best = ranking[0]
    least = min(senders, key=lambda r: (_sent(r), r.index))
    most = max(senders, key=lambda r: (_sent(r), -r.index))
    if _sent(most) == _sent(least):
        return _one("All recipes sent the same: {} per replica and step.", bytes_text(_sent(least)))
    if least is not best and best not in senders:
        return []
    other = most if least is best else best
    sent, ratio = bytes_text(_sent(least)), ratio_text(_sent(other) / _sent(least))
    fewer = Markup("{} per replica and step, {} fewer than {} ({})").format(
        sent, ratio, _name(other), bytes_text(_sent(other))
    )
    if least is best:
        return _one("It also sent the fewest bytes: {}.", fewer)
    gap = loss_text(_gap(least, best))
    return _one("{} sent the fewest bytes, {}, and ended {} above it.", _name(least), fewer, gap)


def _to_target(results: Results, *, setting: ReportSetting, target: Target | None) -> list[Markup]:
    if target is None or target.reference not in target.reached:
        return []
    reference = _bold(target.reference)
    if len(target.reached) == 1:
        loss = loss_text(target.loss)
        return _one("No other recipe reached the loss at which {} ended, {}.", reference, loss)
    basis = "{}, where {} ended" if target.named else "{}, where {} ended, the highest of those that finished"
    to = Markup("To a loss of ") + Markup(basis).format(loss_text(target.loss), reference)
    costs: tuple[tuple[str, Callable[[Reached], float], Callable[[float], str]], ...] = (
        ("the fewest bytes per replica", lambda r: r.bytes_sent, bytes_text),
        (f"the least modelled time at {setting.link}", lambda r: r.link_s, seconds_text),
    )
    by_recipe: dict[str, list[str]] = {}
    for cost_name, cost, text in costs:
        spent = {
            r.recipe: cost(target.reached[r.recipe]) for r in results.ranking if r.recipe in target.reached
        }
        if not all(value > 0 for value in spent.values()):
            continue
        least = min(spent, key=lambda recipe: spent[recipe])
        phrase = f"{cost_name}, {text(spent[least])}"
        if least != target.reference:
            ratio = ratio_text(spent[target.reference] / spent[least])
            phrase += f" against {text(spent[target.reference])} ({ratio})"
        by_recipe.setdefault(least, []).append(phrase)
    return [
        Markup("{}, {}{} needed {}.").format(
            to, _bold(recipe), " itself" if recipe == target.reference else "", ", and ".join(phrases)
        )
        for recipe, phrases in by_recipe.items()
    ]


def _subject(results: Results, *, subject: str | None) -> list[Markup]:
    if subject is None:
        return []
    ranking = results.ranking
    result = results.find(subject)
    if result is None:
        return _one("{}, which this comparison is about, is not among the results.", _bold(subject))
    if not result.ranked:
        return _one("{}, which this comparison is about, diverged and has no rank.", _name(result))
    if len(ranking) == 1:
        return []
    best, place = ranking[0], ranking.index(result) + 1
    if place == 1:
        return _one("{}, which this comparison is about, ended first of {}.", _name(result), len(ranking))
    level = "; their seeds overlap" if is_below(best, result) is False else ""
    sent = ""
    if _sent(result) > 0 and _sent(best) > 0 and _sent(result) != _sent(best):
        less = _sent(result) < _sent(best)
        ratio = _sent(best) / _sent(result) if less else _sent(result) / _sent(best)
        sent = f", and sent {ratio_text(ratio)} {'fewer' if less else 'more'} bytes"
    sentence = "{}, which this comparison is about, ended in place {} of {}: {} above {}{}{}."
    gap = loss_text(_gap(result, best))
    return _one(sentence, _name(result), place, len(ranking), gap, _name(best), sent, level)


def _diverged(results: Results) -> list[Markup]:
    found = []
    for result in results.recipes:
        if result.ranked:
            continue
        rates = listing_text([lr_text(lr) for lr in sorted({seed.lr for seed in result.seeds})])
        number = len(result.seeds)
        which = "" if number == 1 else f" with {result.num_diverged} of {number} seeds"
        found += _one("{} diverged{} at its best rate ({}) and is not ranked.", _name(result), which, rates)
    return found


def _at_edge(results: Results) -> list[Markup]:
    edge = [r for r in results.recipes if r.ranked and any(seed.lr_at_grid_edge for seed in r.seeds)]
    if not edge:
        return []
    names = Markup(", ").join(_name(r) for r in edge)
    whose = "its" if len(edge) == 1 else "their"
    sentence = "The best learning rate lies at the edge of the grid for {}: a wider grid could lower {} loss."
    return _one(sentence, names, whose)


def _few_seeds(results: Results) -> list[Markup]:
    if len(results.ranking) < 2 or results.num_seeds > 1:
        return []
    return _one("One seed per recipe: how much of a difference is chance was not measured.")


def _bold(name: str) -> Markup:
    return Markup("<b>{}</b>").format(name)


def _name(result: RecipeResult) -> Markup:
    return _bold(result.recipe)


def _loss(result: RecipeResult) -> str:
    assert result.loss is not None
    return loss_text(result.loss)


def _gap(result: RecipeResult, best: RecipeResult) -> float:
    assert result.loss is not None
    assert best.loss is not None
    return result.loss - best.loss


def _sent(result: RecipeResult) -> float:
    return result.mean(lambda seed: seed.bytes_sent_per_step)
