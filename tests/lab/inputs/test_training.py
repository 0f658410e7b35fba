"""The comparison that claims about training read: what it holds, what it is made with, what comes out of its figures."""

import json
import math
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from muonwire.compare.comparison import RESULTS, SUMMARY
from muonwire.compare.report import CURVE_COLUMNS
from muonwire.errors import UsageError
from muonwire.lab import load_claims
from muonwire.lab.engine.input import ABOUT, Input
from muonwire.lab.engine.run import identity
from muonwire.lab.inputs import training
from muonwire.lab.inputs.training import RECIPES, SCREENED, SEEDS, Results, share_of_gain


@pytest.mark.parametrize("quick", [False, True])
def test_every_recipe_gets_the_same_grid_and_all_but_the_screened_all_seeds(quick):
    config = training.settings(Path("out"), quick=quick).resolve()
    assert len(set(RECIPES)) == len(RECIPES)
    seeds = SEEDS[:1] if quick else SEEDS
    for recipe in RECIPES:
        assert config.seeds_of(recipe) == (seeds[:1] if recipe in SCREENED else seeds)


def test_every_seed_has_runs_of_its_own_and_a_screened_recipe_the_first_one(tmp_path, monkeypatch):
    quick = training.settings(tmp_path, quick=True)
    few = replace(
        quick, recipes=("muon", "distro", SCREENED[1]), finalists=("muon", "distro"), seeds=SEEDS[:2], jobs=1
    )
    monkeypatch.setattr(training, "settings", lambda out, *, quick: few)
    training.make(tmp_path, True)
    first, second = (Results(tmp_path, seed=s) for s in (0, 1))
    for recipe in ("muon", "distro"):
        assert second[recipe].curve[-1] == (2, second[recipe].loss)
        assert second[recipe].loss != first[recipe].loss
    assert (SCREENED[1] in first, SCREENED[1] in second) == (True, False)


def test_the_identity_is_that_of_the_settings_and_not_of_the_folder():
    full, quick = training.identity(False), training.identity(True)
    assert full["steps"] == training.STEPS
    assert full != quick
    assert "out" not in full
    assert full == json.loads(json.dumps(full))


def entry(recipe, seed, loss):
    return {
        "recipe": recipe,
        "seed": seed,
        "lr": 0.01,
        "final_eval_loss": loss,
        "bits_per_parameter_step": 32.0,
        "bytes_sent_per_step": 100.0,
        "bytes_egress_per_step": 300.0,
        "optimizer_s_per_step": 0.002,
        "diagnostics": {"alignment": 0.9, "effective_rank": None},
    }


@pytest.fixture
def folder(tmp_path):
    """A comparison of two seeds in which approach A diverged and the screened recipe has the first seed."""
    losses = {"muon": 2.0, "distro": 4.0, "approach_a": None}
    entries = [entry(r, s, loss and loss + s) for s in (0, 1) for r, loss in losses.items()]
    entries.append(entry("pre_polar", 0, 3.0))
    (tmp_path / SUMMARY).write_text(json.dumps(entries))
    points = [("muon", 0.01, True), ("muon", 0.02, False)]
    rows = [
        {
            **dict.fromkeys(CURVE_COLUMNS),
            "recipe": r,
            "lr": lr,
            "seed": 0,
            "best": best,
            "step": step,
            "eval_loss": lr * step,
        }
        for r, lr, best in points
        for step in (20, 10)
    ]
    pl.DataFrame(rows, schema=CURVE_COLUMNS, orient="row").write_parquet(tmp_path / RESULTS)
    return tmp_path


def test_rows_have_figures_beside_muon_and_distro_and_the_curve_of_the_best_rate(folder):
    rows = Results(folder, seed=0).rows({"ours": "distro", "dense": "muon"})
    ours = rows[0]
    assert (ours["recipe"], ours["loss"], ours["optimizer_ms"]) == ("ours", 4.0, 2.0)
    assert (ours["over_muon"], ours["over_distro"], ours["added_ms"]) == (100.0, 0.0, 0.0)
    assert math.isnan(ours["effective_rank"])
    curve = [(row["step"], row["evaluation"]) for row in rows if "step" in row]
    assert curve == [(10, 0.1), (20, 0.2)]


def test_a_recipe_that_diverged_has_no_figure(folder):
    diverged = Results(folder, seed=1).rows({"a": "approach_a"})[0]
    assert math.isnan(diverged["loss"])
    assert math.isnan(diverged["over_muon"])


def test_a_screened_recipe_is_left_out_of_other_seeds_and_any_other_is_refused(folder):
    first, second = Results(folder, seed=0), Results(folder, seed=1)
    assert [row["recipe"] for row in first.rows({"before": "pre_polar"})] == ["before"]
    assert second.rows({"before": "pre_polar"}) == []
    with pytest.raises(UsageError, match=r"no training run of 'adamw'.*muon, distro, approach_a.*RECIPES"):
        second.rows({"none": "adamw"})


def test_gains_and_their_shares(folder):
    runs = Results(folder, seed=0)
    muon, distro, half = runs["muon"], runs["distro"], runs["pre_polar"]
    assert muon.below(distro) == 2.0
    assert share_of_gain(half, start=distro, end=muon) == 50.0
    assert math.isnan(share_of_gain(half, start=muon, end=muon))
    assert training.gain("x", of=muon, over=distro) == {"change": "x", "gain": 2.0}
    helps, idle = (
        training.gain_check(setting="s", change="x", below="down", above="up", helps=h) for h in (True, False)
    )
    rows = [{"seed": s, "change": "x", "gain": 2.0 + s} for s in (0, 1)]
    assert (helps.evaluate(rows[:1]).state, idle.evaluate(rows[:1]).state) == ("holds", "fails")


@pytest.mark.parametrize(
    ("check", "rows", "clause"),
    [
        (
            training.below_distro_check("B"),
            [{"change": "B instead of DisTrO alone", "gain": -0.25}],
            "in training approach B ends above DisTrO alone (0.25 nats a token)",
        ),
        (
            training.half_way_check("it", setting="s", select={"way": 1}),
            [{"way": 1, "loss_share": 68.0}],
            "it goes at least half of the way to dense Muon (68 %)",
        ),
        (
            training.lead_check(
                setting="s", column="lead", select={}, ahead="it leads", behind="it lags", where="here"
            ),
            [{"lead": -1.5}],
            "it lags here (by 1.5 nats a token)",
        ),
        (
            training.gain_check(setting="s", change="x", below="down", above="up", helps=False),
            [{"change": "x", "gain": -0.5}],
            "up (0.50 nats a token)",
        ),
    ],
)
def test_what_the_checks_on_training_say(check, rows, clause):
    assert check.evaluate([{"seed": 0, **row} for row in rows]).clause == clause


def test_an_approach_is_held_against_distro(folder):
    row = training.instead_of_distro("Muon", Results(folder, seed=0), "muon")
    assert row == {"change": "Muon instead of DisTrO alone", "gain": 2.0}


def test_an_input_is_made_again_where_it_is_made_with_something_else(tmp_path):
    made = []

    def make(folder, quick):
        made.append(quick)
        (folder / ABOUT).write_text(json.dumps({"steps": 3}))

    for steps, times in ((3, 1), (3, 1), (4, 2)):
        one = Input(name="toy", about="toy", make=make, made_with=lambda quick, n=steps: {"steps": n})
        one.prepare(tmp_path, quick=True)
        assert len(made) == times


def test_a_measurement_on_other_training_does_not_count(monkeypatch):
    claim = load_claims()["approach.A"]
    before = identity(claim, 0, quick=True)
    assert before == identity(claim, 0, quick=True)
    monkeypatch.setattr(training, "RECIPES", RECIPES[:-1])
    assert identity(claim, 0, quick=True) != before
    assert "inputs" not in identity(load_claims()["integration.3"], 0, quick=True)
