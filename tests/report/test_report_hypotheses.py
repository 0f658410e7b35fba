"""Every verdict on source 000's hypotheses is reached on made results, and none without its recipes."""

import pytest
from made_comparisons import Made, make_results, make_setting

from muonwire.report import compare_page, read_results, render_page
from muonwire.report.hypotheses.attention_first import attention_first
from muonwire.report.hypotheses.momentum_share import momentum_share
from muonwire.report.hypotheses.most_promising import most_promising


def results_of(endings, *, seeds=(0,), spread=0.0):
    """Results of recipes by text: (final loss, bits) or (final loss, bits, options)."""
    recipes = [
        Made(recipe=text, final=end[0], bits=end[1], options=end[2] if len(end) > 2 else {})
        for text, end in endings.items()
    ]
    return read_results(*make_results(recipes, seeds=seeds, spread=spread))


def answer(ask, endings, **options):
    found = ask(results_of(endings, **options))
    return found.verdict, found.text, found.table


@pytest.mark.parametrize(
    ("endings", "verdict", "says"),
    [
        (
            {"approach_d": (3.5, 8.0), "approach_b": (3.4, 0.1), "approach_a": (3.6, 0.1)},
            "Refuted",
            "approach_b (3.400, 0.100 bit) ended lower than approach_d (3.500, 8.00 bit) and sent no more.",
        ),
        (
            {"approach_d": (3.3, 0.1), "approach_b": (3.4, 0.1), "approach_e": (3.6, 4.0)},
            "Confirmed",
            "approach_d (3.300, 0.100 bit) ended lower than approach_b (3.400, 0.100 bit) and approach_e",
        ),
        (
            {"approach_d": (3.3, 8.0), "approach_b": (3.4, 0.1), "powersgd_muon": (3.2, 16.0)},
            "It depends on the bytes",
            "No other approach ended lower than approach_d (3.300, 8.00 bit) with as few bits; approach_b (3.400, 0.100 bit) "
            "sent less or ended level; powersgd_muon (3.200, 16.0 bit) ended lower, but sent more or not by every seed.",
        ),
    ],
)
def test_the_most_promising_approach(endings, verdict, says):
    found, text, table = answer(most_promising, endings)
    assert found == verdict
    assert text.startswith(says)
    present = {"powersgd_muon" if name == "approach_e" else name for name in endings}
    for name in ("approach_a", "approach_b", "approach_c", "powersgd_muon", "approach_f"):
        assert (f'"{name}"' in text.partition("Missing here: ")[2]) == (name not in present)
    assert len(table.rows) == len(endings)


def test_five_percent_more_bits_are_equal_and_ten_are_not():
    for bits, verdict in ((0.104, "Refuted"), (0.11, "It depends on the bytes")):
        assert answer(most_promising, {"approach_d": (3.5, 0.1), "approach_b": (3.4, bits)})[0] == verdict


def test_seeds_that_overlap_do_not_beat_and_others_outside_the_source_are_named():
    endings = {"approach_d": (3.41, 8.0), "approach_b": (3.40, 0.1), "local_muon": (3.1, 0.1)}
    verdict, text, _ = answer(most_promising, endings, seeds=(0, 1, 2), spread=0.05)
    assert verdict == "It depends on the bytes"
    assert "Outside the source, local_muon (3.100, 0.100 bit) also beats it." in text


def test_the_approaches_are_ranked_by_what_beats_them():
    endings = {
        "approach_a": (3.6, 0.1),
        "approach_b": (3.4, 0.1),
        "approach_d": (3.5, 8.0),
        # Without momentum it is not the source's approach A.
        "approach_a(momentum=0.0)": (3.0, 0.1, {"momentum": 0.0}),
    }
    _, _, table = answer(most_promising, endings)
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["approach_b", "B", "3.400", "0.100", "A D", "–"],
        ["approach_d", "D", "3.500", "8.00", "–", "B"],
        ["approach_a", "A", "3.600", "0.100", "–", "B"],
    ]


@pytest.mark.parametrize(
    ("sgd", "muon", "compressed", "verdict"),
    [
        (3.3, 3.2, 3.3, "Confirmed"),
        (3.8, 3.2, 3.8, "Refuted"),
        (3.3, 3.2, 3.8, "It depends on the bytes"),
        (3.9, 4.1, 3.3, "Undecided"),
    ],
)
def test_the_share_of_momentum(sgd, muon, compressed, verdict):
    endings = {
        "sgd(momentum=0.0)": (4.0, 32.0, {"momentum": 0.0}),
        "sgd": (sgd, 32.0),
        "muon": (muon, 32.0),
        "approach_a(momentum=0.0)": (4.0, 0.1, {"momentum": 0.0}),
        "approach_a": (compressed, 0.1),
        # The best that compresses as much and orthogonalizes; the other sends more.
        "approach_b": (3.2, 0.1),
        "ef14_muon": (3.0, 4.0),
    }
    found, text, table = answer(momentum_share, endings)
    assert found == verdict
    assert [row[0].text for row in table.rows][-1] == "approach_b"
    if verdict == "Confirmed":
        assert "Dense: momentum alone brings 88\u00a0% of the way" in text
    if verdict == "Undecided":
        assert "muon gains nothing over sgd(momentum=0.0)" in text


def test_the_share_of_momentum_by_seed_decides():
    endings = {"sgd(momentum=0.0)": (4.0, 32.0, {"momentum": 0.0}), "sgd": (3.6, 32.0), "muon": (3.2, 32.0)}
    verdict, text, _ = answer(momentum_share, endings, seeds=(0, 1, 2), spread=0.01)
    # A spread common to all recipes leaves the shares of the seeds alike, at a half.
    assert verdict == "Undecided"
    assert "over the seeds" in text
    assert "Missing here: approach_a(momentum=0.0), approach_a and approach_b." in text


MLP_TO_ADAM, ATTENTION_TO_ADAM = "muon(adam=['mlp'])", "muon(adam=['self_attn'])"


def parts(attention, mlp, every=3.2):
    return {
        "muon": (every, 32.0),
        "adamw": (4.0, 32.0),
        MLP_TO_ADAM: (attention, 32.0, {"adam": ["mlp"]}),
        ATTENTION_TO_ADAM: (mlp, 32.0, {"adam": ["self_attn"]}),
    }


@pytest.mark.parametrize(
    ("attention", "mlp", "verdict"),
    [(3.4, 3.6, "Confirmed"), (3.6, 3.4, "Refuted"), (3.4, 3.4, "Undecided")],
)
def test_attention_first(attention, mlp, verdict):
    found, text, table = answer(attention_first, parts(attention, mlp))
    assert found == verdict
    assert "on attention alone and" in text
    assert len(table.rows) == 4


def test_attention_first_needs_every_seed():
    endings = parts(3.4, 3.41)
    assert answer(attention_first, endings, seeds=(0, 1, 2), spread=0.05)[0] == "Undecided"
    assert answer(attention_first, parts(3.4, 3.6), seeds=(0, 1, 2), spread=0.01)[0] == "Confirmed"


def test_patterns_decide_which_matrices_are_left_to_adam():
    endings = parts(3.4, 3.6)
    endings["muon(adam=['q_proj'])"] = (3.0, 32.0, {"adam": ["q_proj"]})
    endings["muon(adam='gate|up_proj|down')"] = (2.0, 32.0, {"adam": ["gate|up_proj|down"]})
    del endings[MLP_TO_ADAM]
    _, text, table = answer(attention_first, endings)
    assert "muon(adam='gate|up_proj|down') (2.000, 32.0 bit) orthogonalizes attention alone" in text
    assert not [row for row in table.rows if "q_proj" in row[0].text]


def test_muon_on_all_that_gains_nothing_leaves_out_the_shares():
    _, text, _ = answer(attention_first, parts(3.4, 3.6, every=4.1))
    assert "Of what Muon" not in text


@pytest.mark.parametrize("ask", [most_promising, momentum_share, attention_first])
def test_without_its_recipes_an_answer_says_which_to_run(ask):
    verdict, text, table = answer(ask, {"distro": (3.7, 0.1), "normuon": (3.4, 32.0)})
    assert verdict == "Not answered"
    assert table is None
    assert "Missing here: " in text
    assert "to --recipes of the command under Setting" in text


def test_a_recipe_that_diverged_is_not_called_missing():
    recipes = [
        Made(recipe="approach_d", final=3.5, bits=1.0, diverged_seeds=(0,)),
        Made(recipe="approach_b", final=3.4, bits=1.0),
    ]
    found = most_promising(read_results(*make_results(recipes)))
    assert found.verdict == "Not answered"
    assert found.text.startswith("approach_d diverged. Missing here: approach_a, ")


def test_the_page_holds_the_three_answers():
    page = render_page(compare_page(setting=make_setting(), results=results_of(parts(3.4, 3.6))))
    for number in (1, 2, 3):
        assert f"hypothesis.{number}: " in page
    assert "<b>Confirmed.</b>" in page


def test_momentum_that_makes_it_worse_is_told_without_a_share():
    endings = {"sgd(momentum=0.0)": (4.0, 32.0, {"momentum": 0.0}), "sgd": (4.4, 32.0), "muon": (3.2, 32.0)}
    verdict, text, _ = answer(momentum_share, endings)
    assert verdict == "Refuted"
    assert "Dense: momentum alone makes it worse, on the way from" in text
    assert "%" not in text.partition(";")[0]
