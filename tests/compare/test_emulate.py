"""`muonwire compare --emulate` and `--peers`, with two replicas on hosts of their own, end to end."""

import json
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import polars as pl
import pytest
from torch import nn

from muonwire.compare import CompareConfig
from muonwire.compare import compare as compare_here
from muonwire.compare.emulate import emulate, emulated_folder, emulated_runs, read_emulated
from muonwire.compare.hosts import _LOCKS, lacking, namespaces_allowed
from muonwire.compare.links import link_curves, stops_of, target_of
from muonwire.compare.measured import MEASURED
from muonwire.compare.peers import PEERS, find_peer
from muonwire.compare.peers.base import ring_rounds
from muonwire.compare.peers.torchft_diloco import cut
from muonwire.compare.runs import Run, pending, run_folder
from muonwire.compare.summary import curves, summarize
from muonwire.errors import UsageError
from muonwire.train.metrics import read_lines, read_metrics
from muonwire.transport import Link
from tests.commands import Command, run

needs_namespaces = pytest.mark.skipif(not namespaces_allowed(), reason=f"hosts need namespaces: {lacking()}")

# Half a dozen launches of two replicas take minutes where the machine is busy.
pytestmark = pytest.mark.timeout(600)
RECIPES = ("adamw", "local_muon(interval=2)")
PEERS_RUN = ("ddp_adamw", "torchft_diloco(interval=4, fragments=2, delay=1)")
LINK = "20mbit:40mbit/5ms"
STEPS, EVERY = 8, 4


def settings(out, **changes):
    values = {
        "recipes": RECIPES,
        "peers": PEERS_RUN,
        "lr_grid": (0.004,),
        "seeds": (0,),
        "steps": STEPS,
        "replicas": 2,
        "model_size": "pico",
        "sequence": 16,
        "batch": 2,
        "evaluate_every": EVERY,
        "threads": 1,
        "emulate": (LINK,),
        "out": out,
    }
    return CompareConfig(**{**values, **changes})


def words(out, *more):
    recipes = ["--recipes", *RECIPES, "--peers", *PEERS_RUN, "--lr-grid", "0.004", "--seeds", "0"]
    run = [
        "--steps",
        str(STEPS),
        "--replicas",
        "2",
        "--model-size",
        "pico",
        "--sequence",
        "16",
        "--batch",
        "2",
    ]
    rest = ["--evaluate-every", str(EVERY), "--threads", "1", "--emulate", LINK, "--out", str(out)]
    return ["compare", *recipes, *run, *rest, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("emulate")
    done = run(words(out), timeout=560)
    assert done.returncode == 0, done.stderr
    return out, done


@needs_namespaces
def test_every_run_is_measured_on_the_link(finished):
    out, done = finished
    summary = json.loads((out / "summary.json").read_text())
    assert [entry["recipe"] for entry in summary] == [*RECIPES, *PEERS_RUN]
    for entry in summary:
        found = entry["links"][LINK]
        assert found["emulated"]
        # A link changes times only.
        assert found["same_losses"], entry["recipe"]
        assert found["measured_s_in_all"] > 0
        # What was sent cannot have taken less than the link's rate allows, but for what the bucket lets through.
        bits = 8 * found["kernel_egress_bytes_per_step"] * found["steps_in_all"]
        assert found["measured_s_in_all"] >= 0.9 * bits / 20e6
    dense, ddp = summary[0], summary[2]
    assert f"{LINK}: adamw lr=0.004 seed=0: {STEPS} steps in" in done.stdout
    assert dense["links"][LINK]["steps_to_target"] <= STEPS
    # torch's own AdamW in DDP is the recipe, up to the order of sums.
    assert ddp["final_eval_loss"] == pytest.approx(dense["final_eval_loss"], rel=2e-4)
    assert ddp["bytes_egress_per_step"] == pytest.approx(dense["bytes_egress_per_step"], rel=0.02)


@needs_namespaces
def test_the_kernel_and_the_meter_agree(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    dense, local, *peers = (entry["links"][LINK] for entry in summary)
    assert dense["kernel_over_meter"] == pytest.approx(1, abs=0.02)
    assert local["kernel_over_meter"] == pytest.approx(1, abs=0.02)
    assert all(found["kernel_over_meter"] is None for found in peers)


@needs_namespaces
def test_the_time_is_that_of_the_slowest_replica_between_evaluations(finished):
    config = settings(finished[0]).resolve()
    run = Run("adamw", 0.004, 0)
    lines = read_lines(emulated_folder(config, run, LINK) / MEASURED)
    assert [line["step"] for line in lines] == [0, EVERY, STEPS]
    before, total = [0.0, 0.0], 0.0
    for line in lines:
        now = [replica["training_s"] for replica in line["replicas"]]
        total += max(later - earlier for later, earlier in zip(now, before, strict=True))
        assert line["measured_s"] == pytest.approx(total)
        before = now
    last = read_metrics(emulated_folder(config, run, LINK))[-1]
    assert before[0] == pytest.approx(last["compute_s"] + last["optimizer_s"] + last["exchange_s"])


@needs_namespaces
def test_the_modelled_time_is_that_of_the_same_link(finished):
    config = settings(finished[0]).resolve()
    frame = pl.read_parquet(finished[0] / "links.parquet")
    row = frame.filter(pl.col("recipe") == "adamw").sort("step").row(-1, named=True)
    record = read_emulated(config, Run("adamw", 0.004, 0), LINK, stop_after=STEPS)
    link_s = Link.parse(LINK).seconds(
        egress_bytes=record["bytes_egress_per_step"],
        received_bytes=record["bytes_received_per_step"],
        num_messages=record["messages_per_step"],
    )
    step_s = record["compute_s_per_step"] + record["optimizer_s_per_step"] + link_s
    assert row["modelled_s"] == pytest.approx(STEPS * step_s)


@needs_namespaces
def test_the_page_shows_both_times(finished):
    out, done = finished
    page = (out / "report.html").read_text()
    assert "Emulated links" in page
    assert f"Loss by time at {LINK} (measured)" in page
    assert f"Time to the target at {LINK}, fastest first" in page
    assert "against measured" in page
    assert "The losses on the emulated links are those without one, to the last bit." in page
    assert (out / "loss_at_20mbit-40mbit_5ms.png").read_bytes().startswith(b"\x89PNG")
    assert "s measured" in done.stdout


@needs_namespaces
def test_finished_runs_are_kept_and_a_lost_one_is_done_again(finished, tmp_path, monkeypatch):
    out = tmp_path / "again"
    shutil.copytree(finished[0], out)
    config = settings(out).resolve()
    assert pending(config) == []
    stops = stops_of(target_of(config, summarize(config), curves(config)))
    done: list[Run] = []
    monkeypatch.setattr("muonwire.compare.emulate.on_hosts", lambda _, args, *__, **___: done.extend(args[2]))
    emulate(config, stops)
    assert done == []
    (lost, stop), *_, (longer, later) = emulated_runs(config, stops)
    (emulated_folder(config, lost, LINK) / "emulated.json").unlink()
    emulate(config, stops)
    assert done == [(lost, stop)]
    # Others than those that were asked for are left as they are.
    done.clear()
    emulate(replace(config, emulate_recipes=(longer.recipe,)), stops)
    assert longer.recipe != lost.recipe
    assert done == []
    # One that ended earlier than it is needed now is not what is asked for.
    assert read_emulated(config, longer, LINK, stop_after=later)
    assert read_emulated(config, longer, LINK, stop_after=STEPS + 1) is None


@needs_namespaces
def test_a_comparison_that_is_told_to_stop_leaves_no_hosts(finished, tmp_path):
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    link = "2mbit/5ms"
    command = [*words(tmp_path), "--emulate", link]
    running = Command(command)
    folder = emulated_folder(settings(tmp_path).resolve(), Run("adamw", 0.004, 0), link)
    deadline = time.monotonic() + 120
    while not read_metrics(folder)[1:]:
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()
        time.sleep(0.2)
    (group,) = [p.stem for p in _LOCKS.glob("mw*.lock") if p.read_text().strip() == str(running.pid)]
    assert group in namespaces()
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=120)
    assert running.returncode != 0
    assert "the same command goes on" in errors
    assert group not in namespaces()
    assert not (_LOCKS / f"{group}.lock").exists()


def namespaces():
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@needs_namespaces
def test_where_namespaces_are_not_allowed_it_says_so_and_models(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "modelled"
    shutil.copytree(finished[0] / "runs", out / "runs")
    monkeypatch.setattr(
        "muonwire.compare.comparison.lacking", lambda: "only root may make network namespaces"
    )
    with pytest.raises(UsageError, match=r"cannot be made here: only root .*leave out --peers"):
        compare_here(settings(out), command="muonwire compare")
    summary = compare_here(settings(out, peers=()), command="muonwire compare")
    assert (
        f"warning: the links cannot be emulated here: only root may make network namespaces; times at {LINK} are modelled"
        in (capsys.readouterr().err)
    )
    found = summary[0]["links"][LINK]
    assert found["emulated"] is False
    assert found["measured_s_to_target"] is None
    assert found["modelled_s_to_target"] > 0
    assert not (out / "emulated").exists()
    page = (out / "report.html").read_text()
    assert f"Loss by time at {LINK} (modelled)" in page
    assert f"Times at {LINK} are modelled: only root may make network namespaces." in page
    frame = link_curves(settings(out, peers=()).resolve(), None)
    assert frame["measured_s"].null_count() == frame.height


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"virtual": True}, "--virtual makes the replicas threads"),
        ({"replicas": 1}, "needs replicas that talk"),
        ({"emulate": ("fast",)}, "does not parse"),
        ({"emulate": ("10mbit", "10mbit/0ms")}, "each link once"),
        ({"emulate_recipes": ("sgd",)}, "emulate_recipes sgd are not among the recipes, adamw"),
        ({"emulate": (), "emulate_recipes": ("adamw",)}, "emulate_recipes is given without emulate"),
        ({"peers": ("ddp_sgd",)}, "peer: 'ddp_sgd' is unknown; allowed are ddp_adamw"),
        ({"peers": ("ddp_adamw(hok=1)",)}, "hok is not an option; allowed are hook, rank"),
        ({"peers": ("ddp_adamw(hook='zip')",)}, "allowed are none, bf16, powersgd"),
        ({"peers": ("torchft_diloco(interval=5)",)}, "8 steps are no multiple of the interval, 5"),
        ({"peers": ("torchft_diloco(interval=4, fragments=3)",)}, "fragments divides interval"),
        ({"peers": ("torchft_diloco(interval=4, delay=4)",)}, "below interval / fragments, 4"),
        ({"peers": ("ddp_adamw", "ddp_adamw")}, "each once"),
    ],
    ids=str,
)
def test_what_cannot_be_emulated_is_refused(tmp_path, changes, says):
    with pytest.raises(UsageError, match=says):
        settings(tmp_path, **changes).resolve()


def test_the_first_link_is_modelled_beside_the_machine_s_own_times(tmp_path):
    assert settings(tmp_path).resolve().link == LINK
    assert settings(tmp_path, link="1mbit/9ms").resolve().link == "1mbit/9ms"
    plain = CompareConfig().resolve()
    assert (plain.link, plain.emulate, plain.peers) == ("10mbit/50ms", (), ())


def test_peers_have_the_whole_grid_and_options_of_their_own():
    quick = CompareConfig(peers=("ddp_muon(hook='bf16')",)).resolve()
    assert quick.known_rates == {}
    assert quick.options_of("ddp_muon(hook='bf16')") == {"hook": "bf16"}
    assert quick.recipes[-1] == "ddp_muon(hook='bf16')"
    for name in PEERS:
        assert find_peer(name).rounds_per_step(4) > 0
    assert find_peer("ddp_adamw").rounds_per_step(4) == ring_rounds(4) == 6


def test_a_peer_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"torchft is not installed; pip install 'muonwire\[elastic\]'"):
        settings(tmp_path).resolve()


def test_fragments_cover_the_model_once_and_are_about_as_large():
    layers = [nn.Linear(8, 8, bias=i % 2 == 0) for i in range(6)]
    # As a head that shares the embedding's weights.
    layers[5].weight = layers[0].weight
    model = nn.Sequential(*layers)
    total = sum(p.numel() for p in model.parameters())
    for count in (1, 2, 3):
        parts = cut(model, count)
        found = [p for part in parts for p in part.parameters()]
        assert len({id(p) for p in found}) == len(found)
        assert sum(p.numel() for p in found) == total
        assert len(parts) == count
        assert max(sum(p.numel() for p in part.parameters()) for part in parts) < 2 * total / count
    with pytest.raises(UsageError, match="fragments; use fewer"):
        cut(model, 1000)


def test_the_folders_of_links_are_apart(tmp_path):
    config = settings(tmp_path).resolve()
    run = Run("adamw", 0.004, 0)
    folders = {
        emulated_folder(config, run, link) for link in ("10mbit/0ms", "10mbit:1mbit/0ms", "10mbit/1ms")
    }
    assert len(folders) == 3
    assert run_folder(tmp_path, *run) not in folders
