"""What a recipe costs in loss: the rows themselves, the line between them, and ranges that grow outside of them."""

from dataclasses import replace

import polars as pl
import pytest
from benchmarks import plan_evidence
from benchmarks.scale.record import COLUMNS

from muonwire.plan.evidence import Beside, Row, Trend, beside, rows, trends
from muonwire.plan.loss import expected_cost

SAME = {"replicas": 4, "steps": 1500, "num_parameters": 123_200}


def row(recipe, cost, **changes):
    made = {"task": "a text", **SAME, "seeds": 1, "lr": 0.01, "spread": None, **changes}
    return Row(file="made.json", entries=(0,), recipe=recipe, cost=cost, **made)


MADE = (
    row("muon", 0.0, spread=0.003, seeds=3),
    row("one_bit_muon(interval=10)", 0.01),
    row("one_bit_muon(interval=100)", 0.05),
    row("one_bit_muon(interval=10)", 0.005, replicas=2),
    row("one_bit_muon(interval=10)", 0.02, replicas=8),
    row("one_bit_muon(interval=10)", 0.03, task="another text"),
    row("muloco(interval=10)", 0.02),
    row("adamw", 0.10),
    row("adamw", 0.30, steps=150),
)


def made(recipe, **changes):
    return expected_cost(recipe, **{**SAME, **changes}, known=MADE)


def test_the_shipped_rows_are_what_the_script_makes():
    assert [replace(r) for r in rows()] == [
        Row(**{**entry, "entries": tuple(entry["entries"])}) for entry in plan_evidence.collect()
    ]

    assert list(beside()) == [
        Beside(**{**entry, "sources": tuple(entry["sources"])}) for entry in plan_evidence.collect_beside()
    ]
    assert any("fragments" in row.recipe for row in beside())
    assert list(trends()) == [Trend(**entry) for entry in plan_evidence.collect_trends()]
    assert {trend.of for trend in trends()} == {"num_parameters", "steps"}


def test_at_a_row_the_cost_is_the_row_s():
    for recipe in ("muon", "one_bit_muon", "adamw", "muloco", "demo"):
        shipped = next(r for r in rows() if r.recipe == recipe)
        cost = expected_cost(recipe, **SAME)
        assert cost.expected == pytest.approx(shipped.cost)
        assert cost.low < cost.expected < cost.high
        assert cost.extrapolated == ()
        assert any(str(shipped) == source for source in cost.sources)


def test_between_rows_it_is_a_line_over_the_logarithm_of_h():
    # 1500 steps at H = 10 and 100 are 150 and 15 synchronizations; H = 32 has 47.
    cost = made("one_bit_muon(interval=32)")
    assert cost.expected == pytest.approx(0.03, abs=0.001)
    assert cost.extrapolated == ()
    at_row = made("one_bit_muon(interval=10)")
    assert cost.high - cost.low > at_row.high - at_row.low
    # The curve between two rows may bend, and stays between them: 0.01 and 0.05.
    for side in (cost.high - cost.expected, cost.expected - cost.low):
        assert side**2 - ((at_row.high - at_row.low) / 2) ** 2 == pytest.approx(0.02**2, rel=0.1)


def test_more_replicas_move_the_cost_of_local_steps():
    four, eight = made("one_bit_muon(interval=10)"), made("one_bit_muon(interval=10)", replicas=8)
    assert eight.expected - four.expected == pytest.approx(0.01)
    assert eight.extrapolated == ()
    other = made("muloco(interval=10)", replicas=8)
    assert other.expected == pytest.approx(0.03)
    many = made("one_bit_muon(interval=10)", replicas=16)
    assert many.expected == pytest.approx(0.03)
    assert many.extrapolated == ("16 replicas (2 to 8 measured)",)
    assert many.high - many.low > eight.high - eight.low


def test_a_recipe_that_was_measured_at_several_numbers_of_replicas_has_a_line_of_its_own():
    turns = "one_bit_muon(interval=3, parts=4, lengthen=True)"
    known = (*MADE, row(turns, 0.012), row(turns, 0.016, replicas=16))
    cost = expected_cost(turns, **{**SAME, "replicas": 16}, known=known)
    assert cost.expected == pytest.approx(0.016)
    assert cost.extrapolated == ()
    # Halfway in ln R, where that of the other form says 0.022.
    assert expected_cost(turns, **{**SAME, "replicas": 8}, known=known).expected == pytest.approx(0.014)
    other = expected_cost("muloco(interval=10)", **{**SAME, "replicas": 8}, known=known)
    assert other.expected == pytest.approx(0.03)
    # One that synchronizes in each step has a line, too, where it was measured, and no guess.
    dense = (*MADE, row("muon(momentum=0.9)", -0.01), row("muon(momentum=0.9)", 0.01, replicas=16))
    found = expected_cost("muon(momentum=0.9)", **{**SAME, "replicas": 8}, known=dense)
    assert found.expected == pytest.approx(0.0)
    assert found.high - found.low < 0.1


def test_the_grid_s_rows_take_the_first_seed_s_best_rate_and_seeds_in_common(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_evidence, "ROOT", tmp_path)
    work = {
        "setting": "s",
        "replicas": 16,
        "batch": 8,
        "planned_steps": 1500,
        "steps": 1500,
        "num_parameters": 123_200,
        "data": "kjv",
    }
    runs = [
        ("muon", 0.01, 0, 1.0),
        ("muon", 0.01, 1, 1.1),
        ("muon", 0.02, 0, 1.2),
        ("one_bit_muon(interval=11)", 0.02, 0, 1.05),
        ("one_bit_muon(interval=11)", 0.01, 0, 1.07),
        ("one_bit_muon(interval=11)", 0.02, 1, 1.21),
        ("one_bit_muon(interval=11)", 0.02, 2, 9.0),
    ]
    kept = [
        {
            **dict.fromkeys(COLUMNS),
            **work,
            "recipe": r,
            "lr": lr,
            "seed": seed,
            "loss": loss,
            "config": str(i),
        }
        for i, (r, lr, seed, loss) in enumerate(runs)
    ]
    # Two parts that have a run in common, and a setting without dense Muon.
    pl.DataFrame(kept, schema=COLUMNS, orient="row").write_parquet(tmp_path / "a.parquet")
    alone = {**kept[3], "setting": "other", "config": "alone"}
    pl.DataFrame([alone, kept[0]], schema=COLUMNS, orient="row").write_parquet(tmp_path / "b.parquet")
    dense, ours = plan_evidence.grid_rows(tmp_path)
    assert (dense["recipe"], dense["cost"], dense["entries"]) == ("muon", 0.0, [0, 1])
    assert (ours["recipe"], ours["lr"], ours["seeds"]) == ("one_bit_muon", 0.02, 3)
    assert ours["cost"] == pytest.approx((0.05 + 0.1) / 2)
    assert (ours["file"], ours["entries"]) == ("a.parquet", [3, 5, 6])


def test_a_recipe_of_one_row_takes_the_slope_of_another():
    assert made("muloco(interval=100)").expected == pytest.approx(0.06)
    assert "100 steps a synchronization (10 measured)" in made("muloco(interval=100)").extrapolated


def test_oftener_than_any_row_is_no_better_than_the_rarest_but_may_cost_nothing():
    cost = made("one_bit_muon(interval=1)")
    assert cost.expected == pytest.approx(0.01)
    assert cost.low < 0 < cost.high
    assert cost.extrapolated


def test_a_short_run_is_one_that_synchronizes_rarely():
    assert made("adamw", steps=150).expected == pytest.approx(0.30)
    assert made("one_bit_muon(interval=10)", steps=150).expected == pytest.approx(
        made("one_bit_muon(interval=100)").expected
    )
    # Unless a local step costs as in a long run, which the range holds too.
    assert made("one_bit_muon(interval=10)", steps=150).low < made("one_bit_muon(interval=10)").expected
    assert made("one_bit_muon(interval=10)", steps=150).extrapolated == ("150 steps (1,500 measured)",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_parameters": 123_200_000}, "123,200,000 parameters (123,200 measured)"),
        ({"steps": 15_000}, "15,000 steps (1,500 measured)"),
    ],
)
def test_each_tenfold_beyond_leaves_as_much_open_as_another_text(change, says):
    base, far = made("one_bit_muon(interval=10)"), made("one_bit_muon(interval=10)", **change)
    assert far.extrapolated == (says,)
    assert far.expected == pytest.approx(base.expected)
    tenfolds = 3 if "num_parameters" in change else 1
    widths = [(c.high - c.low) / 2 for c in (base, far)]
    # The other text costs 0.02 more.
    assert widths[1] ** 2 - widths[0] ** 2 == pytest.approx((0.02 * tenfolds) ** 2)


SMALLER = Trend(
    of="num_parameters",
    recipe="one_bit_muon",
    per_doubling=-0.001,
    error=0.0005,
    base=123_200,
    low=123_200,
    high=8 * 123_200,
)


def with_trend(recipe, **changes):
    return expected_cost(recipe, **{**SAME, **changes}, known=MADE, known_trends=[SMALLER])


def test_larger_models_move_the_cost_of_local_steps_as_far_as_was_measured():
    base = made("one_bit_muon(interval=10)")
    four_times = with_trend("one_bit_muon(interval=10)", num_parameters=4 * 123_200)
    assert four_times.expected == pytest.approx(base.expected - 0.002)
    assert four_times.extrapolated == ()
    widths = [(c.high - c.low) / 2 for c in (base, four_times)]
    assert widths[1] ** 2 - widths[0] ** 2 == pytest.approx(0.001**2)
    far = with_trend("one_bit_muon(interval=10)", num_parameters=80 * 123_200)
    assert far.expected == pytest.approx(base.expected - 0.003)
    assert far.extrapolated == ("9,856,000 parameters (123,200 to 985,600 measured)",)
    assert with_trend("one_bit_muon(interval=10)", num_parameters=1000).expected == base.expected


def test_a_trend_of_another_recipe_is_left_open_and_none_passes_dense_muon():
    base, moved = made("muloco(interval=10)"), with_trend("muloco(interval=10)", num_parameters=4 * 123_200)
    assert moved.expected == pytest.approx(base.expected - 0.002)
    widths = [(c.high - c.low) / 2 for c in (base, moved)]
    assert widths[1] ** 2 - widths[0] ** 2 == pytest.approx(0.001**2 + 0.002**2)
    steep = [replace(SMALLER, per_doubling=-0.1)]
    found = expected_cost(
        "muloco(interval=10)", **{**SAME, "num_parameters": 985_600}, known=MADE, known_trends=steep
    )
    assert found.expected == 0.0
    # What synchronizes in each step has no local steps to cost less.
    assert with_trend("adamw", num_parameters=4 * 123_200).expected == made("adamw").expected


def test_what_no_row_tells_is_not_guessed():
    assert made("sparseloco") is None
    assert made("muon(momentum=0.5)") is None


@pytest.mark.parametrize(
    ("recipe", "setting", "losses"),
    [
        # Three seeds; docs/experiments.md, 2026-11-22, an interval that grows.
        ("one_bit_muon(interval=55, outer_momentum=0.5)", {}, (1.2626, 1.2181)),
        # One seed of the screening, 500 steps; docs/experiments.md, 2026-11-22, what makes local Muon lose.
        ("one_bit_muon(interval=10)", {"steps": 500}, (1.344, 1.342)),
    ],
)
def test_other_results_lie_in_the_range(recipe, setting, losses):
    cost = expected_cost(recipe, **{**SAME, **setting})
    assert cost.low <= losses[0] / losses[1] - 1 <= cost.high
