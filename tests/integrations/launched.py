"""Processes as a launcher starts them, with its variables: forked from the server of tests.commands."""

import os
import socket
import traceback
from multiprocessing.connection import wait

from tests.commands import context
from tests.replicas import ReplicaFailedError


def _enter(function, rank, world_size, port, pipe, args):
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    try:
        pipe.send(function(*args))
    except BaseException as error:
        pipe.send(ReplicaFailedError(rank, type(error).__name__, f"{error}\n{traceback.format_exc()}"))
    # A peer may still be reading from this process's sockets.
    pipe.recv()


def launched(function, world_size, *args, limit_s=120):
    """What ``function(*args)`` returned on each process, in rank order; a ReplicaFailedError for what one raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_enter, args=(function, rank, world_size, port, theirs, args), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results = [None] * world_size
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=limit_s)
        assert ready, f"processes {sorted(waiting.values())} hang"
        for pipe in ready:
            results[waiting.pop(pipe)] = pipe.recv()
    for pipe in pipes:
        pipe.send("end")
    for process in processes:
        process.join(timeout=30)
        if process.is_alive():
            process.kill()
    return results
