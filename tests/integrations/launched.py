"""Processes as a launcher starts them, with its variables: forked from one that has imported the framework."""

import gc
import importlib
import multiprocessing
import os
import socket
import traceback
from contextlib import suppress
from multiprocessing.connection import wait

from tests.commands import context
from tests.replicas import ReplicaFailedError


def _launch(function, port, pipes, args, modules):
    """The launcher: imports once what all of its processes need."""
    import torch

    torch.set_num_threads(1)
    for module in modules:
        importlib.import_module(module)
    # Frameworks collect garbage in every training; what is imported is none.
    gc.freeze()
    forking = multiprocessing.get_context("fork")
    processes = [
        forking.Process(target=_enter, args=(function, rank, port, pipes, args), daemon=True)
        for rank in range(len(pipes))
    ]
    for process in processes:
        process.start()
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join()


def _enter(function, rank, port, pipes, args):
    pipe = pipes[rank]
    for other in pipes:
        if other is not pipe:
            other.close()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(pipes)),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(len(pipes)),
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


def launched(function, world_size, *args, modules=(), limit_s=200):
    """What ``function(*args)`` returned on each process, in rank order; a ReplicaFailedError for what one raised.

    None for one that has ended before.

    ``modules`` are imported before the processes are forked.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, theirs = zip(*(context.Pipe() for _ in range(world_size)), strict=True)
    launcher = context.Process(target=_launch, args=(function, port, theirs, args, modules))
    launcher.start()
    for pipe in theirs:
        pipe.close()
    results = [None] * world_size
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    try:
        while waiting:
            ready = wait(list(waiting), timeout=limit_s)
            assert ready, f"processes {sorted(waiting.values())} hang"
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    results[rank] = pipe.recv()
                except EOFError:
                    # It has ended without a word.
                    continue
        for pipe in pipes:
            with suppress(OSError):
                pipe.send("end")
        launcher.join(timeout=30)
    finally:
        if launcher.is_alive():
            # Its processes are daemons of it.
            launcher.terminate()
    return results


def all_good(results):
    """The results; the first failure is raised."""
    for result in results:
        if isinstance(result, ReplicaFailedError):
            raise result
    return results
