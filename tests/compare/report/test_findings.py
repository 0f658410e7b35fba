"""The sentences follow from the numbers, in every kind of ending."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from muonwire.compare.report.findings import findings, headline
from muonwire.compare.report.results import read_results
from muonwire.compare.report.target import find_target
from tests.compare.report.made_comparisons import FOUR, Made, make_results, make_setting

ADAMW, MUON, DISTRO, LOCAL = FOUR


def sentences(
    recipes: Sequence[Made],
    *,
    seeds: Sequence[int] = (0,),
    replicas: int = 4,
    spread: float = 0.0,
    subject: str | None = None,
    reference: str | None = None,
) -> list[str]:
    """Headline and findings as plain text, with ordinary spaces."""
    results = read_results(*make_results(recipes, seeds=seeds, replicas=replicas, spread=spread))
    setting = make_setting(subject=subject, reference=reference)
    found = findings(results, setting=setting, target=find_target(results, reference=setting.reference))
    return [str(text.striptags()).replace("\u00a0", " ") for text in (headline(results), *found)]


def test_subject_wins():
    text = sentences((ADAMW, MUON, replace(LOCAL, final=3.3)), subject=LOCAL.recipe, reference="adamw")
    assert text[0] == "local_muon(interval=5) ended lowest, at a loss of 3.300: 0.110 below muon (3.410)."
    assert text[1] == (
        "It also sent the fewest bytes: 63.0 kB per replica and step, 76× fewer than adamw (4.80 MB)."
    )
    assert text[2].startswith(
        "To a loss of 3.620, where adamw ended, local_muon(interval=5) needed the fewest bytes"
    )
    assert "the least modelled time at 10mbit/50ms" in text[2]
    assert "local_muon(interval=5), which this comparison is about, ended first of 3." in text


def test_subject_loses():
    text = sentences(FOUR, subject=LOCAL.recipe, reference="adamw")
    assert text[0] == "muon ended lowest, at a loss of 3.410: 0.050 below local_muon(interval=5) (3.460)."
    assert text[1] == (
        "distro sent the fewest bytes, 28.5 kB per replica and step, 168× fewer than muon (4.80 MB), "
        "and ended 0.330 above it."
    )
    assert (
        "local_muon(interval=5), which this comparison is about, ended in place 2 of 4: 0.050 above muon, "
        "and sent 76× fewer bytes."
    ) in text
    assert "One seed per recipe: how much of a difference is chance was not measured." in text


def test_the_ratio_to_the_target_is_the_curves_own():
    results = read_results(*make_results(FOUR, spread=0.0))
    target = find_target(results, reference="adamw")
    assert target is not None
    assert target.loss == 3.62
    curve = results.mean_curves()
    for recipe, reached in target.reached.items():
        rows = [row for row in curve.iter_rows(named=True) if row["recipe"] == recipe]
        first = next(row for row in rows if row["eval_loss"] <= target.loss)
        assert (reached.step, reached.bytes_sent, reached.link_s) == (
            first["step"],
            first["bytes_sent"],
            first["link_s"],
        )
    assert "distro" not in target.reached


def test_reference_that_nobody_matches():
    text = sentences((ADAMW, MUON), reference="muon")
    assert "No other recipe reached the loss at which muon ended, 3.410." in text


@pytest.mark.parametrize("reference", [None, "gone"])
def test_without_a_reference_the_highest_ending_is_the_target(reference):
    text = sentences((ADAMW, MUON), reference=reference)
    assert any(
        t.startswith("To a loss of 3.620, where adamw ended, the highest of those that finished")
        for t in text
    )


def test_reference_that_is_itself_the_cheapest():
    text = sentences((replace(ADAMW, final=3.5, bits=0.1), replace(MUON, final=3.49)), reference="adamw")
    assert any("adamw itself needed the fewest bytes per replica" in t for t in text)


def test_diverged_recipe_is_named_and_not_ranked():
    text = sentences((ADAMW, MUON, replace(DISTRO, diverged_seeds=(0,))), subject="distro")
    assert text[0].startswith("muon ended lowest")
    assert "distro, which this comparison is about, diverged and has no rank." in text
    assert "distro diverged at its best rate (0.004) and is not ranked." in text
    assert not any("sent the fewest bytes" in t and t.startswith("distro") for t in text)


def test_all_diverged():
    text = sentences([replace(made, diverged_seeds=(0,)) for made in FOUR])
    assert text[0] == "All 4 recipes diverged, so there is nothing to rank."
    assert sentences([replace(MUON, diverged_seeds=(0,))])[0] == (
        "The only recipe diverged, so there is nothing to rank."
    )


def test_one_survivor():
    text = sentences((ADAMW, replace(MUON, diverged_seeds=(0,))))
    assert text[0] == "adamw ended at a loss of 3.620; the other diverged."


def test_single_recipe_makes_no_comparison():
    assert sentences((MUON,)) == ["muon ended at a loss of 3.410."]


def test_missing_subject():
    assert "mun, which this comparison is about, is not among the results." in sentences(FOUR, subject="mun")


def test_equal_losses():
    assert sentences((replace(ADAMW, final=3.5), replace(MUON, final=3.5)))[0] == (
        "adamw and muon ended at the same loss, 3.500."
    )


def test_seeds_that_overlap_end_level():
    close = (replace(ADAMW, final=3.501), replace(MUON, final=3.5))
    text = sentences(close, seeds=(0, 1, 2), spread=0.05)
    assert text[0].endswith("ended level: the ranges of their seeds overlap.")
    assert not any("One seed" in t for t in text)


def test_seeds_that_bear_it_out():
    text = sentences((ADAMW, MUON), seeds=(0, 1, 2), spread=0.01)
    assert text[0].endswith("and every one of its seeds below every one of the other’s.")


def test_one_diverged_seed_unranks_a_recipe():
    text = sentences((ADAMW, MUON, replace(LOCAL, final=3.2, diverged_seeds=(1,))), seeds=(0, 1, 2))
    assert text[0].startswith("muon ended lowest")
    assert (
        "local_muon(interval=5) diverged with 1 of 3 seeds at its best rate (0.01) and is not ranked." in text
    )


def test_edge_of_the_grid():
    text = sentences((ADAMW, replace(MUON, at_edge=True)))
    assert (
        "The best learning rate lies at the edge of the grid for muon: a wider grid could lower its loss."
        in text
    )


def test_one_replica_sends_nothing():
    text = sentences((ADAMW, MUON), replicas=1)
    assert "Nothing was sent: there are no bytes to compare." in text
    assert not any("fewest bytes" in t for t in text)


def test_names_are_escaped():
    results = read_results(*make_results((replace(ADAMW, recipe="<i>a</i>"), MUON)))
    assert "<b>&lt;i&gt;a&lt;/i&gt;</b>" in headline(results)
