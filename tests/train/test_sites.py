"""Runs whose replicas act as sites: bytes, checkpoints, and what a replica gets from the others of its site."""

import json
import os
import shutil
import signal

import pytest

from muonwire.cli.main import main
from muonwire.compare import CompareConfig, compare
from muonwire.errors import UsageError
from muonwire.train import checkpoint
from muonwire.train.metrics import read_metrics
from tests.commands import Command
from tests.commands import run as run_command
from tests.train.test_folders import TINY, folder_of, losses, run, steps_in
from tests.train.test_replicated import command, replicas_of, wait_for_step

RECIPES = (
    "one_bit_muon(interval=4)",
    "one_bit_muon(interval=4, fragments=2, delay=3)",
    "ef14_muon(means='recompressed')",
)


@pytest.fixture(scope="module")
def task():
    return TINY.make()


@pytest.fixture(scope="module", params=RECIPES)
def undisturbed(request, task, tmp_path_factory):
    base = tmp_path_factory.mktemp("undisturbed")
    _, result = run(task, base, replicas=4, sites=2, recipe=request.param)
    return request.param, base, result


def test_bytes_are_those_between_sites_and_those_inside_stand_beside_them(undisturbed, task, tmp_path):
    recipe, base, result = undisturbed
    _, plain = run(task, tmp_path, replicas=2, recipe=recipe)
    assert (result.replicas, result.sites, plain.sites) == (4, 2, None)
    for name in ("sent", "egress", "received"):
        counted = (getattr(r, f"bytes_{name}_per_step") for r in (result, plain))
        # Positions and scales of other gradients have other lengths.
        assert next(counted) == pytest.approx(next(counted), rel=0.05)
    if recipe.startswith("one_bit_muon"):
        assert result.messages_per_step == plain.messages_per_step
    # Every step: the gradients of half of the parameters to the other replica, and their mean.
    assert result.bytes_inside_per_step > 4 * result.num_parameters
    assert plain.bytes_inside_per_step == 0
    last = read_metrics(folder_of(base, 0))[-1]
    assert last["inside_bytes"] == pytest.approx(result.bytes_inside_per_step * result.steps)
    assert json.loads((folder_of(base, 0) / "result.json").read_text())["sites"] == 2


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(undisturbed, task, tmp_path, shared):
    recipe, base, whole = undisturbed
    run(task, tmp_path, replicas=4, sites=2, recipe=recipe, shared=shared, until=7)
    assert steps_in(folder_of(tmp_path, 3, shared=shared)) == [4, 6]
    _, result = run(task, tmp_path, replicas=4, sites=2, recipe=recipe, shared=shared, resume=True)
    assert result.weights_digest == whole.weights_digest
    assert losses(folder_of(tmp_path, 0, shared=shared)) == losses(folder_of(base, 0))


def test_a_replica_without_its_part_gets_that_of_its_site_and_nothing_is_lost(undisturbed, task, tmp_path):
    recipe, _, whole = undisturbed
    run(task, tmp_path, replicas=4, sites=2, recipe=recipe, until=7)
    shutil.rmtree(folder_of(tmp_path, 3))
    trainer, result = run(task, tmp_path, replicas=4, sites=2, recipe=recipe, resume=True)
    # The model has no dropout, whose random state would be another.
    assert result.weights_digest == whole.weights_digest
    (note,) = trainer.notes
    assert note.startswith("replica 3 has no whole part of step 6 in ")
    assert note.endswith("weights and state come from replica 2 of its site; lost are its random state")


def test_a_site_without_any_part_begins_anew_with_its_own_and_stays_one(undisturbed, task, tmp_path):
    recipe, _, _ = undisturbed
    run(task, tmp_path, replicas=4, sites=2, recipe=recipe, until=7)
    for rank in (2, 3):
        shutil.rmtree(folder_of(tmp_path, rank))
    trainer, result = run(task, tmp_path, replicas=4, sites=2, recipe=recipe, resume=True)
    assert result.finished
    assert [note.split(" has no ")[0] for note in trainer.notes] == ["replica 2", "replica 3"]
    assert all("begin at zero" in note for note in trainer.notes)


def test_a_run_goes_on_with_as_many_sites_only(undisturbed, task, tmp_path):
    recipe, _, _ = undisturbed
    run(task, tmp_path, replicas=4, sites=2, recipe=recipe, until=4)
    for sites in (None, 4):
        with pytest.raises(UsageError, match=rf"config.sites was 2, now {sites}"):
            run(task, tmp_path, replicas=4, sites=sites, recipe=recipe, resume=True)


SITES = ("--sites", "2")


@pytest.mark.slow
def test_a_killed_replica_ends_the_run_by_name_and_resume_reaches_the_same_weights(tmp_path):
    recipe = RECIPES[1]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run_command(command(whole, *SITES, recipe=recipe, replicas=4))
    assert done.returncode == 0, done.stderr
    assert "2 sites of 2 replicas, their gradients averaged at every step" in done.stdout
    assert "bit per parameter and step between 2 sites and " in done.stdout
    process = Command(command(cut, *SITES, recipe=recipe, replicas=4))
    wait_for_step(cut, 13)
    os.kill(replicas_of(process)[3], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: replica 3 of 4" in stderr
    assert "was ended by SIGKILL" in stderr
    assert checkpoint.latest(cut) is not None
    done = run_command(command(cut, *SITES, "--resume", recipe=recipe, replicas=4))
    assert done.returncode == 0, done.stderr
    results = [json.loads((out / "result.json").read_text()) for out in (whole, cut)]
    assert results[0]["weights_digest"] == results[1]["weights_digest"]
    # What was in flight when it was killed is sent again.
    assert results[0]["bytes_sent_per_step"] == pytest.approx(results[1]["bytes_sent_per_step"], rel=0.2)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--replicas", "4", "--sites", "3"), "4 replica(s) in 3 site(s)"),
        (("--sites", "2"), "1 replica(s) in 2 site(s)"),
        (("--replicas", "4", "--sites", "1"), "sites is 1; give at least 2"),
        (("--sites", "2", "--elastic", "--lighthouse", "a:1"), "leave out --elastic, or --sites"),
    ],
)
def test_what_makes_no_sites_is_one_error(args, text, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *args, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert text in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def compared(out, **options):
    config = CompareConfig(
        recipes=("one_bit_muon(interval=2)",),
        lr_grid=(0.004,),
        seeds=(0,),
        steps=6,
        sequence=16,
        batch=2,
        evaluate_every=3,
        threads=1,
        virtual=True,
        jobs=1,
        out=out,
        **options,
    )
    (summary,) = compare(config, command="")
    return summary


def test_a_comparison_counts_what_crosses_between_sites(tmp_path):
    sites = compared(tmp_path / "sites", replicas=4, sites=2)
    plain = compared(tmp_path / "plain", replicas=2)
    assert (sites["replicas"], plain["replicas"]) == (4, 2)
    for key in ("bytes_egress_per_step", "bytes_received_per_step", "messages_per_step"):
        assert sites[key] == plain[key]
    assert sites["final_eval_loss"] != plain["final_eval_loss"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sites": 3, "replicas": 4}, r"4 replica\(s\) in 3 site\(s\)"),
        (
            {"sites": 2, "replicas": 4, "virtual": False, "peers": ("ddp_adamw",)},
            "--sites cannot go with --emulate or --peers",
        ),
        (
            {"sites": 2, "replicas": 4, "virtual": False, "emulate": ("1mbit",)},
            "--sites cannot go with --emulate or --peers",
        ),
    ],
)
def test_what_a_comparison_of_sites_cannot_do_is_refused(options, text):
    with pytest.raises(UsageError, match=text):
        CompareConfig(**options).resolve()
