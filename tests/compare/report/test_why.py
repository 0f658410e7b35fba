"""The sentence on each recipe follows from its measures, rule by rule."""

from dataclasses import replace

import pytest

from muonwire.compare.report import compare_page, read_results
from muonwire.compare.report.why import why, why_section
from muonwire.pages import render_page
from tests.compare.report.made_comparisons import Made, make_results, make_setting

DENSE = {"alignment": 0.98, "effective_rank": 0.9, "disagreement": 0.8, "kept_over_sent": None}
MUON = Made(recipe="muon", final=3.0, bits=32.0, diagnostics=DENSE)


def made(final=3.3, bits=0.32, **changes):
    return Made(recipe="other", final=final, bits=bits, diagnostics=DENSE | changes)


def results_of(*recipes, seeds=(0,), spread=0.0):
    return read_results(*make_results(recipes, seeds=seeds, spread=spread))


def sentence(recipe, *others, **options):
    results = results_of(recipe, *others, **options)
    return str(why(results.find(recipe.recipe), results).striptags()).replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"alignment": 0.4},
            "its weights move at a cosine of 0.40 to the dense update (dense Muon’s: 0.98).",
        ),
        ({"effective_rank": 0.2}, "the change has an effective rank of 20 % (dense Muon’s: 90 %)."),
        (
            {"disagreement": 1.6},
            "its replicas differ by 1.60 of their mean before an exchange (dense Muon’s: 0.80).",
        ),
        ({"kept_over_sent": 7.5}, "its feedback keeps 7.5× what an exchange sends."),
    ],
)
def test_each_measure_that_departs_is_the_reason(changes, says):
    assert sentence(made(**changes), MUON) == f"10 % above dense Muon at 100× fewer bits: {says}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alignment": 0.89},
        {"effective_rank": 0.7},
        {"disagreement": 0.95},
        {"kept_over_sent": 0.9},
        {"alignment": None},
    ],
)
def test_a_measure_that_hardly_departs_is_no_reason(changes):
    assert sentence(made(**changes), MUON).endswith(
        "none of the measures departs far enough from dense Muon’s to explain it."
    )


def test_the_farthest_departure_comes_first():
    text = sentence(made(alignment=0.8, effective_rank=0.05, kept_over_sent=2.0), MUON)
    places = [text.index(word) for word in ("mainly, the change", "its feedback", "its weights")]
    assert places == sorted(places)


def test_an_extreme_among_many_is_said_to_be_one():
    others = [
        Made(recipe=f"r{i}", final=3.2, bits=1.0, diagnostics=DENSE | {"alignment": 0.6}) for i in range(2)
    ]
    assert ", the lowest here." in sentence(made(alignment=0.4), MUON, *others)
    assert "the lowest here" not in sentence(made(alignment=0.4), MUON, *others[:1])
    assert "the lowest here" not in sentence(made(alignment=0.7), MUON, *others)


def test_a_recipe_that_ends_lower_does_so_in_spite_of_its_measures():
    assert sentence(made(final=2.9, alignment=0.4), MUON).startswith(
        "3.3 % below dense Muon at 100× fewer bits, although its weights move"
    )


@pytest.mark.parametrize(("final", "seeds", "spread"), [(3.001, (0,), 0.0), (3.01, (0, 1, 2), 0.05)])
def test_a_small_gap_or_overlapping_seeds_are_level(final, seeds, spread):
    text = sentence(made(final=final, alignment=0.4), MUON, seeds=seeds, spread=spread)
    assert text.startswith("Level with dense Muon at 100× fewer bits, although")


def test_the_bits_are_named_where_they_differ():
    assert sentence(made(bits=32.0), MUON).startswith("10 % above dense Muon; none")
    assert sentence(made(bits=64.0), MUON).startswith("10 % above dense Muon at 2.0× more bits; none")


def test_what_cannot_be_explained_says_why():
    diverged = replace(made(), diverged_seeds=(0,))
    assert sentence(diverged, MUON) == "Diverged, so there is no end to explain."
    assert sentence(replace(made(), diagnostics={}), MUON) == "Not measured: its runs took no probes."
    figures = "alignment 0.98, effective rank 0.90, disagreement 0.80"
    assert sentence(MUON) == f"The reference: {figures}."
    assert sentence(made()) == f"No run of muon to measure it against: {figures}."


def test_results_from_before_the_measures_have_no_section():
    summary, curves = make_results((MUON, made()))
    for row in summary:
        del row["diagnostics"]
    results = read_results(summary, curves)
    assert why_section(results) is None
    page = render_page(compare_page(setting=make_setting(), results=results))
    assert "Why they end there" not in page
    assert "<dt>Alignment</dt>" not in page


def test_the_section_holds_every_recipe_and_its_figures():
    section = why_section(results_of(MUON, made(alignment=0.4)))
    table, sentences = section.blocks
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["muon", "+0.0 %", "0.98", "0.90", "0.80", "–"],
        ["other", "+10.0 %", "0.40", "0.90", "0.80", "–"],
    ]
    assert [name for name, _ in sentences.items] == ["muon", "other"]
    page = render_page(compare_page(setting=make_setting(), results=results_of(MUON, made(alignment=0.4))))
    assert "Why they end there" in page
    assert "<dt>Alignment</dt>" in page
