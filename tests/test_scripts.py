"""Every script of benchmarks/ runs, at the smallest sizes it takes."""

import importlib.util
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from io import StringIO
from itertools import product
from pathlib import Path

import pytest
import torch
from benchmarks import lab_long, lab_long_vision, plan_check, screen_sixteen
from benchmarks.soak import judge
from safetensors.torch import load_file

from muonwire import recipes
from muonwire.compare.hosts import lacking
from muonwire.lab.claims import vision
from muonwire.lab.engine.catalog import load_claims
from muonwire.lab.inputs import vision_training
from muonwire.transport.message import Refusal
from tests.commands import ForkingPopen
from tests.models import SmallNet
from tests.small_lm import write_model
from tests.spectra.conftest import write_gguf

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.name for path in (ROOT / "benchmarks").glob("*.py")}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script in this process with arguments, and returns what it prints; commands of ours that it starts are forked."""
    monkeypatch.setattr(subprocess, "Popen", ForkingPopen)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_script_is_run_here_and_says_which_command_runs_it():
    tests = Path(__file__).read_text()
    for script in SCRIPTS:
        # tests/transport/test_links.py tries links in small, and tests/compare/test_emulate.py comparisons on links.
        assert f'run("{script}"' in tests or script in ("links.py", "race.py")
        module = f"benchmarks.{script.removesuffix('.py')}"
        text = (ROOT / "benchmarks" / script).read_text()
        assert f"benchmarks/{script}" in text or f"-m {module}" in text


def test_a_mean_comes_before_the_update_or_after_it(run):
    run("apart.py")
    for hidden_after in (False, True):
        options = {"hidden_after": hidden_after, "rest_after": not hidden_after}
        optimizer = recipes.build("benchmarks.apart.apart", SmallNet(), lr=0.01, **options)
        hidden, *rest = [str(group["chain"]) for group in optimizer.param_groups]
        assert hidden.startswith("momentum") == hidden.endswith("mean") == hidden_after
        for other in rest:
            assert other.startswith("adam") == other.endswith("mean") == (not hidden_after)


def test_momenta_are_captured(run, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "momentum.safetensors"
    sizes = ("--steps", 1, "--batches", 1, "--model-size", "pico", "--smollm2", tmp_path / "tiny.gguf")
    run("capture_momentum.py", out, *sizes)
    committed = load_file(ROOT / "benchmarks" / "data" / "momentum.safetensors")
    captured = load_file(out)
    assert set(captured) == set(committed)
    assert all(float(x.abs().max()) > 0 for x in captured.values())


def test_updates_are_captured(run, tmp_path):
    out = tmp_path / "updates.safetensors"
    run("capture_updates.py", out, "--steps", 1, "--batch", 1)
    committed = load_file(ROOT / "benchmarks" / "data" / "updates.safetensors")
    assert {n: x.shape for n, x in load_file(out).items()} == {n: x.shape for n, x in committed.items()}


def test_ways_of_one_factorization_are_compared(run):
    out = run("compare_halley.py", "--shapes", "8x24", "--seconds", 0)
    assert [line.split(":")[0] for line in out.splitlines()] == ["8x24 gaussian", "8x24 1/k"]


def test_the_pictures_are_those_of_the_document(run, tmp_path):
    run("draw_polar.py", tmp_path)
    shown = re.findall(r"\(images/(.*\.svg)\)", (ROOT / "docs" / "polar.md").read_text())
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == sorted(shown)


def test_the_evidence_of_the_lab_is_kept_as_it_is_committed(run, tmp_path):
    shutil.copytree(ROOT / "evidence" / "lab", tmp_path / "lab")
    shutil.copytree(ROOT / "docs" / "images" / "lab", tmp_path / "lab" / "images")
    run("lab_evidence.py", tmp_path / "lab", "--root", tmp_path)
    kept, committed = (root / "evidence" / "lab" for root in (tmp_path, ROOT))
    assert json.loads((kept / "verdicts.json").read_text()) == json.loads(
        (committed / "verdicts.json").read_text()
    )
    assert [p.relative_to(kept) for p in sorted(kept.glob("claims/*/*"))] == [
        p.relative_to(committed) for p in sorted(committed.glob("claims/*/*"))
    ]


def test_crossings_between_device_and_host_are_counted(run, tmp_path):
    out = tmp_path / "crossings.json"
    few = ("--codecs", "sign(scale=row)", "--recipes", "adamw")
    run("host_crossings.py", "--out", out, "--label", "one", *few)
    run("host_crossings.py", "--out", out, "--label", "other", *few)
    found = json.loads(out.read_text())
    assert found["one"] == found["other"]
    assert found["one"]["codecs"]["sign(scale=row)"]["waits"] == 1
    committed = json.loads((ROOT / "evidence" / "host_crossings.json").read_text())["after"]
    assert found["one"]["codecs"].items() <= committed["codecs"].items()
    assert "to the host: " in run("standin.py")


def test_the_checks_for_a_gpu_run_on_the_cpu(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit) as ended:
        run("gpu.py", "--device", "cpu", "--quick", "--out", out)
    assert ended.value.code == 0
    found = json.loads(out.read_text())
    assert found["passed"] == found["checks"] == len(found["codecs"]) + len(found["recipes"]) + 1
    assert all(e["same_bytes"] for e in found["codecs"].values())
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    generate.GPU = out
    assert generate.gpu_state().startswith(f"Run on cpu, torch {torch.__version__}: ")
    # As gpu.py writes it of a check that cannot be made.
    found["codecs"]["float32"] = {"holds": False, "error": "RuntimeError: no kernel"}
    out.write_text(json.dumps(found))
    assert "\n`float32` fails: RuntimeError: no kernel\n" in generate.gpu_state()
    generate.GPU = tmp_path / "none.json"
    assert "Nobody has run the checks" in generate.gpu_state()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run("gpu.py", "--out", tmp_path / "none.json")
    assert ended.value.code == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_packers_are_measured(run):
    head, _, row = run("measure_packers.py", "--cases", 1).splitlines()
    assert head == "| groups × items, k | ans | rice | bitmap | ranks | bits |"
    assert row.startswith("| 1 × 64, 3 | 1.0426 ")


def test_the_time_of_the_cosine_codec_is_split(run):
    assert "encode: selection" in run("profile_dct_codec.py", "--rounds", 1)


def test_local_steps_are_screened(run, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    out = run("screen_local_steps.py", "--steps", 2, "--only", "H5-signs", "--replicas", 2, "--batch", 1)
    assert out.startswith("H5-signs ")
    assert " bit (" in out


def test_sixteen_replicas_are_screened_from_a_plan(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    plan, record = tmp_path / "plan.txt", tmp_path / "record.jsonl"
    small = "replicas=2 batch=1 steps=4 until=2"
    plan.write_text(
        f"interval=1 fragments=2 lengthen=0.5 share_momentum=sign {small}  # both\n\n"
        f"interval=2 parts=2 lengthen=0.5 by=direction rebuild=0.5 ahead=0.5 {small}\n"
        f"interval=2 parts=2 control=factor table=row {small}\n"
        f"interval=2 parts=2 bits=tail share=0.25 surprise=0.5 rotate=1 level=0.5 lengthen=1 {small}\n"
        f"interval=1 bits=exact {small}\n"
        f"interval=1 bits=exact rotate=1 {small}\n"
    )
    run("screen_sixteen.py", "--plan", plan, "--out", record)
    shared, parts, controlled, tail, plain, rotated = map(json.loads, record.read_text().splitlines())
    # The changes, and the momentum of matrices; half of the changes in one of two steps.
    assert 1.8 < shared["bits_sent"] < 2
    assert parts["bits_sent"] == pytest.approx(0.25, rel=0.02)
    # Of the embedding, 256 × 64 of 123,200, the other half of the signs and a scale a row; a sign of each entry of all matrices.
    more = (256 * 64 / 2 + 256 * 16 + (123_200 - 256 * 64)) / 2 / 123_200
    assert controlled["bits_sent"] - parts["bits_sent"] == pytest.approx(more, rel=0.01)
    # A quarter of the entries of the matrices, their signs and their places; half of the embedding's, every two steps.
    share = 0.25 + 0.25 * 2 + 0.75 * math.log2(4 / 3)
    assert tail["bits_sent"] == pytest.approx(
        (share * (123_200 - 256 * 64) + 256 * 64 / 2) / 2 / 123_200, rel=0.01
    )
    # Below that of equal chances for 256 bytes, after two steps.
    assert all(3 < one["loss"] < 5.5 for one in (shared, parts, controlled, tail))
    # In which bases exact numbers are sent is all the same; replicas that differ by their data alone have changes in common.
    assert rotated["loss"] == pytest.approx(plain["loss"], abs=0.002)
    assert 0 < plain["cosine"] < 1
    # All of them are in the record.
    assert run("screen_sixteen.py", "--plan", plan, "--out", record) == ""


def test_the_cosine_of_replicas_is_that_of_their_pairs():
    changes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    # One pair of three is alike, and the other two are at right angles.
    assert screen_sixteen.cosine(changes) == pytest.approx(1 / 3)
    assert screen_sixteen.cosine(torch.tensor([[2.0], [-2.0]])) == pytest.approx(-1)


def test_the_labs_training_is_done_longer_and_told_beside_the_labs(run, tmp_path):
    few = ("--recipes", "muon", "distro", "approach_d", "--seeds", 2, "--rates", 1, "--steps", 2)
    folders = ("--runs", tmp_path / "runs", "--kept", tmp_path)
    out = run("lab_long.py", "--quick", "--jobs", 1, *few, *folders)
    assert "king_james distro lr=0.008 seed=1: " in out
    kept = json.loads((tmp_path / "king_james.json").read_text())
    assert len(kept["runs"]) == 6
    # A claim that needs other recipes says nothing.
    assert kept["claims"]["approach.A"]["verdict"] is None
    of_d, in_the_lab = (
        kept["claims"]["approach.D"],
        json.loads((ROOT / "evidence" / "lab" / "verdicts.json").read_text())["approach.D"],
    )
    assert of_d["verdict_in_the_lab"] == in_the_lab["verdict"]
    assert of_d["seeds"] == 2
    losses = {(r["recipe"], r["seed"]): r["loss"] for r in kept["runs"]}
    below = [losses["distro", seed] - losses["approach_d", seed] for seed in (0, 1)]
    assert of_d["checks"][0]["mean"] == pytest.approx(sum(below) / 2)
    assert [c["mean_in_the_lab"] for c in of_d["checks"]] == [c["mean"] for c in in_the_lab["checks"]]
    assert run("lab_long.py", "--quick", "--report", *few, *folders) == out.splitlines()[-1] + "\n"
    table = lab_long.table(tmp_path / "king_james.json")
    assert "3 recipes, 2 steps, 1 rate, 2 seeds.\n" in table
    assert f"| [approach.D](#approach-d) | {in_the_lab['verdict']} | **{of_d['verdict']}** |" in table


def test_the_labs_vision_is_done_longer_and_told_beside_the_labs(run, tmp_path):
    load_claims()
    modules = [vision_training, *(m for n, m in sys.modules.items() if n.startswith(vision.__name__))]

    def run_it():
        with pytest.MonkeyPatch.context() as restored:
            for module, name in product(modules, ("STEPS", "train", "tuned_rate")):
                if hasattr(module, name):
                    restored.setattr(module, name, getattr(module, name))
            return run("lab_long_vision.py", *words)

    words = ("--quick", "--claims", "vit.5", "--seeds", 2, "--runs", tmp_path / "runs", "--kept", tmp_path)
    out = run_it()
    in_the_lab = json.loads((ROOT / "evidence" / "lab" / "verdicts.json").read_text())["vit.5"]
    made = json.loads((tmp_path / "vision.json").read_text())["claims"]["vit.5"]
    assert out == f"vit.5, 2 seeds: {made['verdict']}, in the lab {in_the_lab['verdict']}\n"
    assert made["seeds"] == 2
    assert [c["mean_in_the_lab"] for c in made["checks"]] == [c["mean"] for c in in_the_lab["checks"]]
    # What is measured is kept.
    for kept in (tmp_path / "runs").rglob("vit.5-*.json"):
        kept.write_text(kept.read_text().replace('"seed": 1', '"seed": 0'))
    (tmp_path / "vision.json").write_text(json.dumps({"steps": 1500, "claims": {"vit.4": made}}))
    run_it()
    again = json.loads((tmp_path / "vision.json").read_text())["claims"]
    assert again["vit.5"]["seeds"] == 1
    assert again["vit.4"] == made
    row = f"| [vit.5](#vit-5) | {in_the_lab['verdict']} | "
    assert row in lab_long_vision.table(tmp_path / "vision.json")


@pytest.mark.parametrize(
    ("losses", "best", "asked"),
    [([9, 5, 4, 6, 9], 2, 3), ([9, 3, 4, 6, 9], 1, 3), ([1, 3, 4, 6, 9], 0, 3), ([9, 7, 6, 5, 3], 4, 4)],
)
def test_a_rate_is_sought_downhill_from_the_middle(losses, best, asked):
    seen = set()

    def loss(at):
        seen.add(at)
        return losses[at]

    assert lab_long_vision.downhill(loss, 2, count=5) == best
    assert len(seen) == asked


def test_the_spectra_of_smollm2_have_a_command(run):
    with pytest.raises(SystemExit):
        run("spectra_smollm2.py", "--help")


def test_steps_are_taken_as_asked(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", StringIO("1\n2\n"))
    state, *answers = run("step_against.py", "--worker", "adamw", "small", 1).splitlines()
    assert json.loads(state)["state_bytes"] > 0
    assert answers == ["done", "done"]


def test_an_attack_in_small_changes_no_weight_and_is_counted_kind_by_kind(run):
    out = run("attack_frames.py", "--frames", 300, "--at-once", 8, "--steps", 4, "--ways", "plain")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["recipe"] for row in rows] == ["one_bit_muon(interval=2)", "muon"]
    for row in rows:
        assert row["weights_identical"], row
        assert row["refused_is_made"], row
        assert row["frames"] > 200, row
        assert all(kinds.keys() >= {"altered", "malformed", "foreign", "forged"} for kinds in row["made"]), (
            row
        )
        assert row["named_in_the_log"] == [[kind.value for kind in Refusal]] * 2


def test_the_cost_of_a_tunnel_is_measured(run):
    out = run("measure_tunnel.py", "--rates", 10, "--ways", "secret", "--repeats", 1, "--bytes", 100_000)
    row = json.loads(out.splitlines()[-1])
    assert row["way"] == "secret"
    assert row["mbit_s"] > 0
    assert row["wireguard_s_per_gb"] == 0


# Of its parts each has tests of its own; it takes a quarter of a minute.
@pytest.mark.slow
def test_replicas_outlive_faults(run, tmp_path):
    """A soak in small: the weights agree after every synchronization, and no step is lost."""
    out = tmp_path / "soak.json"
    sizes = ("--replicas", 3, "--steps", 200, "--faults", 1, "--every-s", 0.1, "--timeout-s", 3, "--seeds")
    with pytest.raises(SystemExit) as ended:
        run("soak.py", "--seed", 2, *sizes, "--out", out)
    assert out.exists(), ended.value
    report = json.loads(out.read_text())
    assert report["problems"] == []
    assert ended.value.code == 0
    assert report["faults"] == 1
    assert report["synchronizations"] >= 40
    assert report["finished"] == 3
    assert len(report["weights"]) == 1


@pytest.mark.parametrize(
    ("late", "lost"),
    # Told late by one that was frozen; done again with other weights; a step that nobody told of before it was passed.
    [((5, "five"), 0), ((5, "other"), 1), ((7, "seven"), 1)],
)
def test_a_soak_counts_a_step_as_lost_where_its_weights_are_others(late, lost):
    told = [(0.0, 5, "five"), (1.0, 10, "ten"), (2.0, 15, "fifteen"), (4.0, *late), (4.1, 20, "twenty")]
    lines = [{"time_s": t, "step": step, "digest": d, "members": ["a", "b"]} for t, step, d in told]
    judged = judge(lines)
    assert judged["committed_steps_lost"] == lost
    assert judged["digests_that_differ"] == (late == (5, "other"))


@pytest.mark.slow
def test_fragments_and_delays_are_compared(run, tmp_path):
    out = tmp_path / "streaming.json"
    few = ["--replicas", 2, "--steps", 6, "--interval", 2, "--batch", 1, "--seeds", 0]
    run("streaming.py", "--out", out, *few, "--fragments", 1, 2, "--delays", 1, "--mixes", 0.5)
    record = json.loads(out.read_text())
    assert len({r["recipe"] for r in record["runs"]}) == len(record["runs"]) == len(record["summary"])
    assert record["summary"][0]["percent_over_baseline"] == 0
    assert {"one_bit_muon(interval=2)", "one_bit_muon(interval=2, fragments=2, delay=1, mix=0.5)"} <= {
        r["recipe"] for r in record["runs"]
    }


def test_adapters_of_a_model_are_compared(run, tmp_path, monkeypatch):
    # Drawing its charts takes longer than the runs; tests/compare does it.
    monkeypatch.setattr("muonwire.compare.comparison.write_compare_report", lambda *_, **__: None)
    evidence = tmp_path / "lora.json"
    few = (
        "--steps",
        2,
        "--replicas",
        1,
        "--rank",
        2,
        "--sequence",
        16,
        "--evaluation-sequences",
        2,
        "--text-bytes",
        9_000,
    )
    recipes = ("muon", "one_bit_muon(interval=2)")
    chosen = ("--recipes", *recipes, "--rates", 0.01, 0.02, "--seeds", 0)
    out, model = ("--out", tmp_path / "runs"), ("--model", write_model(tmp_path / "model"))
    said = run("measure_lora.py", *out, "--evidence", evidence, *model, *few, *chosen)
    record = json.loads(evidence.read_text())
    assert [(t["recipe"], t["lr"]) for t in record["tried"]] == [
        (r, lr) for r in recipes for lr in (0.01, 0.02)
    ]
    for best in record["runs"]:
        losses = {t["lr"]: t["loss"] for t in record["tried"] if t["recipe"] == best["recipe"]}
        assert best["final_eval_loss"] == losses[best["lr"]] == min(losses.values())
        assert best["num_parameters"] == 2_176
        assert f"{best['recipe']}, seed 0" in said
    assert 4 < record["before"] < 7


@pytest.mark.slow
@pytest.mark.skipif(
    bool(lacking()), reason="links are emulated between network namespaces, which are not allowed here"
)
def test_emulated_links_are_measured(run, tmp_path):
    out = tmp_path / "hosts.json"
    run("measure_hosts.py", "--links", "10mbit/20ms", "--seconds", 1, "--out", out)
    assert "10mbit/20ms" in out.read_text()


@pytest.mark.slow
@pytest.mark.skipif(
    bool(lacking()), reason="links are emulated between network namespaces, which are not allowed here"
)
def test_waiting_on_an_emulated_link_is_measured_with_streaming_and_without(run, tmp_path):
    out = tmp_path / "wait.json"
    few = (
        "--replicas",
        2,
        "--steps",
        12,
        "--skip",
        4,
        "--model-size",
        "pico",
        "--batch",
        1,
        "--link",
        "10mbit/20ms",
    )
    recipes = ("one_bit_muon(interval=2)", "one_bit_muon(interval=3, delay=2)")
    run("streaming_wait.py", "--out", out, *few, "--recipes", *recipes)
    plain, streaming = json.loads(out.read_text())["runs"]
    assert (plain["recipe"], streaming["recipe"]) == recipes
    # Every second step waits for a message and the one before it, which take 20 ms each and more.
    assert plain["exchange_s"] > 3 * 0.04
    assert (plain["overlap_s"], streaming["overlap_s"] > 0) == (0, True)
    for one in (plain, streaming):
        parts = one["compute_s"] + one["optimizer_s"] + one["exchange_s"]
        assert one["wait_share"] == pytest.approx(one["exchange_s"] / parts, abs=1e-3)
    assert run("streaming_wait.py", "--out", out, *few, "--recipes", *recipes) == ""


# Of its parts each has tests of its own; it takes a quarter of a minute.
@pytest.mark.slow
def test_means_by_owners_are_measured(run, tmp_path):
    out = tmp_path / "bytes.json"
    run("owners.py", "bytes", "--replicas", 3, "--model-size", "pico", "--synchronizations", 1, "--out", out)
    lines = json.loads(out.read_text())
    assert [line["means"] for line in lines] == ["gather", "lossless", "lossless", "recompressed"]
    assert all(0 < line["own_message_bits"] <= line["egress_bits"] for line in lines)
    runs, out = tmp_path / "runs", tmp_path / "loss.json"
    run(
        "owners.py",
        "loss",
        "--replicas",
        2,
        "--steps",
        2,
        "--seeds",
        0,
        "--runs",
        runs,
        "--out",
        out,
        "--jobs",
        1,
    )
    lines = json.loads(out.read_text())
    assert [line["options"].get("means", "gather") for line in lines] == [
        "gather",
        "lossless",
        "recompressed",
    ]
    assert all(line["final_eval_loss"] > 0 for line in lines)


@pytest.mark.slow
def test_what_is_known_of_sums_is_measured(run, tmp_path):
    out = tmp_path / "contexts.json"
    run("sum_contexts.py", "--replicas", 3, "--model-size", "pico", "--synchronizations", 2, 3, "--out", out)
    for record in json.loads(out.read_text()):
        assert 0 < record["sum, last and own"] < record["sum, last"] < record["sum"] <= 2
        # Middle, slope and concentration of each piece are sent, the tables of the entropies are not.
        assert abs(record["sum, packed"] - record["sum, last"]) < 0.05
    assert '"known": true' in run("sum_contexts.py", "--times")


def test_what_one_start_misses_all_see(run, tmp_path):
    run("starts.py", "--draws", 1000, "--out", tmp_path / "starts.json")
    rows = json.loads((tmp_path / "starts.json").read_text())
    assert max(row["one: share more than 2 % below"] for row in rows) > 0
    assert all(row["all: share more than 2 % below"] == 0 for row in rows)
    kept = json.loads((ROOT / "evidence" / "starts.json").read_text())
    assert max(row["one: the largest becomes"] for row in kept) > 1e6
    assert all(row["all: share more than 1 % below"] < 1e-3 for row in kept)


def test_the_evidence_of_plans_is_collected(run, tmp_path):
    with pytest.raises(SystemExit):
        run("plan_evidence.py", "--out", tmp_path / "evidence.json")
    committed = ROOT / "src" / "muonwire" / "plan" / "evidence.json"
    assert (tmp_path / "evidence.json").read_text() == committed.read_text()


# Of its parts each has tests of its own; it takes a quarter of a minute.
@pytest.mark.slow
def test_plans_are_held_against_runs(run, tmp_path):
    with pytest.raises(SystemExit) as ended:
        run("plan_check.py", "--small", "--only", "small_muon", "--out", tmp_path)
    record = json.loads((tmp_path / "small_muon.json").read_text())
    assert ended.value.code == (0 if record["time_holds"] and record["loss_holds"] else 1)
    assert json.loads((tmp_path / "small_muon.prediction.json").read_text()) == record["prediction"]
    # Messages of a few seconds at most besides: what is sent is what was planned.
    assert record["bytes_ratio"] == pytest.approx(1, rel=0.02)
    assert record["prediction"]["line"]["synchronizations"] == 12
    assert record["cost"] == 0


def test_memory_of_sharded_replicas_is_measured(run, tmp_path):
    sizes = ("--width", 64, "--inner", 8, "--blocks", 2, "--recipes", "muon")
    out = run("sharded_memory.py", "--out", tmp_path / "memory.json", *sizes)
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "muon, 1 process(es) a replica",
        "muon, 2 process(es) a replica",
    ]
    whole, sharded = json.loads((tmp_path / "memory.json").read_text())["runs"]
    assert whole["parameters"] == sharded["parameters"] == 2 * 2 * 64 * 8
    assert 0 < sharded["update_bytes"] - whole["update_bytes"] < 3 * 200
    evidence = json.loads((ROOT / "evidence" / "sharded_memory.json").read_text())["runs"]
    for of_whole, of_sharded in zip(evidence[::2], evidence[1::2], strict=True):
        assert of_sharded["peak_bytes"] <= 0.6 * of_whole["peak_bytes"]


def test_recipes_on_shards_are_compared(run, tmp_path):
    out = run("sharded_recipes.py", "--recipes", "distro", "--out", tmp_path / "recipes.json")
    assert out.startswith("distro: difference 0, ")
    (found,) = json.loads((tmp_path / "recipes.json").read_text())["runs"]
    assert found["difference"] == 0
    committed = json.loads((ROOT / "evidence" / "sharded_recipes.json").read_text())["runs"]
    expected = next(r["bytes"] for r in committed if r["recipe"] == "distro")
    # Positions of coefficients are rounded as the processor does it.
    assert found["bytes"] == pytest.approx(expected, rel=0.05)


def test_a_plan_is_held_against_rates_that_lie_inside_their_grid(monkeypatch, tmp_path):
    asked = []

    def compare(command, **_):
        rates = [float(rate) for rate in command[command.index("--lr-grid") + 1 :]]
        asked.append(rates)
        best = min(rates, key=lambda rate: abs(rate - 0.003))
        edge = best in (rates[0], rates[-1])
        entry = {"recipe": "muon", "lr": best, "lr_at_grid_edge": edge, "final_eval_loss": 1.0}
        (tmp_path / "summary.json").write_text(json.dumps([entry]))

    monkeypatch.setattr(plan_check.subprocess, "run", compare)
    found = plan_check.best_loss(plan_check.SETTINGS[0], "muon", ("0.007", "0.014"), tmp_path)
    assert asked == [[0.007, 0.014], [0.0035, 0.007, 0.014], [0.00175, 0.0035, 0.007, 0.014]]
    assert found == {"recipe": "muon", "lr": 0.0035, "lr_at_grid_edge": False, "final_eval_loss": 1.0} | {
        "grid": asked[-1]
    }
