"""`muonwire train` with real processes: faults, signals, torchrun."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from muonwire.train import checkpoint
from muonwire.train.metrics import read_metrics
from tests.commands import Command, children_of, run
from tests.tiny_task import TINY

SMALL = ["--sequence", "16", "--batch", "2", "--evaluation-sequences", "8", "--lr", "0.01", "--threads", "1"]
SMALL += ["--no-page", *TINY]


def command(out, *extra, recipe="local_muon(interval=4)", steps=40, replicas=2):
    return [
        *("train", "--recipe", recipe, "--steps", str(steps)),
        *(
            "--replicas",
            str(replicas),
            "--out",
            str(out),
            "--checkpoint-every",
            "10",
            "--evaluate-every",
            "20",
        ),
        *SMALL,
        *extra,
    ]


def replicas_of(process):
    """Process ids of the launcher's replicas, in rank order: forked one after the other."""
    return list(children_of(process.pid))


def wait_for_step(out, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        records = read_metrics(out)
        if records and records[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    done = run(command(out))
    assert done.returncode == 0, done.stderr
    return out, done


# Two fragments are in flight at every checkpoint.
STREAMED = "one_bit_muon(interval=4, fragments=2, delay=3)"


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    out = tmp_path_factory.mktemp("streamed")
    done = run(command(out, recipe=STREAMED))
    assert done.returncode == 0, done.stderr
    return out, done


def outcome(out):
    result = json.loads((out / "result.json").read_text())
    losses = [(r["step"], r.get("local_loss"), r.get("eval_loss")) for r in read_metrics(out)]
    return result["weights_digest"], result["final_eval_loss"], losses


def test_a_run_tells_its_groups_and_its_outcome(undisturbed):
    out, done = undisturbed
    assert "tensors orthogonalized" in done.stdout
    assert "local steps, synchronized every 4" in done.stdout
    assert "step 40: evaluation loss" in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert result["replicas"] == 2
    assert 0 < result["bits_per_parameter_step"] < 0.2


def test_a_killed_replica_ends_the_run_by_name_and_resume_reaches_the_same_weights(undisturbed, tmp_path):
    process = Command(command(tmp_path))
    wait_for_step(tmp_path, 23)
    victims = replicas_of(process)
    assert len(victims) == 2
    start_s = time.monotonic()
    os.kill(victims[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start_s < 30
    assert process.returncode == 1
    assert "replica 1 of 2" in errors
    assert "SIGKILL" in errors
    assert "Traceback" not in errors
    assert read_metrics(tmp_path)
    assert checkpoint.latest(tmp_path) is not None
    resumed = run(command(tmp_path, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(tmp_path) == outcome(undisturbed[0])


def test_with_fragments_in_flight_a_killed_run_resumes_to_the_same_weights(streamed, tmp_path):
    assert "synchronized every 4 in 2 fragments, merged 3 later" in streamed[1].stdout
    assert "% of the time" in streamed[1].stdout
    process = Command(command(tmp_path, recipe=STREAMED))
    wait_for_step(tmp_path, 23)
    start_s = time.monotonic()
    os.kill(replicas_of(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start_s < 30
    assert process.returncode == 1
    assert "SIGKILL" in errors
    assert "Traceback" not in errors
    resumed = run(command(tmp_path, "--resume", recipe=STREAMED))
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(tmp_path) == outcome(streamed[0])


def test_sigterm_leaves_a_checkpoint_from_which_the_run_goes_on_alike(undisturbed, tmp_path):
    process = Command(command(tmp_path))
    wait_for_step(tmp_path, 21)
    process.terminate()
    _, errors = process.communicate(timeout=25)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert not (tmp_path / "result.json").exists()
    stopped_at = int(checkpoint.latest(tmp_path).name.removeprefix("step_"))
    assert stopped_at >= 21
    assert f"stopped after step {stopped_at}" in errors
    resumed = run(command(tmp_path, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(tmp_path) == outcome(undisturbed[0])


@pytest.mark.parametrize(
    ("options", "changed", "says"),
    [
        ((), {"replicas": 1}, "written by 2 replicas, this run has 1"),
        (("--seed", "7"), {}, "belongs to another run: config.seed was 0, now 7"),
        ((), {"steps": 39}, "steps is 39, but 40 of the run's 40 steps are done"),
        (("--seed", "7"), {"steps": 50}, "belongs to another run: config.seed was 0, now 7"),
    ],
)
def test_a_resume_that_is_refused_changes_no_file(undisturbed, options, changed, says):
    before = {path: path.read_bytes() for path in undisturbed[0].rglob("*") if path.is_file()}
    done = run(command(undisturbed[0], "--resume", *options, **changed))
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in undisturbed[0].rglob("*") if path.is_file()} == before


def test_a_damaged_part_is_passed_over_for_the_step_before_that_all_have(undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(undisturbed[0], out)
    (checkpoint.latest(out) / "rank_1.json").write_text("{")
    done = run(command(out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert "is damaged for rank 1" in done.stdout
    assert "go on from step 30, the newest that they have in common; replica 0 has step 40" in done.stdout
    assert outcome(out) == outcome(undisturbed[0])


def test_a_finished_run_goes_on_to_where_an_undisturbed_one_ends(tmp_path):
    for out, steps, resume in (("whole", 40, ()), ("longer", 20, ()), ("longer", 40, ("--resume",))):
        done = run(command(tmp_path / out, "--schedule", "constant", *resume, steps=steps))
        assert done.returncode == 0, done.stderr
    assert "the rate" not in done.stdout
    assert outcome(tmp_path / "longer") == outcome(tmp_path / "whole")


def test_torchrun_starts_the_same_run(undisturbed, tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "muonwire")
    done = subprocess.run(
        [*launcher, *command(tmp_path)], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path) == outcome(undisturbed[0])
