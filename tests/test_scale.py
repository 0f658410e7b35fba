"""The grid of evidence: what it runs, in which order, what it keeps, and what the page makes of it."""

import ctypes
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from benchmarks.scale import law, products, report
from benchmarks.scale.grid import Grid
from benchmarks.scale.plan import DENSE, PARTS, RATES, SUBJECT, TURNS, Part, Setting, made_of, usual_rate
from benchmarks.scale.record import COLUMNS, Record
from benchmarks.scale.texts import DATA, TEXT_BYTES, TEXTS, text_path

from muonwire.compare.virtual import Job
from muonwire.errors import UsageError
from muonwire.recipes import parse_recipe
from muonwire.tasks import TextSettings, TextTask

RECIPES = (*DENSE, SUBJECT, "muloco")
PART = Part(
    title="t",
    about="About.",
    x_title="replicas",
    settings=tuple(Setting(x=k, replicas=k, recipes=RECIPES) for k in (16, 4)),
)


class Finished(Record):
    """A record whose runs end as a function says."""

    def __init__(self, folder, loss):
        super().__init__(folder, "part")
        self.loss, self.order = loss, []

    def done(self, job):
        """``job`` is finished."""
        self.order.append((job.config.replicas, job.run))

    def find(self, setting, config, run, *, command):
        if (config.replicas, run) not in self.order:
            return None
        return {"loss": self.loss(setting, run), "bits_sent": 1.0, "setting": setting.name}


def run_all(tmp_path, loss):
    """The order in which the runs of PART end, one at a time."""
    record = Finished(tmp_path, loss)
    folders = {"runs": tmp_path, "texts": tmp_path}
    grid = Grid(PART, record, **folders, command="c", compile=False, most=5)
    shares = []
    while job := next(grid.left(), None):
        assert isinstance(job, Job)
        record.done(job)
        shares.append(grid.costs())
    assert shares[-1][1] == 0
    return record.order


def test_a_recipe_tries_rates_until_the_best_lies_inside_and_seeds_are_run_of_what_ends_close(tmp_path):
    best = {"muon": 0.056, "muon(momentum=0.9)": 0.014, SUBJECT: 0.014, "muloco": 0.007}
    base = {"muon": 1.305, "muon(momentum=0.9)": 1.3, SUBJECT: 1.36, "muloco": 1.38}

    def loss(setting, run):
        return base[run.recipe] + abs(RATES.index(run.lr) - RATES.index(best[run.recipe]))

    order = run_all(tmp_path, loss)
    first, second = ([run for k, run in order if k == replicas] for replicas in (16, 4))
    # A row is complete before the next one begins, and the two rows do the same, whichever rate they begin with.
    assert [k for k, _ in order] == [16] * len(first) + [4] * len(second)
    assert {run for run in first if run.seed} == {run for run in second if run.seed}
    tried = {r: [run.lr for run in first if (run.recipe, run.seed) == (r, 0)] for r in RECIPES}
    for recipe, rates in tried.items():
        assert min(rates) < best[recipe] < max(rates)
        assert len(rates) <= 5
    assert len(tried["muon"]) == 5
    further = [(run.recipe, run.lr, run.seed) for run in first if run.seed]
    # MuLoCo is farther than 1 % from the reference and from the subject, and the other dense Muon is no reference.
    close = ["muon(momentum=0.9)", SUBJECT]
    assert further == [(r, best[r], seed) for r in close for seed in (1, 2)]


def test_a_recipe_whose_best_rate_is_far_away_stops_after_five(tmp_path):
    order = run_all(tmp_path, lambda setting, run: 2 - RATES.index(run.lr) / 10)
    for recipe in RECIPES:
        rates = [run.lr for k, run in order if (k, run.recipe, run.seed) == (16, recipe, 0)]
        assert len(rates) == 5
        assert max(rates) == RATES[min(usual_rate(recipe, sequences=128, size="pico") + 3, len(RATES) - 1)]


def test_every_part_names_recipes_and_data_that_there_are():
    for part in PARTS.values():
        for setting in part.settings:
            assert setting.recipes[:2] == DENSE
            assert setting.data in DATA
            for recipe in setting.recipes:
                parse_recipe(recipe)
                sequences = setting.replicas * setting.batch
                assert 0 < usual_rate(recipe, sequences=sequences, size=setting.size) < len(RATES) - 1
    assert [s.replicas for s in PARTS["replicas"].settings] == [16, 4, 8, 2, 32, 1]
    assert {s.replicas * s.batch for s in PARTS["total"].settings} == {64}
    assert (
        made_of("one_bit_muon")
        != made_of("one_bit_muon(outer_lr=1.0)")
        != made_of("one_bit_muon(interval=5)")
    )


def test_texts_are_cut_so_that_each_replica_draws_from_one(tmp_path, monkeypatch):
    for number, name in enumerate(TEXTS):
        monkeypatch.setitem(TEXTS, name, lambda number=number: bytes([97 + number]) * (TEXT_BYTES + 9))
    files = tuple(text_path(name, tmp_path) for name in TEXTS)
    task = TextTask(TextSettings(text=files, own_text=True, batch=2, sequence=32))
    for rank in range(8):
        tokens = task.batch(seed=0, step=1, rank=rank, world_size=8)["tokens"]
        assert set(tokens.unique().tolist()) <= {97 + rank // 2, ord("\n")}
    monkeypatch.setitem(TEXTS, "german", lambda: b"short")
    with pytest.raises(UsageError, match="the text german has 5 bytes; at least"):
        text_path("german", tmp_path / "other")


def test_a_package_that_cannot_be_fetched_is_named_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UsageError, match=r"dict-gcide cannot be fetched \(apt-get and dpkg-deb is missing\).*--texts"
    ):
        text_path("dictionary", tmp_path)


def rows(recipe, losses, *, x="16", lr=0.01, bits=0.1, chains=None):
    """The kept runs of a recipe: a loss for each seed."""
    default = dict.fromkeys(COLUMNS)
    made = made_of(recipe) if chains is None else chains
    return [
        {**default, "setting": f"s{x}", "x": x, "recipe": recipe, "lr": lr, "seed": seed, "loss": loss}
        | {"bits_sent": bits, "chains": made}
        for seed, loss in enumerate(losses)
    ]


def written(path, kept):
    path.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(kept, schema=COLUMNS, orient="row").write_parquet(path / "replicas.parquet")
    return path


def test_the_page_shows_each_recipe_at_its_best_rate_beside_the_better_dense_muon(tmp_path):
    kept = (
        rows("muon", [1.30, 1.20]) + rows("muon", [1.5], lr=0.02) + rows("muon(momentum=0.9)", [1.25, 1.24])
    )
    kept += rows("one_bit_muon", [1.2625, 1.30], lr=0.014) + rows("one_bit_muon", [1.4], lr=0.007)
    kept += rows("one_bit_muon", [None], lr=0.028) + rows("muloco", [1.0], chains="of another day")
    lines = report.section("replicas", written(tmp_path, kept)).splitlines()
    assert "![Loss above dense Muon by replicas, 8 sequences a replica](images/scale/replicas.png)" in lines
    assert "| 16 | `muon` | 1.2500 | +0.39 % (-3.23 to +4.00) | 0.1 | 0.01* | 2 |" in lines
    assert "| 16 | `one_bit_muon` | 1.2812 | +2.92 % (+1.00 to +4.84) | 0.1 | 0.014 | 2 |" in lines
    assert not any("muloco" in line for line in lines)
    # The other rates, beside the best one with the first seed.
    assert "| 16 | `muon` | 0.01 |  |  | +15.38 |  |" in lines
    assert "| 16 | `one_bit_muon` | 0.014 |  | +10.89 | diverged |  |" in lines
    assert not any(line.startswith("| 16 | `muon(momentum=0.9)` | 0.01 |") for line in lines)
    empty = report.section("replicas", tmp_path / "none")
    assert empty.endswith("This part has not been run.\n")


def test_the_law_finds_what_the_settings_were_made_of(tmp_path):
    def gap(turns, doublings, *, python=False):
        return (1.0 + 0.25 * doublings if turns else 2.0 + 1.5 * doublings) + 0.75 * python

    kept = []
    for x, data in (
        ("2", "kjv"),
        ("4", "kjv"),
        ("8", "kjv"),
        ("16", "kjv"),
        ("16p", "python"),
        ("8b", "kjv_by_book"),
    ):
        work = {
            "replicas": int(x.rstrip("pb")),
            "batch": 8,
            "num_parameters": 123_200,
            "data": data,
            "planned_steps": 1500,
        }
        doublings = math.log2(work["replicas"] / 8)
        own = rows("muon", [1.0], x=x)
        if x == "8":
            # Four times as many steps, of which the gap knows the square root.
            own += rows("one_bit_muon(interval=44)", [1 + (gap(False, 0) + 3.5) / 100], x=x)
            own += rows("one_bit_muon(interval=99)", [1 + (gap(False, 0) + 7.0) / 100], x=x)
        for recipe in (SUBJECT, TURNS):
            # Two replicas have two turns, and send more.
            over = (
                -9.0
                if (x, recipe) == ("2", TURNS)
                else gap(recipe == TURNS, doublings, python=data == "python")
            )
            own += rows(recipe, [1 + over / 100], x=x)
        kept += [row | work for row in own]
    evidence = written(tmp_path, kept)
    made = law.fit(list(law.points_of(evidence)))
    assert made is not None
    found = {term.name: term for term in made.terms}
    # Replicas with books of their own are none of it, and neither is what no setting differs in.
    assert len(made.points) == 11
    assert list(found) == [
        "all send all, H = 11",
        "a quarter each in turns, H = 3",
        "twice as many replicas, all",
        "twice as many replicas, turns",
        "a quarter of the bits, all",
        "the text Python in place of King James",
    ]
    assert [term.percent for term in made.terms] == pytest.approx([2.0, 1.0, 1.5, 0.25, 3.5, 0.75])
    assert max(term.error for term in made.terms) == pytest.approx(0.0, abs=1e-6)
    assert "| twice as many replicas, all | +1.50 | 0.00 |" in law.section(evidence)
    # Four points have no law of six terms.
    assert law.fit(list(law.points_of(evidence))[:4]) is None
    assert law.section(tmp_path / "none") == "There are too few runs for it.\n"


@pytest.mark.parametrize("name", PARTS)
def test_every_part_has_a_chart_that_can_be_drawn(name):
    part = PARTS[name]
    kept = []
    for setting in part.settings:
        for i, recipe in enumerate(setting.recipes):
            kept += rows(recipe, [1 + i / 100], x=str(setting.x), bits=1 / (i + 1))
    chart = report.chart(name, part, kept)
    assert chart is not None
    shown = {entry.label for entry in chart.key}
    assert any(series.startswith("one_bit_muon") for series in shown)


def test_what_is_far_off_is_told_and_not_drawn(tmp_path):
    near = rows("muon", [1.0], x="8") + rows(TURNS, [1.02], x="8") + rows("muloco", [1.3], x="8")
    assert "in the table only" not in report.section("replicas", written(tmp_path, near))
    evidence = written(tmp_path, near + rows("diloco", [3.6], x="8"))
    far = report.section("replicas", evidence)
    assert "What ends more than 50 % above is in the table only." in far
    assert "| `diloco` | 3.6000 | +260.00 % |" in far
    drawn = report.chart("replicas", PARTS["replicas"], report.read(evidence / "replicas.parquet"))
    assert {entry.label for entry in drawn.key} == {"muon", TURNS, "muloco"}


def test_a_part_in_small_is_run_once_kept_and_found_by_other_parts(tmp_path, monkeypatch, capsys):
    evidence = tmp_path / "evidence"

    def scale(*arguments):
        sizes = {"steps": 2, "replicas": 2, "batch": 1, "settings": 1, "rates": 1, "jobs": 1}
        small = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        folders = ["--evidence", str(evidence), "--runs", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", ["scale", *arguments, *small, "--no-compile", *folders])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("benchmarks.scale", run_name="__main__")
        return ended.value.code, capsys.readouterr()

    few = ("--recipes", "muon", "--seeds", "0")
    code, said = scale("replicas", *few, "--limit-hours", "1")
    assert code == 0
    assert "kjv-pico-2x1-2 muon lr=0.007 seed=0: loss " in said.out
    (row,) = pl.read_parquet(evidence / "replicas.parquet").to_dicts()
    assert (row["steps"], row["replicas"], row["diverged"]) == (2, 2, False)
    assert row["bits_sent"] == pytest.approx(32, rel=0.01)
    assert "--no-compile" in row["command"]
    assert scale("replicas", *few)[1].out == ""
    # The long run has the setting too; its folder of runs is not needed. A look at what is left writes nothing.
    assert scale("long", *few, "--status")[1].out == "100 % of the work is done, as far as it is known\n"
    assert not (evidence / "long.parquet").exists()
    assert scale("long", *few)[1].out == ""
    assert pl.read_parquet(evidence / "long.parquet")["loss"].to_list() == [row["loss"]]
    code, said = scale("replicas", "--recipes", "muon", "--seeds", "1", "--status")
    assert said.out.startswith("left: kjv-pico-2x1-2 muon lr=0.007 seed=1\n0 % of the work")
    assert not list(Path(evidence).glob("*.partial"))


PRODUCTS = """
import torch
from benchmarks.scale.products import are_wide
assert are_wide()
generator = torch.Generator().manual_seed(0)
for m, k, n in ((512, 64, 192), (64, 512, 64), (8, 1000, 24)):
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    # A float32 sum of k products, in any order, is within k roundings of half an eps of the sum of magnitudes.
    assert bool(((a @ b).double() - exact).abs().le(k * torch.finfo(torch.float32).eps / 2 * size).all())
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="torch.compile on the CPU needs a C compiler, too")
def test_wide_products_are_products_within_rounding(tmp_path):
    environment = products.environment(tmp_path)
    assert ctypes.CDLL(str(products.library(tmp_path))).mkl_serv_intel_cpu_true() == 1
    subprocess.run(
        [sys.executable, "-c", PRODUCTS], env=environment, cwd=Path(__file__).parents[1], check=True
    )


def test_wide_products_start_the_program_anew_once_and_are_refused_where_they_do_nothing(
    tmp_path, monkeypatch
):
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.setattr(products, "lacking", lambda: "the processor is not AMD's")
    with pytest.raises(
        UsageError, match="--wide-products does nothing here, since the processor is not AMD's"
    ):
        products.widen(tmp_path, "m", ["replicas"])
    monkeypatch.setattr(products, "lacking", lambda: "")
    (tmp_path / products.LIBRARY).touch()
    products.widen(tmp_path, "m", ["replicas"])
    ((_, arguments, environment),) = started
    assert arguments[1:] == ["-m", "m", "replicas"]
    monkeypatch.setenv(products.PRELOAD, environment[products.PRELOAD])
    products.widen(tmp_path, "m", ["replicas"])
    assert len(started) == 1
