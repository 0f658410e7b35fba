"""Runs a function in several gloo processes, and returns what each returned.

The processes fork from a server that has imported torch, and what optimizers pull in at their first step, so that a test
costs tenths of a second and not an import each.
"""

import importlib
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

from tests.commands import context


class ReplicaFailedError(AssertionError):
    def __init__(self, rank, kind, text):
        super().__init__(f"replica {rank}: {text}")
        self.rank = rank
        self.kind = kind


def _enter(function, rank, world_size, path, pipe, args):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    try:
        pipe.send((True, function(*args)))
    except BaseException as error:
        pipe.send((False, (type(error).__name__, f"{error}\n{traceback.format_exc()}")))
    # A peer may still be reading from this process's sockets.
    pipe.recv()
    dist.destroy_process_group()


def _enter_forked(function, rank, world_size, path, pipes, args):
    # A replica that dies closes its pipe; another's copy would keep it open.
    for other, pipe in enumerate(pipes):
        if other != rank:
            pipe.close()
    _enter(function, rank, world_size, path, pipes[rank], args)


def _fork_all(modules, function, world_size, path, pipes, args):
    """Import what all replicas need, once, and fork them."""
    for module in modules:
        importlib.import_module(module)
    forking = multiprocessing.get_context("fork")
    replicas = []
    for rank in range(world_size):
        replica = forking.Process(target=_enter_forked, args=(function, rank, world_size, path, pipes, args))
        replica.start()
        replicas.append(replica)
    for pipe in pipes:
        pipe.close()
    for replica in replicas:
        replica.join()


def run_replicas(function, world_size, *args, expect_lost=(), modules=()):
    """Results in rank order; None for the ranks that are expected to die, an exception for what a replica raised.

    ``modules`` are imported once for all replicas, where the server has not imported them.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, ends = zip(*(context.Pipe() for _ in range(world_size)), strict=True)
        store = str(Path(folder) / "store")
        if modules:
            targets = [(_fork_all, (modules, function, world_size, store, ends, args))]
        else:
            targets = [
                (_enter, (function, rank, world_size, store, end, args)) for rank, end in enumerate(ends)
            ]
        processes = [context.Process(target=t, args=given, daemon=not modules) for t, given in targets]
        for process in processes:
            process.start()
        for end in ends:
            end.close()
        results = [None] * world_size
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        while waiting:
            ready = wait(list(waiting), timeout=120)
            assert ready, f"replicas {sorted(waiting.values())} hang"
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    good, value = pipe.recv()
                except EOFError:
                    assert rank in expect_lost, f"replica {rank} died"
                    continue
                results[rank] = value if good else ReplicaFailedError(rank, *value)
        for pipe in pipes:
            try:
                pipe.send("end")
            except OSError:
                continue
        for process in processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
    failed = [r for r in results if isinstance(r, ReplicaFailedError)]
    if failed and not expect_lost and all(f.kind not in _EXPECTED for f in failed):
        raise failed[0]
    return results


# Raised by replicas that a test breaks on purpose; handed back instead of raised.
_EXPECTED = (
    "ReplicaLostError",
    "ExchangeError",
    "DivergedReplicasError",
    "NonFiniteUpdateError",
    "PayloadError",
)
