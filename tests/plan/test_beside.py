"""What options add to a recipe's cost of which there are runs beside the same recipe without them."""

import math

import pytest
from benchmarks import plan_evidence

from muonwire.plan.beside import Run, added_cost
from muonwire.plan.evidence import Beside, beside, plain_of
from muonwire.plan.loss import expected_cost

TEXT, SEEDS = 0.02, 0.003
SETTING = {"replicas": 4, "steps": 600, "num_parameters": 123_200}
SHARED = "codec='sign(scale=shared)', vector_codec='sign(scale=shared)'"
LOSSLESS = f"means='lossless', {SHARED}"


def row(options, cost, *, spread=None, interval=11, **changes):
    recipe = f"one_bit_muon(interval={interval}, {options})"
    made = {**SETTING, "seeds": 1 if spread is None else 2, "spread": spread, **changes}
    return Beside(recipe=recipe, plain=plain_of(recipe), sources=(f"made.json {options}",), cost=cost, **made)


MADE = (
    row("delay=1, mix=0.5", 0.002, spread=0.001),
    row("delay=5, mix=0.5", 0.022),
    row("delay=1, mix=1.0", 0.006),
    row("delay=5, mix=1.0", 0.030),
    row("fragments=4", -0.008),
    row("fragments=4, delay=1, mix=0.5", -0.002),
)


def added(options, *, interval=11, name="one_bit_muon", known=MADE, **changes):
    recipe = f"{name}(interval={interval}{', ' if options else ''}{options})"
    return added_cost(Run(recipe=recipe, **{**SETTING, **changes}), known, text=TEXT, seeds=SEEDS)


def test_without_such_options_nothing_is_added():
    assert added("") == added("momentum=0.8") == added("means='gather'")
    assert (added("").expected, added("").open, added("").sources) == (0.0, 0.0, ())


@pytest.mark.parametrize("known", MADE, ids=lambda known: known.recipe)
def test_at_a_row_it_is_the_row_s(known):
    options = known.recipe.removeprefix("one_bit_muon(interval=11, ").removesuffix(")")
    found = added(options)
    assert found.expected == pytest.approx(known.cost)
    assert found.open == pytest.approx(known.spread or SEEDS)
    assert found.extrapolated == ()
    assert str(known) in found.sources


def test_between_two_delays_it_is_a_line():
    assert added("delay=3").expected == pytest.approx(0.012)
    assert added("delay=3").extrapolated == ()


def test_beyond_the_delays_of_fragments_it_grows_as_with_one_fragment_and_as_much_is_open():
    found = added("fragments=4, delay=3")
    assert found.expected == pytest.approx(-0.002 + (0.012 - 0.002))
    assert found.open == pytest.approx(math.hypot(SEEDS, 0.010))
    assert found.extrapolated == ("a delay of 3 with 4 fragments (up to 1 measured)",)


def test_other_numbers_of_fragments_are_the_nearest_one_s():
    found = added("fragments=8, delay=1")
    assert found.expected == pytest.approx(-0.002)
    assert found.open == pytest.approx(math.hypot(SEEDS, 0.004))
    assert found.extrapolated == ("8 fragments (1, 4 measured)",)


def test_another_mixing_is_the_nearest_one_s():
    assert added("delay=1, mix=0.9").expected == pytest.approx(0.006)
    assert added("delay=1, mix=0.9").extrapolated == ("mix=0.9 (0.5 to 1 measured)",)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"interval": 28}, "fragments and delay: H = 28 (11 measured)"),
        ({"replicas": 8}, "fragments and delay: replicas: 8 (4 measured)"),
        ({"steps": 9000}, "fragments and delay: steps: 9,000 (600 measured)"),
        ({"num_parameters": 10**6}, "fragments and delay: parameters: 1,000,000 (123,200 measured)"),
        ({"name": "muloco"}, "fragments and delay: muloco (one_bit_muon measured)"),
    ],
)
def test_in_another_run_all_of_it_is_open(changes, says):
    found = added("delay=5", **changes)
    assert found.expected == pytest.approx(0.022)
    assert found.open == pytest.approx(math.hypot(SEEDS, 0.022))
    assert found.extrapolated == (says,)


def test_without_rows_as_much_is_open_as_for_another_text():
    for options in ("fragments=4, delay=1", "means='recompressed'", "means='auto'"):
        found = added(options, known=())
        assert (found.expected, found.open) == (0.0, TEXT)
        assert found.extrapolated


def test_means_without_loss_cost_what_the_gather_costs():
    # Of the same codec they are the same bits; a scale that is shared is another codec than the one that was measured.
    found = added(LOSSLESS, known=())
    assert (found.expected, found.open) == (0.0, SEEDS)
    assert found.extrapolated == ("a scale that the replicas share (one of each measured)",)
    assert added(f"means='auto', {SHARED}", known=()) == found
    signs = added_cost(Run(recipe="signmuon(means='lossless')", **SETTING), (), text=TEXT, seeds=SEEDS)
    assert signs == added("")


def test_means_that_were_measured_have_their_rows():
    rows = (row("means='recompressed'", 0.004, spread=0.002), row(LOSSLESS, 0.001))
    found = added("means='recompressed'", known=rows)
    assert (found.expected, found.open, found.extrapolated) == (0.004, 0.002, ())
    assert added(LOSSLESS, known=rows).expected == 0.001
    apart = added("means='recompressed'", known=rows, replicas=16)
    assert apart.extrapolated == ("means='recompressed': replicas: 16 (4 measured)",)
    assert apart.open == pytest.approx(math.hypot(0.002, 0.004))
    # Of another recipe's means nothing is known.
    assert added("means='recompressed'", name="muloco", known=rows).open == TEXT
    assert added("means='recompressed', mean_codec='float32'", known=rows).open == TEXT


def test_options_add_up_to_the_recipe_s_own_cost():
    setting = {"replicas": 4, "steps": 1500, "num_parameters": 123_200}
    plain = expected_cost("one_bit_muon(interval=20)", **setting)
    both = expected_cost("one_bit_muon(interval=20, fragments=4, delay=2, means='recompressed')", **setting)
    run = Run(recipe="one_bit_muon(interval=20, fragments=4, delay=2, means='recompressed')", **setting)
    extra = added_cost(run, beside(), text=TEXT, seeds=SEEDS)
    assert both.expected == pytest.approx(plain.expected + extra.expected)
    assert both.high - both.low > plain.high - plain.low
    assert set(both.sources) > set(plain.sources)
    assert both.lr == plain.lr
    # When it is merged follows from the link, of which no row knows.
    assert expected_cost("one_bit_muon(interval=20, merge='arrival')", **setting) is None


def test_rows_are_made_of_pairs_of_the_same_seed():
    def run(recipe, seed, loss):
        return {
            "recipe": recipe,
            "seed": seed,
            "final_eval_loss": loss,
            "source": f"{recipe}{seed}",
            **SETTING,
        }

    late, means = "one_bit_muon(interval=11, delay=1)", "one_bit_muon(means='recompressed')"
    runs = [
        run("one_bit_muon(interval=11)", 0, 2.0),
        run("one_bit_muon(interval=11)", 1, 4.0),
        run(late, 0, 2.2),
        run(late, 1, 4.0),
        run(late, 2, 9.0),
        run(means, 0, 1.0),
        run("one_bit_muon(interval=11, delay=2)", 0, None),
    ]
    # The third seed and the means have no run beside them, and one diverged.
    (made,) = plan_evidence.beside_rows(runs)
    assert (made["recipe"], made["plain"], made["seeds"]) == (late, "one_bit_muon(interval=11)", 2)
    assert made["cost"] == pytest.approx(0.05)
    assert made["spread"] == pytest.approx(0.05)
    with pytest.raises(SystemExit, match="did not do the same work"):
        plan_evidence.beside_rows([runs[0], {**runs[2], "steps": 9}])


def test_the_row_of_recompressed_means_that_is_shipped_is_used():
    (known,) = [row for row in beside() if "recompressed" in row.recipe]
    setting = {"replicas": known.replicas, "steps": known.steps, "num_parameters": known.num_parameters}
    run = Run(recipe="one_bit_muon(interval=11, means='recompressed')", **setting)
    found = added_cost(run, beside(), text=TEXT, seeds=SEEDS)
    assert found.expected == pytest.approx(known.cost)
    assert found.extrapolated == ()
