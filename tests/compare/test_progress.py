"""Progress over all runs of a comparison."""

import io
import json
import re

import pytest
from rich.console import Console

from muonwire.compare import CompareConfig
from muonwire.compare.progress import Tally, comparison_progress
from muonwire.compare.runs import Run, pending, plan, run_folder
from muonwire.train.checkpoint import write_json


def comparison(out, **changes):
    settings = {
        "recipes": ("muon", "adamw"),
        "lr_grid": (0.001, 0.002),
        "seeds": (0, 1),
        "steps": 10,
    } | changes
    return CompareConfig(out=out, **settings).resolve()


def done(config, run, loss=1.0):
    """Write the result that the run would leave."""
    settings = config.run_config(run.recipe, run.lr, run.seed, tuning=run.tuning)
    folder = run_folder(config.out, *run)
    folder.mkdir(parents=True)
    result = {
        "config": json.loads(json.dumps(settings.identity())),
        "replicas": config.replicas,
        "finished": True,
        "final_eval_loss": loss,
        "bits_per_parameter_step": 32.0,
    }
    write_json(folder / "result.json", result)


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, 6),
        ({"seeds": (0,)}, 4),
        ({"finalists": ("muon",)}, 5),
        ({"lr_grid": (0.001,), "seeds": (0,)}, 2),
    ],
    ids=str,
)
def test_the_plan_counts_what_will_be_run(tmp_path, changes, runs):
    config = comparison(tmp_path, **changes)
    assert plan(config) == ([], [10] * runs)
    count = 0
    while left := pending(config):
        done(config, left[0], loss=left[0].lr)
        count += 1
        assert plan(config) == ([10] * count, [10] * (runs - count))
    assert count == runs


def test_the_plan_of_a_search_allows_for_as_many_runs_as_there_may_be(tmp_path):
    config = comparison(tmp_path, tune_steps=2, lr_grid=(0.001, 0.002, 0.004, 0.008))
    finished, left = plan(config)
    assert finished == []
    # Of each recipe three short runs, three in full, and the best rate with the other seed.
    assert left == 2 * ([2, 2, 2] + [10] * 4)
    while left := pending(config):
        done(config, left[0], loss=left[0].lr)
    finished, left = plan(config)
    assert left == []
    assert len(finished) == len(list(tmp_path.glob("*/*/*/result.json")))


def test_the_time_that_is_left_follows_from_the_speed_so_far(tmp_path):
    config, clock = comparison(tmp_path), Clock()
    tally, first = Tally(config, clock=clock), Run("muon", 0.001, 0)
    assert (tally.steps, tally.runs, tally.left_s) == ((0, 60), (0, 6), None)
    # It goes on from a checkpoint.
    tally.at(first, 4)
    assert (tally.steps, tally.left_s) == ((4, 60), None)
    clock.now_s += 8
    tally.at(first, 8)
    assert tally.running == [first]
    assert (tally.steps, tally.left_s) == ((8, 60), 104.0)
    done(config, first)
    tally.finish(first)
    assert (tally.steps, tally.runs, tally.running) == ((10, 60), (1, 6), [])


def test_a_run_that_diverges_early_leaves_no_steps_over(tmp_path):
    config = comparison(tmp_path, recipes=("muon",), lr_grid=(0.001,), seeds=(0,))
    tally, run = Tally(config), Run("muon", 0.001, 0)
    tally.at(run, 0)
    tally.at(run, 3)
    done(config, run, loss=None)
    tally.finish(run)
    assert tally.steps == (10, 10)


def test_without_a_terminal_each_finished_run_is_one_short_line(tmp_path, capsys):
    config = comparison(tmp_path, seeds=(0,))
    with comparison_progress(config, console=Console(file=io.StringIO())) as shown:
        for run in pending(config):
            shown.at(run, 0)
            shown.at(run, 10)
            done(config, run, loss=None if run == Run("adamw", 0.001, 0) else 2.34567)
            shown.finish(run)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    pattern = r"muon lr=0.001 seed=0: loss 2.3457, 32 bit/param \(1 of 4 runs, 0:0\d left\)"
    assert re.fullmatch(pattern, lines[0])
    assert lines[2].startswith("adamw lr=0.001 seed=0: diverged, 32 bit/param (3 of 4 runs")
    assert lines[3].endswith("(4 of 4 runs)")
    assert max(map(len, lines)) <= 80


def test_a_terminal_shows_one_bar_that_fits(tmp_path, capsys):
    drawn = io.StringIO()
    config = comparison(tmp_path, recipes=("muon(adam=['mlp'])", "adamw"), seeds=(0,))
    console = Console(file=drawn, force_terminal=True, width=80)
    with comparison_progress(config, console=console) as shown:
        for run in pending(config):
            shown.at(run, 0)
            shown.at(run, 10)
            console.file.write("\n")
            done(config, run)
            shown.finish(run)
    assert capsys.readouterr().out == ""
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", drawn.getvalue())
    assert "40/40" in text
    assert max(map(len, re.split(r"[\r\n]", text))) <= 80


def test_other_replicas_show_nothing(tmp_path, capsys):
    config = comparison(tmp_path)
    with comparison_progress(config, enabled=False) as shown:
        run = pending(config)[0]
        shown.at(run, 1)
        shown.finish(run)
    assert capsys.readouterr() == ("", "")
