"""Hosts with folders of their own and a link of 10 Mbit/s, started by torchrun as docs/first_training.md says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch

from muonwire.compare.hosts import hosts, replica_environment
from muonwire.train import TrainConfig, Trainer, checkpoint
from muonwire.train.metrics import read_metrics
from tests.commands import Command, children_of
from tests.lockstep import lockstep
from tests.slow import slow_unless
from tests.tiny_task import TINY, TinySettings
from tests.train.test_replicated import wait_for_step

# Checkpoints fall between two synchronizations, where replicas hold more of their own.
STEPS, EVERY, KILLED_AFTER = 40, 6, 19
RECIPE = "one_bit_muon(interval=4)"
TRAIN = (
    *("train", "--recipe", RECIPE, *TINY, "--sequence", "16", "--batch", "2"),
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
        *("--nproc-per-node", "1", "-m", "muonwire", *words),
    ]
    with (folder / "log").open("w") as log:
        return host.start(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)


def alone(host, *words, env, folder):
    """The same, as somebody's own launcher would start it that sets what torchrun sets."""
    folder.mkdir(parents=True, exist_ok=True)
    return Command(words, host=host, env=env, cwd=folder, stdout=folder / "log", stderr=subprocess.STDOUT)


def launch(machines, base, *extra, port, by_torchrun):
    """The same command on every machine, by torchrun or without its interpreters."""
    if not by_torchrun:
        return [
            alone(
                host,
                *TRAIN,
                *extra,
                env=replica_environment(machines, rank, port=port),
                folder=base / f"host{rank}",
            )
            for rank, host in enumerate(machines)
        ]
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


def train_in_threads(out, count, *, resume=False):
    """The same run, or the rest of it, with the replicas as threads of this process: the same bits without the imports."""
    task = TinySettings(sequence=16, batch=2, evaluation_sequences=4).make()
    config = TrainConfig(
        recipe=RECIPE,
        steps=STEPS,
        evaluate_every=20,
        checkpoint_every=EVERY if resume else 0,
        tensorboard=False,
        task=task.settings,
    )

    def train(transport):
        trainer = Trainer(config, task, transport, out)
        if resume:
            assert trainer.resume(new_length=True)
        trainer.run()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lockstep(train, count)
    finally:
        torch.set_num_threads(threads)
    return outcome(out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the run comes to, of a number of replicas."""
    return cache(lambda count: train_in_threads(tmp_path_factory.mktemp(f"undisturbed{count}"), count))


@pytest.mark.parametrize("count", slow_unless(lambda index, count: count == 4, [(2,), (4,)]))
def test_a_host_that_is_killed_costs_nothing_but_the_steps_since_the_last_checkpoint(
    count, undisturbed, tmp_path, free_port
):
    with hosts(count) as machines:
        started = launch(machines, tmp_path, port=free_port, by_torchrun=count == 2)
        try:
            wait_for_step(tmp_path / "host0/run", KILLED_AFTER)
        finally:
            kill(started[-1])
        assert all(end(started)), [log(tmp_path, r) for r in range(count)]
        # Another that noticed it first may have ended before this one looked.
        lost = next(line for line in log(tmp_path, 0).splitlines() if "lost its connection to" in line)
        # On loopback addresses, where there are no namespaces, a replica's would tell nothing.
        where = f" ({machines[-1].address})" if machines[-1].namespace else ""
        assert f"to replica {count - 1}{where} in step" in lost
        kept = tmp_path / "kept"
        for rank in range(count):
            holds = sorted(p.name for p in (tmp_path / f"host{rank}/run").iterdir())
            assert ("where.json" in holds) == (rank > 0)
            assert ("metrics.jsonl" in holds) == (rank == 0)
            at = checkpoint.latest(tmp_path / f"host{rank}/run")
            assert {p.stem for p in at.glob("rank_*")} == {f"rank_{rank}"}
            shutil.copytree(tmp_path / f"host{rank}/run", kept, dirs_exist_ok=True)
        # What torchrun would set is what it set before, so that its interpreters are not started again.
        resumed = launch(machines, tmp_path, "--resume", port=free_port, by_torchrun=False)
        assert end(resumed) == [0] * count, [log(tmp_path, r) for r in range(count)]
    assert outcome(tmp_path / "host0/run") == undisturbed(count)
    if count == 2:
        # The folders of both hosts, copied into one, go on there.
        assert train_in_threads(kept, 2, resume=True) == undisturbed(2)


def test_launchers_that_do_not_meet_end_in_the_time_that_they_are_given(tmp_path, free_port):
    with hosts(2) as machines:
        nobody, unused = machines[0].address.rpartition(".")[0] + ".9", free_port
        if not machines[0].namespace:
            # All of 127.0.0.0/8 is this machine; nothing listens on its port 1.
            unused = 1
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
            port=unused,
            folder=tmp_path / "host1",
            nodes=2,
            timeout_s=4,
        )
        assert all(end([alone, lost], within_s=40))
        assert time.monotonic() - start_s < 35
    assert "1/2 clients joined" in log(tmp_path, 0)
    assert f"({nobody}, {unused})" in log(tmp_path, 1).splitlines()[-1]
    assert not list(Path(tmp_path).glob("host*/run"))
