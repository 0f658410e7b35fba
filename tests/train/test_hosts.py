"""Hosts with folders of their own and a link of 10 Mbit/s, started by torchrun as docs/first_training.md says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from muonwire.tasks import TextSettings, TextTask
from muonwire.train import TrainConfig, Trainer, checkpoint
from muonwire.train.metrics import read_metrics
from muonwire.compare.hosts import hosts
from tests.lockstep import lockstep
from tests.train.test_replicated import children_of, wait_for_step

# Checkpoints fall between two synchronizations, where replicas hold more of their own.
STEPS, EVERY, KILLED_AFTER = 40, 6, 19
RECIPE = "one_bit_muon(interval=4)"
TRAIN = (
    *(
        "-m",
        "muonwire",
        "train",
        "--recipe",
        RECIPE,
        "--model-size",
        "pico",
        "--sequence",
        "16",
        "--batch",
        "2",
    ),
    *("--evaluation-sequences", "4", "--evaluate-every", "20", "--checkpoint-every", str(EVERY)),
    *("--steps", str(STEPS), "--threads", "1", "--no-tensorboard", "--out", "run"),
)


def torchrun(host, *words, rank, master, port, folder, nodes, timeout_s=60):
    """One machine's part of the launch, without any variable set."""
    folder.mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GLOO_", "OMP_", "MASTER_"))}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--node-rank", str(rank)),
        *("--master-addr", master, "--master-port", str(port), "--rdzv-conf", f"timeout={timeout_s}"),
        *("--nproc-per-node", "1", *words),
    ]
    with (folder / "log").open("w") as log:
        return host.start(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)


def launch(machines, base, *extra, port):
    """The same command on every machine."""
    return [
        torchrun(
            host,
            *TRAIN,
            *extra,
            rank=rank,
            master=machines[0].address,
            port=port,
            folder=base / f"host{rank}",
            nodes=len(machines),
        )
        for rank, host in enumerate(machines)
    ]


def processes_of(process):
    """A machine's launcher and its replicas."""
    found = [process.pid]
    for pid in found:
        found += children_of(pid)
    return found


def kill(process):
    for pid in processes_of(process):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end(processes, within_s=120):
    deadline = time.monotonic() + within_s
    try:
        return [p.wait(max(0.1, deadline - time.monotonic())) for p in processes]
    finally:
        for process in processes:
            kill(process)


def log(base, rank):
    return (base / f"host{rank}" / "log").read_text()


def outcome(folder):
    result = json.loads((folder / "result.json").read_text())
    losses = [(r["step"], r.get("local_loss"), r.get("eval_loss")) for r in read_metrics(folder)]
    return result["weights_digest"], losses


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the run comes to by number of replicas, as threads of this process: the same bits without the imports."""
    task = TextTask(TextSettings(model_size="pico", sequence=16, batch=2, evaluation_sequences=4))
    config = TrainConfig(
        recipe=RECIPE,
        steps=STEPS,
        evaluate_every=20,
        checkpoint_every=0,
        tensorboard=False,
        task=task.settings,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {}
        for count in (2, 4):
            out = tmp_path_factory.mktemp(f"undisturbed{count}")
            lockstep(lambda transport, out=out: Trainer(config, task, transport, out).run(), count)
            found[count] = outcome(out)
        return found
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [2, 4])
def test_a_host_that_is_killed_costs_nothing_but_the_steps_since_the_last_checkpoint(
    count, undisturbed, tmp_path, free_port
):
    with hosts(count) as machines:
        started = launch(machines, tmp_path, port=free_port)
        try:
            wait_for_step(tmp_path / "host0/run", KILLED_AFTER)
        finally:
            kill(started[-1])
        assert all(end(started)), [log(tmp_path, r) for r in range(count)]
        # Another that noticed it first may have ended before this one looked.
        lost = next(line for line in log(tmp_path, 0).splitlines() if "lost its connection to" in line)
        assert f"replica {count - 1} (" in lost
        kept = tmp_path / "kept"
        for rank in range(count):
            holds = sorted(p.name for p in (tmp_path / f"host{rank}/run").iterdir())
            assert ("where.json" in holds) == (rank > 0)
            assert ("metrics.jsonl" in holds) == (rank == 0)
            at = checkpoint.latest(tmp_path / f"host{rank}/run")
            assert {p.stem for p in at.glob("rank_*")} == {f"rank_{rank}"}
            shutil.copytree(tmp_path / f"host{rank}/run", kept, dirs_exist_ok=True)
        resumed = launch(machines, tmp_path, "--resume", port=free_port)
        assert end(resumed) == [0] * count, [log(tmp_path, r) for r in range(count)]
    assert outcome(tmp_path / "host0/run") == undisturbed[count]
    if count == 2:
        # The folders of both hosts, copied into one, go on there.
        here = [sys.executable, *TRAIN[:-1], str(kept), "--replicas", "2", "--resume"]
        done = subprocess.run(here, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert outcome(kept) == undisturbed[2]


def test_launchers_that_do_not_meet_end_in_the_time_that_they_are_given(tmp_path, free_port):
    with hosts(2) as machines:
        nobody = machines[0].address.rpartition(".")[0] + ".9"
        start_s = time.monotonic()
        alone = torchrun(
            machines[0],
            *TRAIN,
            rank=0,
            master=machines[0].address,
            port=free_port,
            folder=tmp_path / "host0",
            nodes=2,
            timeout_s=4,
        )
        lost = torchrun(
            machines[1],
            *TRAIN,
            rank=1,
            master=nobody,
            port=free_port,
            folder=tmp_path / "host1",
            nodes=2,
            timeout_s=4,
        )
        assert all(end([alone, lost], within_s=40))
        assert time.monotonic() - start_s < 35
    assert "1/2 clients joined" in log(tmp_path, 0)
    assert f"({nobody}, {free_port})" in log(tmp_path, 1).splitlines()[-1]
    assert not list(Path(tmp_path).glob("host*/run"))
