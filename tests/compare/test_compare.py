"""`muonwire compare` with two real processes, end to end."""

import dataclasses
import json
import math
import shutil
import signal
import time
from pathlib import Path

import polars as pl
import pytest

from muonwire.cli.main import main
from muonwire.compare import PRESETS, CompareConfig
from muonwire.compare import compare as compare_here
from muonwire.compare.comparison import check_data
from muonwire.compare.runs import Run, candidates, pending, run_folder, short_runs
from muonwire.compare.summary import summarize
from muonwire.errors import UsageError
from muonwire.recipes import RECIPES as RECIPE_NAMES
from muonwire.tasks import TextSettings
from muonwire.train.metrics import read_metrics
from tests.commands import Command, run

RECIPES = ("adamw", "distro(k=4)", "local_muon(interval=2)")
GRID = (0.004, 1e30)
ARGS = [
    *(
        "--recipes",
        *RECIPES,
        "--lr-grid",
        *map(str, GRID),
        "--seeds",
        "0",
        "1",
        "--steps",
        "8",
        "--replicas",
        "2",
    ),
    *("--sequence", "16", "--batch", "2", "--evaluate-every", "4", "--threads", "1", "--link", "1mbit/10ms"),
]


def compare(out, *args):
    return run(["compare", *ARGS, "--out", str(out), *args], timeout=240)


def compare_by_a_pool(out, *args):
    """With virtual replicas, whose processes fork from the tests' server."""
    with pytest.raises(SystemExit) as ended:
        main(["compare", *ARGS, "--out", str(out), "--virtual", *args])
    assert ended.value.code == 0


def comparison(out):
    return CompareConfig(
        recipes=RECIPES,
        lr_grid=GRID,
        seeds=(0, 1),
        steps=8,
        replicas=2,
        sequence=16,
        batch=2,
        evaluate_every=4,
        link="1mbit/10ms",
        out=out,
    ).resolve()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    done = compare(out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_summary_has_every_field_for_each_recipe_and_seed(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert [(e["recipe"], e["seed"]) for e in summary] == [(r, s) for r in RECIPES for s in (0, 1)]
    for entry in summary:
        assert entry["lr"] == 0.004
        assert entry["replicas"] == 2
        assert entry["steps"] == 8
        assert math.isfinite(entry["final_eval_loss"])
        assert entry["diverged"] is False
        assert entry["bits_per_parameter_step"] == pytest.approx(
            8 * entry["bytes_sent_per_step"] / entry["num_parameters"]
        )
        # With two replicas, what one sends is what the other receives, up to entropy-coded sizes.
        assert entry["bytes_received_per_step"] == pytest.approx(entry["bytes_sent_per_step"], rel=0.01)
        for part in ("compute", "optimizer", "exchange", "link"):
            assert entry[f"{part}_s_per_step"] > 0
    assert summary[2]["options"] == {"k": 4}
    dense, sparse = summary[0]["bits_per_parameter_step"], summary[2]["bits_per_parameter_step"]
    assert 32 < dense < 32.1
    assert sparse < 0.05


def test_a_diverged_run_is_marked_and_the_others_go_on(finished):
    for recipe in RECIPES:
        result = json.loads((run_folder(finished[0], recipe, 1e30, 0) / "result.json").read_text())
        good = json.loads((run_folder(finished[0], recipe, 0.004, 0) / "result.json").read_text())
        assert result["final_eval_loss"] is None or result["final_eval_loss"] > good["final_eval_loss"]
    adamw = json.loads((run_folder(finished[0], "adamw", 1e30, 0) / "result.json").read_text())
    assert adamw["diverged"] is True


def test_every_recipe_sees_the_same_start(finished):
    starts = {
        read_metrics(run_folder(finished[0], recipe, lr, 0))[0]["eval_loss"]
        for recipe in RECIPES
        for lr in GRID
    }
    assert len(starts) == 1


def test_the_curves_are_cumulative_and_complete(finished):
    frame = pl.read_parquet(finished[0] / "results.parquet")
    best = frame.filter(pl.col("best") & (pl.col("recipe") == "adamw") & (pl.col("seed") == 0)).sort("step")
    assert best["step"].to_list() == [0, 4, 8]
    assert best["bytes_sent"].to_list()[0] == 0
    assert best["bytes_sent"].is_sorted()
    assert best["link_s"].is_sorted()
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert best["bytes_sent"].to_list()[-1] == pytest.approx(8 * summary[0]["bytes_sent_per_step"])
    assert best["eval_loss"].to_list()[-1] == summary[0]["final_eval_loss"]


def test_the_report_and_the_charts_are_there(finished):
    out, done = finished
    page = (out / "report.html").read_text()
    assert "local_muon(interval=2)" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (out / "loss_by_steps.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "loss_by_bytes.png").stat().st_size > 10_000
    assert "bit per" in done.stdout
    assert "adamw lr=0.004 seed=0: loss" in done.stdout
    assert "(9 of 9 runs)" in done.stdout
    assert not list(out.glob("runs/*/*/checkpoints"))


def test_rates_may_be_tried_in_shorter_runs(tmp_path):
    args = ("--tune-steps", "3", "--lr-grid", "1e-30", "0.004", "--recipes", "muon", "--seeds", "0", "1")
    compare_by_a_pool(tmp_path, *args)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(e["lr"], e["seed"], e["steps"]) for e in summary] == [(0.004, 0, 8), (0.004, 1, 8)]
    assert all(set(e["tuning"]) == {"1e-30", "0.004"} for e in summary)
    tried = json.loads((run_folder(tmp_path, "muon", 0.004, 0, True) / "result.json").read_text())
    assert tried["steps"] == 3
    assert tried["final_eval_loss"] == summary[0]["tuning"]["0.004"]
    # The best rate with both seeds, and the next lower one with the first.
    assert len(list(tmp_path.glob("runs/*/*"))) == 3
    config = CompareConfig(
        recipes=("muon",),
        lr_grid=(1e-30, 0.004),
        tune_steps=3,
        seeds=(0, 1),
        steps=8,
        replicas=2,
        sequence=16,
        batch=2,
        evaluate_every=4,
        link="1mbit/10ms",
        out=tmp_path,
    ).resolve()
    assert [e["steps"] for e in summarize(config)] == [8, 8]
    shutil.rmtree(tmp_path / "runs")
    assert summarize(config) == [], "a short run is no result while the full ones are missing"


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        ((9, 8, 5, 3, 4, 6), 3),
        ((1, 2, 3, 4, 5, 6), 5),
        ((9, 8, 5, 4, 3, 2), 4),
        ((9, 8, 7, 8, 9, 9), 4),
        ((1, 2, 3, None, None, None), 5),
        ((None,) * 6, 5),
        ((3, 4, 4, 4, 4, 4), 5),
        ((2, 1), 2),
        ((1,), 1),
    ],
)
def test_rates_are_tried_from_the_middle_until_the_best_has_neighbours(losses, tried):
    # The grid may be given in any order; a loss of None is a run that diverged.
    grid = tuple(0.001 * 2.0**i for i in range(len(losses)))
    by_rate = dict(zip(grid, losses, strict=True))
    config = CompareConfig(recipes=("muon",), lr_grid=grid[::-1], tune_steps=3, steps=8).resolve()
    done: list[Run] = []

    def find(run):
        return {"final_eval_loss": by_rate[run.lr]} if run in done else None

    while missing := [run for run in short_runs(config, "muon", find) if run not in done]:
        assert len(missing) == 1 or not done
        done += missing
    assert len(done) == tried
    reached = [loss for loss in losses if loss is not None]
    if reached:
        assert grid[losses.index(min(reached))] in {run.lr for run in done}


def test_finalists_seek_their_rate_in_full_and_others_take_the_next_lower_one():
    config = CompareConfig(
        recipes=("muon", "adamw"),
        finalists=("muon",),
        lr_grid=(0.001, 0.002, 0.004, 0.008),
        tune_steps=3,
        steps=8,
    ).resolve()

    def find(run):
        return {"final_eval_loss": abs(run.lr - 0.004)}

    assert candidates(config, "muon", find) == [0.004, 0.002, 0.001]
    assert candidates(config, "adamw", find) == [0.002]
    assert candidates(config, "adamw", lambda run: {"final_eval_loss": run.lr}) == [0.001]
    assert candidates(config, "adamw", lambda run: {"final_eval_loss": None}) == []

    def diverges_in_full(run):
        return {"final_eval_loss": abs(run.lr - 0.004) if run.tuning else None}

    assert candidates(config, "adamw", diverges_in_full) == [0.002, 0.001]


def test_virtual_replicas_reach_the_same_weights_with_the_same_bytes(finished, tmp_path):
    compare_by_a_pool(tmp_path, "--jobs", "2")
    theirs, ours = (json.loads((out / "summary.json").read_text()) for out in (finished[0], tmp_path))
    for there, here in zip(theirs, ours, strict=True):
        same = {k: v for k, v in there.items() if not k.endswith("_s_per_step") or k == "link_s_per_step"}
        assert {k: here[k] for k in same} == same
    assert "took turns" in (tmp_path / "report.html").read_text()


def test_virtual_runs_that_are_told_to_stop_go_on_later(tmp_path):
    args = (
        "--virtual",
        "--steps",
        "400",
        "--lr-grid",
        "0.004",
        "--seeds",
        "0",
        "--recipes",
        "local_muon(interval=2)",
    )
    running = Command(["compare", *ARGS, "--out", str(tmp_path), *args])
    folder = run_folder(tmp_path, "local_muon(interval=2)", 0.004, 0)
    deadline = time.monotonic() + 120
    while not read_metrics(folder)[2:] and time.monotonic() < deadline:
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=120)
    assert running.returncode != 0
    assert "the same command goes on" in errors
    (left,) = (folder / "checkpoints").iterdir()
    assert left.name


def test_finished_runs_are_not_repeated_and_lost_ones_are(finished, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(finished[0], out)
    assert pending(comparison(out)) == []
    kept = run_folder(out, "adamw", 0.004, 0) / "result.json"
    before = kept.stat().st_mtime_ns
    (run_folder(out, "distro(k=4)", 0.004, 1) / "result.json").unlink()
    assert pending(comparison(out)) == [Run("distro(k=4)", 0.004, 1)]
    first = json.loads((out / "summary.json").read_text())
    done = compare(out)
    assert done.returncode == 0, done.stderr
    assert kept.stat().st_mtime_ns == before
    again = json.loads((out / "summary.json").read_text())
    digests = [[e["weights_digest"] for e in s] for s in (first, again)]
    assert digests[0] == digests[1]


def test_runs_are_not_kept_beside_those_of_other_data(tmp_path):
    text = tmp_path / "book.txt"
    settings = TextSettings(text=(text,), model_size="pico", sequence=16, batch=2, evaluation_sequences=1)
    text.write_bytes(b"In the beginning. " * 8_000)
    check_data(tmp_path, settings, settings.make())
    check_data(tmp_path, settings, settings.make())
    # Other settings are other runs.
    check_data(
        tmp_path, dataclasses.replace(settings, batch=4), dataclasses.replace(settings, batch=4).make()
    )
    text.write_bytes(b"In the beginning, " * 8_000)
    with pytest.raises(
        UsageError, match=r"has changed since runs were kept in .*: data_digest \(\w+ then, \w+ now\)"
    ):
        check_data(tmp_path, settings, settings.make())
    text.write_bytes(b"In the beginning. " * 8_000)
    check_data(tmp_path, settings, settings.make())


def test_an_unfinished_comparison_is_summarized_as_far_as_it_went(finished, tmp_path):
    out = tmp_path / "part"
    shutil.copytree(finished[0], out)
    for path in out.glob("runs/local_muon*"):
        shutil.rmtree(path)
    broken = run_folder(out, "adamw", 0.004, 1) / "result.json"
    broken.write_text(broken.read_text()[:40])
    entries = summarize(comparison(out))
    assert [(e["recipe"], e["seed"]) for e in entries] == [
        ("adamw", 0),
        ("distro(k=4)", 0),
        ("distro(k=4)", 1),
    ]


def test_presets_fill_in_what_is_not_given():
    quick = CompareConfig(steps=7).resolve()
    assert quick.steps == 7
    assert quick.recipes == ("adamw", "muon", "distro", "one_bit_muon")
    assert quick.replicas == 4
    assert Path("runs/compare") == quick.out
    frontier = CompareConfig(preset="frontier").resolve()
    assert [frontier.seeds_of(r) for r in ("muon", "sgd")] == [(0, 1, 2), (0,)]
    assert {r.partition("(")[0] for r in frontier.recipes} == set(RECIPE_NAMES) - {
        "muonfast",
        "gda2",
        "sgd_weight_polar",
    }
    # The preset's finalists belong to its own recipes.
    assert CompareConfig(preset="frontier", recipes=("sgd",)).resolve().seeds_of("sgd") == (0, 1, 2)


def quick(**changes):
    return CompareConfig(preset="quick", **changes).resolve()


def test_a_model_of_ones_own_is_compared():
    given = {"model": "smollm2", "lora": 4, "dtype": "bfloat16", "dataset": "books", "column": "story"}
    config = CompareConfig(**given, task="text(lora_dropout=0.1)").resolve()
    assert config.task == dataclasses.replace(PRESETS["quick"].task, **given, lora_dropout=0.1)
    # Nobody has searched its rates.
    assert not config.known_rates
    # The size of the preset's own model says nothing of it.
    assert CompareConfig(preset="frontier", model="smollm2").resolve().task.model_size == "nano"
    with pytest.raises(UsageError, match="leave one of them out"):
        CompareConfig(model="smollm2", model_size="pico")
    with pytest.raises(UsageError, match="model, lora belong to --task text, but the task is vision"):
        CompareConfig(task="vision", model="smollm2", lora=4)


def test_the_rates_that_quick_knows_are_the_best_that_both_processor_classes_agree_on():
    kept = Path(__file__).parents[2] / "evidence" / "demo"
    preset = PRESETS["quick"]
    assert quick().known_rates
    for recipe in quick().recipes:
        ends = []
        for path in (kept / "search_amx.parquet", kept / "search_avx2.parquet"):
            chosen = pl.read_parquet(path).filter(pl.col("step") == preset.steps, pl.col("recipe") == recipe)
            ends.append(dict(chosen.select("lr", "eval_loss").iter_rows()))
        assert all(sorted(losses) == sorted(preset.lr_grid) for losses in ends)
        apart = [lr for lr in preset.lr_grid if abs(ends[0][lr] - ends[1][lr]) > 0.1]
        alike = [lr for lr in preset.lr_grid if lr < min(apart, default=math.inf)]
        losses = {lr: ends[0][lr] + ends[1][lr] for lr in alike}
        best = min(alike, key=losses.__getitem__)
        at = alike.index(best)
        neighbours = alike[max(at - 1, 0) : at] + alike[at + 1 : at + 2]
        assert quick().rates_of(recipe) == (best, min(neighbours, key=losses.__getitem__))


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_grid": (0.001, 0.003, 0.01, 0.03)},
        {"steps": 200},
        {"batch": 8},
        {"task": "vision"},
        {"text": (Path("book.txt"),)},
        {"own_text": True},
        {"replicas": 2},
        {"seeds": (1,)},
        {"tune_steps": 20},
        {"recipes": ("muon", "sgd")},
        {"recipes": ("muon(momentum=0.9)",)},
    ],
    ids=str,
)
def test_known_rates_hold_for_the_settings_that_were_searched_only(changes):
    changed = quick(**changes)
    assert changed.known_rates == {}
    assert all(changed.rates_of(recipe) == changed.lr_grid for recipe in changed.recipes)


def test_what_decides_no_rate_keeps_the_known_ones():
    kept = quick(recipes=("muon", "distro"), seeds=(0, 1), link="1mbit/9ms", virtual=True, steps=100)
    assert kept.known_rates == {r: PRESETS["quick"].known_rates[r] for r in ("muon", "distro")}
    assert pending(kept)[:2] == [Run("muon", lr, 0) for lr in kept.known_rates["muon"]]


def test_a_rate_is_at_the_edge_where_those_beyond_it_are_unknown():
    searched = quick(lr_grid=(0.001, 0.003, 0.01, 0.03))
    assert [searched.at_edge("distro", lr) for lr in searched.lr_grid] == [True, False, False, True]
    # Beyond the best one of the search lie rates that were worse; of the other one that is not known here.
    best, other = quick().rates_of("distro")
    assert [quick().at_edge("distro", lr) for lr in (best, other)] == [False, True]
    edge = max(searched.lr_grid)
    known = dataclasses.replace(quick(), known_rates={"muon": (edge, other)})
    assert known.at_edge("muon", edge)


def test_images_are_compared_like_text(tmp_path):
    settings = CompareConfig(
        task="vision",
        vision_model="vit_pico",
        recipes=("muon", "one_bit_muon(interval=1)"),
        batch=8,
        replicas=1,
        steps=3,
        lr_grid=(0.01,),
        seeds=(0,),
        out=tmp_path,
    )
    summary = compare_here(settings, command="muonwire compare --task vision")
    assert [entry["recipe"] for entry in summary] == ["muon", "one_bit_muon(interval=1)"]
    assert all(0 < entry["final_eval_loss"] < 5 for entry in summary)
    config = json.loads(next(tmp_path.glob("runs/muon/*/config.json")).read_text())
    assert config["task"] == {"data": None, "model": "vit_pico", "batch": 8, "evaluation_images": 1000}
    page = (tmp_path / "report.html").read_text()
    assert "classification of images into 10 classes" in page
    assert "8 images per step" in page


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"preset": "huge"}, "allowed are quick, full"),
        ({"seeds": ()}, "at least one"),
        ({"finalists": ("sgd",)}, "finalists sgd are not among the recipes"),
        ({"tune_steps": 0}, "between 1 and steps"),
        ({"jobs": 0}, "at least 1"),
        ({"lr_grid": (0.1, 0.1)}, "each once"),
        ({"link": "slow"}, "does not parse"),
        ({"recipes": ("muon", "nonsense")}, "is unknown"),
    ],
)
def test_bad_comparisons_say_what_is_allowed(options, says):
    with pytest.raises(UsageError, match=says):
        CompareConfig(**options).resolve()
