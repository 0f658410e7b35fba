"""The table that `muonwire compare` prints: it fits 80 columns, and breaks no word."""

import json
import re
from pathlib import Path

import pytest

from muonwire.cli.compare import table_lines, wrap_recipe
from muonwire.compare.config import FRONTIER
from muonwire.recipes import RECIPES

DEMO = json.loads((Path(__file__).parents[2] / "evidence" / "demo" / "summary.json").read_text())
LONG = "one_bit_muon(interval=28, growth=0.045, outer_momentum=0.5)"
WIDTH = 80
# The widest cells there are: a rate at the edge of a fine grid, and a run that diverged.
WIDEST = {"lr": 0.000875, "lr_at_grid_edge": True, "final_eval_loss": None}


def summary_of(names, **changes):
    return [DEMO[0] | {"recipe": name} | changes for name in names]


@pytest.mark.parametrize("changes", [{}, WIDEST], ids=["ordinary", "widest"])
@pytest.mark.parametrize("names", [RECIPES, FRONTIER], ids=["recipes", "frontier"])
def test_the_table_fits_and_short_names_stay_whole(names, changes):
    lines = table_lines(summary_of(names, **changes), width=WIDTH)
    assert max(map(len, lines)) <= WIDTH
    firsts = {line.split("  ")[0] for line in lines}
    for name in names:
        if "(" not in name:
            assert name in firsts


@pytest.mark.parametrize("width", [8, 22, 30, 59])
def test_a_long_recipe_is_broken_between_words_only(width):
    lines = wrap_recipe(LONG, width)
    words = re.findall(r"[\w=.]+", LONG)
    assert [word for line in lines for word in re.findall(r"[\w=.]+", line)] == words
    assert "".join("".join(lines).split()) == LONG.replace(" ", "")
    assert (len(lines) == 1) == (width >= len(LONG))
    assert all(line.endswith((",", "(")) for line in lines[:-1])


def test_the_lines_of_a_broken_recipe_stand_below_its_first():
    lines = table_lines(summary_of([LONG, "muon"], **WIDEST), width=WIDTH)
    at = next(i for i, line in enumerate(lines) if line.startswith("one_bit_muon("))
    assert "0.000875*" in lines[at]
    assert lines[at + 1] == "  interval=28,"


def test_the_lowest_loss_comes_first_and_what_diverged_last():
    lines = table_lines([*DEMO, *summary_of(["sgd"], final_eval_loss=None)], width=WIDTH)
    names = [line.split()[0] for line in lines[3:]]
    assert names == ["muon", "one_bit_muon", "adamw", "distro", "sgd"]
